"""Checks the training of a release: its effect, its smaller runs, and its prediction.

Bits per byte, accuracy, passkeys and preferences of each model are compared with those of the previous one. The smaller
models of the recipe must have been trained as it states. A prediction must have been sealed before training, and follow
from its runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.core import provenance
from pipeline.core.stage import identity
from pipeline.core.store import sha256_file
from release import untrusted
from release.checks.check import BuildContext, Findings
from release.facts import forecast, run_facts, training
from release.facts.forecast import FILE, FOLDER, MODEL, PHASE
from release.facts.published_tables import read_rows
from release.facts.run_facts import PRETRAIN, TRAINING, context_of
from release.layout import RECIPE, SIZE, folders_of, models_of, numbered, when
from release.opened_release import Release
from stages.confidence import Figure, Mean
from stages.evaluation.scores import ModelScores, pass_at_1
from stages.evaluation.settings import SURE
from stages.train.smaller_model import with_settings

TOGETHER = "together"
Change = tuple[Figure, Figure]
"""A figure of two models, the earlier one first."""
BEYOND = f", beyond {SURE} standard errors of the difference"
SHARED = ("tokens", "order")
"""Roles of the inputs that a smaller model has in common with pre-training."""
CLOSE = 1e-6
"""Relative difference of figures that other versions of numpy may compute."""
PROOF = (
    "sealed before the first recorded start, by the maker's own clock, and named in the statement about training; "
    "that no earlier training was left out, only a timestamp of it and trust can tell"
)


def pretraining_lowers_bits_per_byte(build: BuildContext) -> Findings | None:
    """Checks that pre-training lowers the bits per byte on the sources that it read.

    The sources are judged together and one by one, so that a large source does not hide a small one. None without
    pre-training.
    """
    if "init" not in build.release.data.evaluation:
        return None
    read = build.release.data.sources_read("pretrain")
    changes = _changes(*(_bits(build.release.data.evaluation[name], read) for name in ("init", "base")))
    if not changes:
        return _nothing_to_judge("pretrain")
    return Findings.of_measurement(max(map(_rise, changes.values())) < 0, f"bits per byte {_text(changes)}")


def midtraining_raises_accuracy(build: BuildContext) -> Findings | None:
    """Checks that mid-training raises the accuracy by more than the recipe requires. None without mid-training."""
    if "mid" not in build.release.data.evaluation:
        return None
    before, after = (build.release.data.evaluation[name]["accuracy_all"] for name in ("base", "mid"))
    return judge_gain("accuracy", before, after, build.evaluation["min_accuracy_gain"], significant=False)


def midtraining_keeps_bits_per_byte(build: BuildContext) -> Findings | None:
    """Checks that the loss on the sources that the phase reads is within the recipe's limit.

    None without mid-training.
    """
    if "mid" not in build.release.data.evaluation:
        return None
    return _keeps_bits_per_byte(build, "base", {"mid": "midtrain"})


def longcontext_keeps_bits_per_byte(build: BuildContext) -> Findings | None:
    """Checks that the loss in bits per byte on short texts is within the recipe's limit.

    None without long-context phases.
    """
    long = [model for model in build.release.data.evaluation if model.startswith("long")]
    if not long:
        return None
    return _keeps_bits_per_byte(build, "mid", {model: f"longcontext-{numbered(model)[1]}" for model in long})


def _keeps_bits_per_byte(build: BuildContext, before: str, phases: Mapping[str, str]) -> Findings:
    """Compares models with an earlier one on the held-out documents of the sources that the phase of each model reads.

    The sources are compared together and one by one. A phase forgets the sources that its mix leaves out, so these are
    judged by a limit of their own, `left_out_tolerance`, and only stated without it.

    Args:
        build: The build whose models are judged.
        before: The earlier model.
        phases: {model: the phase that trained it}.
    """
    scores, allowed = build.release.data.evaluation, build.evaluation["bits_per_byte_tolerance"]
    allowed_left_out: float | None = build.evaluation.get("left_out_tolerance")
    details, worst, is_kept = [], -math.inf, True
    for model, phase in phases.items():
        read = build.release.data.sources_read(phase)
        changes = _changes(*(_bits(scores[name], read) for name in (before, model)))
        if not changes:
            return _nothing_to_judge(phase)
        details.append(f"{model}: bits per byte {_text(changes)}")
        worst = max(worst, *map(_sure_rise, changes.values()))
        # both models see the same text up to mid-training's context; with bits per byte the longer context sees more
        losses = _changes(*(_losses_by_position(build, name, read) for name in (before, model)))
        if losses and model.startswith("long"):
            details.append(f"bits per token by position {_text(losses)}")
            worst = max(worst, *map(_rise, losses.values()))
        earlier = {
            source
            for name in build.release.data.order
            if when(name) < when(phase)
            for source in build.release.data.sources_read(name)
        }
        left_out = _changes(*(_bits(scores[name], earlier - read) for name in (before, model)))
        # A sum over sources that are not judged would only be read as a judgement.
        left_out.pop(TOGETHER, None)
        if left_out and allowed_left_out is not None:
            details.append(f"left out by {phase}, which may lose {allowed_left_out:g} on each: {_text(left_out)}")
            is_kept &= max(map(_sure_rise, left_out.values())) <= allowed_left_out
        elif left_out:
            details.append(f"not judged, because {phase} does not read them: {_text(left_out)}")
    text = f"{'; '.join(details)}; at most {allowed:g} may be lost on each{BEYOND}"
    return Findings.of_measurement(worst <= allowed and is_kept, text)


def _nothing_to_judge(phase: str) -> Findings:
    return Findings([f"no source that {phase} reads has held-out documents; set heldout_fraction of one"])


def longcontext_finds_passkeys(build: BuildContext) -> Findings | None:
    """Checks that the last model retrieves more keys than the mid-trained one.

    The texts are too long for the mid-trained one. None if the models were not evaluated on keys.
    """
    scores = build.release.data.evaluation
    long = [model for model in scores if model.startswith("long")]
    if not long or not any("passkey" in scores[model] for model in ("mid", long[-1])):
        return None
    before, after = (scores[model].get("passkey", {}) for model in ("mid", long[-1]))
    context = _context_of_midtraining(build)
    lengths = [length for length in sorted({*before, *after}, key=int) if int(length) > context]
    if not lengths:
        return Findings([f"no passkey was asked for beyond the {context} tokens of mid-training"])
    # Longer texts are harder, so both models must be judged by the same lengths.
    if missing := [length for length in lengths if length not in before or length not in after]:
        return Findings([f"passkeys of {missing[0]} tokens were asked of one model only"])
    earlier, later = (_pooled([rows[length] for length in lengths]) for rows in (before, after))
    measure = f"keys found in more than {context} tokens ({', '.join(lengths)} tokens)"
    return judge_gain(measure, earlier, later, required=0.0, significant=False)


def _pooled(shares: Sequence[Mean]) -> Mean:
    """Returns the share over all items of several sets."""
    n = sum(row["n"] for row in shares)
    value = sum(row["value"] * row["n"] for row in shares) / n
    return {"value": value, "se": math.sqrt(value * (1 - value) / n), "n": n}


def _context_of_midtraining(build: BuildContext) -> int:
    return context_of(build.release.checkpoints, "midtrain")


def _losses_by_position(build: BuildContext, model: str, sources: Collection[str]) -> dict[str, Figure]:
    """Returns bits per token of the long documents of some sources, at positions within mid-training's context.

    Empty if the model was not evaluated on long documents.
    """
    path = build.release.root / "dataset/evaluation" / model / "positions.parquet"
    if not path.is_file():
        return {}
    context, bits, tokens = _context_of_midtraining(build), Counter[str](), Counter[str]()
    for row in read_rows(path):
        if row["source"] in sources and row["last"] < context:
            position = f"{row['first']}-{row['last']}"
            bits[position] += row["nll_bits"]
            tokens[position] += row["tokens"]
    return {position: {"value": bits[position] / tokens[position], "se": 0.0} for position in bits}


def _bits(scores: ModelScores, sources: Collection[str]) -> dict[str, Figure]:
    """Returns bits per byte of the held-out documents of some sources, one by one and together."""
    rows = {name: row for name, row in scores["bits_per_byte"].items() if name in sources}
    figures: dict[str, Figure] = {name: {"value": row["value"], "se": row["se"]} for name, row in rows.items()}
    if len(rows) > 1:
        size = sum(row["bytes"] for row in rows.values())
        value = math.fsum(row["value"] * row["bytes"] for row in rows.values()) / size
        figures[TOGETHER] = {"value": value, "se": math.hypot(*(r["se"] * r["bytes"] for r in rows.values())) / size}
    return figures


def _changes(before: Mapping[str, Figure], after: Mapping[str, Figure]) -> dict[str, Change]:
    """Returns figures before and after, by name, the greatest rise first."""
    # A source that only one model has gives a rise that no limit allows.
    unknown: Figure = {"value": math.nan, "se": 0.0}
    changes = {name: (before.get(name, unknown), after.get(name, unknown)) for name in {*before, *after}}
    return dict(sorted(changes.items(), key=lambda change: (-_rise(change[1]), change[0])))


def _rise(change: Change) -> float:
    """Returns the rise; infinite for a value that one of the models lacks or that is NaN."""
    rise = change[1]["value"] - change[0]["value"]
    return rise if math.isfinite(rise) else math.inf


def _sure_rise(change: Change) -> float:
    """Returns the significant part of a rise.

    A small source has few held-out documents, so its figures are too uncertain for one bound for all sources.
    """
    return _rise(change) - SURE * math.hypot(change[0]["se"], change[1]["se"])


def _text(changes: Mapping[str, Change]) -> str:
    return ", ".join(
        f"{name} {before['value']:.4f} → {after['value']:.4f}" for name, (before, after) in changes.items()
    )


def rlvr_raises_pass_at_1(build: BuildContext) -> Findings | None:
    """Checks that RLVR gains more on the test problems than the recipe requires.

    None without that phase, and without a model before it that converses.
    """
    accuracies = _pass_at_1(build)
    if not {"sft", "rlvr"} <= accuracies.keys():
        return None
    return judge_gain("pass@1", accuracies["sft"], accuracies["rlvr"], build.evaluation["chat"]["min_gain"])


def rlhf_keeps_skills(build: BuildContext) -> Findings | None:
    """Checks that learning from preferences loses no more on the test problems than the recipe allows.

    None without such phases after RLVR.
    """
    accuracies = _pass_at_1(build)
    later = [name for name in accuracies if when(name) > when("rlvr")]
    if "rlvr" not in accuracies or not later:
        return None
    allowed, before = build.evaluation["chat"]["skill_tolerance"], accuracies["rlvr"]
    losses = [
        before["value"] - accuracies[name]["value"] + SURE * math.hypot(before["se"], accuracies[name]["se"])
        for name in later
    ]
    figures = ", ".join(f"{name} {figure(accuracies[name])}" for name in ("rlvr", *later))
    text = (
        f"pass@1 {figures}; no more than {allowed:g} may be lost after rlvr, "
        f"{SURE} standard errors of the difference included"
    )
    return Findings.of_measurement(max(losses) <= allowed, text)


def is_preferred(model: str, build: BuildContext) -> Findings | None:
    """Checks that the answers of a model that learned from preferences win against the previous model.

    If those of the previous model cannot be better, it is enough that they do not lose. None if the model was not
    compared.
    """
    # A model may be evaluated without having been compared.
    if model not in _pass_at_1(build) or model not in build.release.data.chat.get("preferences", {}):
        return None
    comparison, required = build.release.data.chat["preferences"][model], build.evaluation["chat"]["min_win_rate"]
    rate, reward = comparison["win_rate"], comparison["sides"]["before"]["parts"]["reward"]
    text = f"{model} wins {rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f}) against the model before rlhf"
    if at_ceiling(reward):
        text += f", whose reward of {figure(reward)} leaves nothing to win: it must not lose for certain"
        return Findings.of_measurement(rate["high"] >= 0.5, text)
    return Findings.of_measurement(rate["low"] > required, text)


def _pass_at_1(build: BuildContext) -> dict[str, Mean]:
    """Returns {model: accuracy on all test problems}, in the order of training; empty without a chat model."""
    return pass_at_1(build.release.data.chat.get("test", {}))


def judge_gain(measure: str, before: Mean, after: Mean, required: float, significant: bool = True) -> Findings:
    """Checks that a share rose by more than the recipe requires.

    If so much is not missing, any gain is enough. At the ceiling none is demanded, only that nothing was lost for
    certain.

    Args:
        measure: What the share counts, for the sentence.
        before: The share of the earlier model.
        after: The share of the later model.
        required: The gain that must be exceeded.
        significant: Whether the gain must also exceed the uncertainty of the difference.
    """
    gain, uncertainty = after["value"] - before["value"], SURE * math.hypot(before["se"], after["se"])
    missing, chance = 1 - before["value"], _chance(before)
    text = f"{measure} {figure(before)} → {figure(after)}"
    # With so few items left to gain, even a perfect model could not show a gain beyond chance.
    if missing <= chance:
        text += (
            f"; {before['n']} items cannot show a gain above the first share, so none is demanded, and no loss{BEYOND} "
            "is allowed"
        )
        return Findings.of_measurement(gain >= -uncertainty, text)
    if missing <= required + chance:
        text += f"; {required:g} more cannot be shown above the first share, so any gain is enough"
        required = 0.0
    else:
        text += f", a gain of more than {required:g} is demanded"
    if significant:
        return Findings.of_measurement(gain - uncertainty > required, f"{text}{BEYOND}")
    return Findings.of_measurement(gain > required, text)


def at_ceiling(before: Mean) -> bool:
    """Returns True if what a share lacks to 1 is within what chance alone moves the difference of two such shares."""
    return 1 - before["value"] <= _chance(before)


def _chance(share: Mean) -> float:
    """Returns the difference of two shares over as many items that chance makes once in 20 times.

    Two right and two wrong items are added (Agresti and Coull 1998), because the standard error of a share of 1 is 0
    however few its items are.
    """
    items = share["n"] + 4
    value = (share["value"] * share["n"] + 2) / items
    return SURE * math.sqrt(2 * value * (1 - value) / items)


def figure(row: Figure) -> str:
    return f"{row['value']:.3f} ± {row['se']:.3f}"


def sizes(release: Release) -> Findings:
    """Checks that the recipe states every smaller model, and that each was trained as it states.

    That is with the recipe's settings but for those stated for that model, and on the rows of pre-training. Each must
    have fewer parameters than the model of the release, and its figures must be those of its log.
    """
    folder = release.root
    stated = untrusted.read_json(folder / RECIPE, follow=True).get("sizes", [])
    expected, published = [f"{SIZE}-{n + 1}" for n in range(len(stated))], run_facts.smaller_models(folder)
    if expected != published:
        words = [", ".join(each) or "none" for each in (expected, published)]
        return Findings([f"{RECIPE} states the smaller models {words[0]}, and {TRAINING} has {words[1]}"])
    configs = _statements(release, [PRETRAIN, *published])
    problems = [
        f"evidence/statements: none is about {name} as it is here"
        for name in (PRETRAIN, *published)
        if name not in configs
    ]
    if not problems:
        base, *trained = release.sizes
        for section, size in zip(stated, trained, strict=True):
            problems += _settings_of_size(section, configs[PRETRAIN], configs[size.name], size.name)
            problems += _log_of_size(folder, size)
            problems += _scores_of_twin(release, size, bool(section.get("twin")))
            if size.total >= base.total:
                problems.append(f"{size.name} has {size.total} parameters, and the model of the release {base.total}")
    return Findings(problems, summary=f"{len(published)} smaller models, trained on the rows of {PRETRAIN}")


def _statements(release: Release, names: list[str]) -> dict[str, provenance.Statement]:
    """Returns {node: statement about its artifact as it is here}."""
    manifests = release.manifests
    subjects = {(m.key, m.digest): name for name in names if (m := manifests.get(name)) is not None}
    statements = {}
    for body in release.statements.values():
        for each in body["subject"]:
            if name := subjects.get((each["name"], each["digest"]["sha256"])):
                statements[name] = body
    return statements


def _settings_of_size(
    section: dict[str, Any], base: provenance.Statement, size: provenance.Statement, name: str
) -> Iterator[str]:
    """Yields the problems of the settings and the inputs of a smaller model, whose section of the recipe is given."""
    wanted, config = (dict(provenance.parameters_of(each)["config"]) for each in (base, size))
    model, smaller = wanted.pop("model"), config.pop("model")
    try:
        stated = identity(with_settings(model, section["model"]))
    except ValidationError as error:
        yield f"{RECIPE} states settings of {name} that make no model: {error.errors()[0]['msg']}"
        return
    for key in sorted({*stated, *smaller}):
        if smaller.get(key) != stated.get(key):
            yield f"{name} was trained with {key} = {smaller.get(key)}, and {RECIPE} states {stated.get(key)}"
    phase = dict(wanted.pop("phase"))
    # A smaller model has checkpoints of its first and last step alone.
    phase.pop("release_checkpoint_steps", None)
    phase |= {"optimizer": section.get("optimizer", phase["optimizer"]), "release_checkpoint_interval": phase["steps"]}
    for key, value in {**wanted, "phase": phase, "name": name}.items():
        if config.get(key) != value:
            yield f"{name} was trained with another {key} than {RECIPE} and {PRETRAIN} state"
    inputs = [provenance.material_keys(each) for each in (base, size)]
    for role in SHARED:
        if inputs[0].get(role) != inputs[1].get(role):
            yield f"{name} read other {role} than {PRETRAIN}"


def _scores_of_twin(release: Release, size: run_facts.Trained, is_twin: bool) -> Iterator[str]:
    """Yields a problem if a twin, and no other smaller model, was not evaluated on the documents of the base model."""
    base, own = (release.dataset / "evaluation" / name / "documents.parquet" for name in ("base", size.name))
    # Evidence alone has no tables.
    if not base.is_file():
        return
    if own.is_file() != is_twin:
        yield f"{RECIPE} and dataset/evaluation disagree: {size.name} is a twin there, or has scores here, but not both"
    elif is_twin and size.difference is None:
        yield f"dataset/evaluation/{size.name} is of other documents than dataset/evaluation/base"


def _log_of_size(folder: Path, size: run_facts.Trained) -> Iterator[str]:
    """Yields the problems of the figures of a smaller model, which its log states too."""
    last: dict[str, Any] = {}
    for line in training.stream(folder / TRAINING / size.name / "training.jsonl"):
        # Not every line has every figure, so the last of each is kept.
        last |= {key: line[key] for key in ("step", "tokens", "heldout_loss") if key in line}
    for key, value in {"step": size.steps, "tokens": size.tokens, "heldout_loss": size.loss}.items():
        if last.get(key) != value:
            yield f"{TRAINING}/{size.name}/summary.json: its {key} is {value}, and the log ends with {last.get(key)}"


def prediction(release: Release) -> Findings:
    """Checks that a prediction was sealed before training, and that its forecast follows from the runs in it.

    The chain leads from prediction.json over its manifest and statement to the statement about training, whose first
    start names it. The times must be in this order.
    """
    folder, place = release.root, release.root / FOLDER
    predicted = forecast.read(place / FILE)
    manifest, statement = (untrusted.read_json(place / name) for name in ("manifest.json", "statement.json"))
    problems = []
    rows = [(row["path"], row["sha256"]) for row in manifest["files"]]
    if rows != [(FILE, release.digest(place / FILE))]:
        problems.append(f"{FOLDER}/{FILE} is not the file of its manifest")
    sealed = {"name": manifest["key"], "digest": {"sha256": manifest["digest"]}}
    if sealed not in statement["subject"]:
        problems.append(f"{FOLDER}/statement.json is about another artifact than {manifest['key']}")
    node, model_places = release.info.nodes[PHASE], folders_of(models_of(release.info.nodes))
    if predicted.target.key != node.key:
        problems.append(f"{FOLDER}/{FILE} is about {predicted.target.key}, and {PHASE} of this release is {node.key}")
    if f"merge-{PHASE}" in release.info.nodes:
        # The key of the phase does not have it, so it could have been added after a look at the outcome.
        problems.append(f"{RECIPE} averages checkpoints of {PHASE}, and the prediction is of the last one")
    problems += _of_training(release, manifest["digest"], statement)
    problems += _of_runs(predicted, statement)
    copies = [folder / name / FILE for name in model_places.values()]
    problems += [
        f"{path.relative_to(folder).as_posix()} is not the prediction in {FOLDER}"
        for path in copies
        if path.exists() and sha256_file(path) != release.digest(place / FILE)
    ]
    name = model_places[MODEL]
    if release.is_whole and not (folder / name / FILE).exists():
        problems.append(f"{name}/{FILE} is missing")
    return Findings(problems, detail=PROOF)


def _of_training(release: Release, prediction_digest: str, statement: Any) -> list[str]:
    """Returns the problems of the statements about the training.

    Each start must name the prediction, and begin after it.
    """
    node = release.info.nodes[PHASE]
    finished = statement["predicate"]["runDetails"]["metadata"]["finishedOn"]
    problems, starts_seen = [], 0
    for path, body in release.statements.items():
        if {"name": node.key, "digest": {"sha256": node.digest}} not in body["subject"]:
            continue
        for start in provenance.starts(body):
            starts_seen += 1
            if start["prediction"] != prediction_digest:
                problems.append(f"{path.name}: start {start['start']} of {PHASE} does not name the prediction")
            # Both are times in UTC of one format, which sort as texts.
            if start["startedOn"] < finished:
                problems.append(
                    f"{path.name}: start {start['start']} of {PHASE} began at {start['startedOn']}, before the "
                    f"prediction was sealed at {finished}"
                )
    return problems or (
        [] if starts_seen else [f"no statement about {PHASE} records a start, so none names the prediction"]
    )


def _of_runs(predicted: forecast.Prediction, statement: Any) -> list[str]:
    """Returns the problems of the runs.

    Their digests must be the statement's materials, and the forecast must be the one that follows from them.
    """
    problems = []
    digests = {row["digest"]["sha256"] for row in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    for point in predicted.points:
        if not {point.digest, point.scores_digest} <= digests:
            problems.append(f"{FOLDER}/{FILE}: {point.recipe} is no material of its statement")
    try:
        repeated = forecast.predict(predicted.target, predicted.points)
    except ValueError as error:
        return [*problems, f"{FOLDER}/{FILE}: {error}"]
    pairs = list(zip(predicted.forecasts, repeated.forecasts, strict=False))
    equal = len(predicted.forecasts) == len(repeated.forecasts) and all(
        stated.figure == computed.figure
        and all(
            math.isclose(getattr(stated, name), getattr(computed, name), rel_tol=CLOSE)
            for name in ("value", "low", "high")
        )
        for stated, computed in pairs
    )
    return problems if equal else [*problems, f"{FOLDER}/{FILE}: its forecast does not follow from its runs"]
