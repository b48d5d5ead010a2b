"""Checks the training of a release: its effect, its smaller runs, and its prediction.

The rules on the effect are those of `stages.evaluation.gates`. The smaller models of the recipe must have been trained
as it states. A prediction must have been sealed before training, and follow from its runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
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
from release.layout import RECIPE, REHEARSALS, SIZE, folders_of, models_of
from release.opened_release import Release
from stages.evaluation.gates import Measurements, Rule
from stages.evaluation.scores import pass_at_1
from stages.train.rehearsal import NAME as REHEARSAL
from stages.train.rehearsal import difference, within
from stages.train.smaller_model import with_settings

SHARED = ("tokens", "order")
"""Roles of the inputs that a smaller model has in common with pre-training."""
CLOSE = 1e-6
"""Relative difference of figures that other versions of numpy may compute."""
PROOF = (
    "sealed before the first recorded start, by the maker's own clock, and named in the statement about training; "
    "that no earlier training was left out, only a timestamp of it and trust can tell"
)


def judged_by(rule: Rule, build: BuildContext) -> Findings | None:
    """Checks the effect of training by the rule that the stage `gates` applies after the phase.

    None if the gate does not apply to the models of the release.
    """
    judgement = rule.judge(_measurements(build.release), build.evaluation)
    return None if judgement is None else Findings.of_measurement(*judgement)


def _measurements(release: Release) -> Measurements:
    """Returns what the tables of a release say of its models."""
    data = release.data
    return Measurements(
        scores=data.evaluation,
        sources={phase: data.sources_read(phase) for phase in data.order},
        pass_at_1=pass_at_1(data.chat.get("test", {})),
        preferences=data.chat.get("preferences", {}),
        positions=partial(_positions, release),
        context=lambda: context_of(release.checkpoints, "midtrain"),
        reward_model=release.reward_model,
    )


def _positions(release: Release, model: str) -> list[dict[str, Any]]:
    path = release.root / "dataset/evaluation" / model / "positions.parquet"
    return read_rows(path) if path.is_file() else []


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


def rehearsals(release: Release) -> Findings:
    """Checks that every rehearsal was of the phase as it was trained, and that its repeated step came out equal."""
    phases = [row.phase for row in release.rehearsals]
    expected = [name.removeprefix(f"{REHEARSAL}-") for name in release.info.nodes if name.startswith(f"{REHEARSAL}-")]
    if missing := sorted({*expected} - {*phases}):
        return Findings([f"{REHEARSALS}/{missing[0]}.json is missing"])
    problems = list[str]()
    configs = _statements(release, [*phases, *(f"{REHEARSAL}-{phase}" for phase in phases)])
    for row in release.rehearsals:
        rehearsed, trained = configs.get(f"{REHEARSAL}-{row.phase}"), configs.get(row.phase)
        if rehearsed is None or trained is None:
            problems.append(f"evidence/statements: none is about {row.phase} or its rehearsal as they are here")
            continue
        config, phase_config = (provenance.parameters_of(body)["config"] for body in (rehearsed, trained))
        problems += [
            f"{row.phase} was rehearsed with another {name} than it was trained with"
            for name in phase_config
            if config.get(name) != phase_config[name]
        ]
        if problem := difference(row.compared["before"], row.compared["after"], row.compared["exact"]):
            place = f"{REHEARSALS}/{row.phase}.json"
            problems.append(f"{place}: the step after the restart is not the one before it: {problem}")
    qualified = within(all(row.compared["exact"] for row in release.rehearsals))
    summary = f"{len(phases)} phases were rehearsed: a step after a restart is equal{qualified}"
    return Findings(problems, summary=summary)


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
