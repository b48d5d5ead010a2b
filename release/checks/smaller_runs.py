"""Checks the smaller runs that belong to a release.

The smaller models of its recipe must have been trained as the recipe states. A prediction must have been sealed before
training, and follow from its runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.core import provenance
from pipeline.core.stage import identity
from pipeline.core.store import sha256_file
from release import untrusted
from release.checks.check import Findings
from release.facts import forecast, run_facts, training
from release.facts.forecast import FILE, FOLDER, MODEL, PHASE
from release.facts.run_facts import PRETRAIN, TRAINING
from release.layout import RECIPE, SIZE, folders_of, models_of
from release.opened_release import Release
from stages.models.registry import parse

SHARED = ("tokens", "order")
"""Roles of the inputs that a smaller model has in common with pre-training."""


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
            problems += _settings(section, configs[PRETRAIN], configs[size.name], size.name)
            problems += _log(folder, size)
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


def _settings(
    section: dict[str, Any], base: provenance.Statement, size: provenance.Statement, name: str
) -> Iterator[str]:
    """Yields the problems of the settings and the inputs of a smaller model, whose section of the recipe is given."""
    wanted, config = (dict(provenance.parameters_of(each)["config"]) for each in (base, size))
    model, smaller = wanted.pop("model"), config.pop("model")
    try:
        stated = identity(parse(model | section["model"]))
    except ValidationError as error:
        yield f"{RECIPE} states settings of {name} that make no model: {error.errors()[0]['msg']}"
        return
    for key in sorted({*stated, *smaller}):
        if smaller.get(key) != stated.get(key):
            yield f"{name} was trained with {key} = {smaller.get(key)}, and {RECIPE} states {stated.get(key)}"
    phase = dict(wanted.pop("phase"))
    phase |= {"optimizer": section.get("optimizer", phase["optimizer"]), "release_checkpoint_interval": phase["steps"]}
    for key, value in {**wanted, "phase": phase, "name": name}.items():
        if config.get(key) != value:
            yield f"{name} was trained with another {key} than {RECIPE} and {PRETRAIN} state"
    inputs = [provenance.material_keys(each) for each in (base, size)]
    for role in SHARED:
        if inputs[0].get(role) != inputs[1].get(role):
            yield f"{name} read other {role} than {PRETRAIN}"


def _log(folder: Path, size: run_facts.Trained) -> Iterator[str]:
    """Yields the problems of the figures of a smaller model, which its log states too."""
    last: dict[str, Any] = {}
    for line in training.stream(folder / TRAINING / size.name / "training.jsonl"):
        # Not every line has every figure, so the last of each is kept.
        last |= {key: line[key] for key in ("step", "tokens", "heldout_loss") if key in line}
    for key, value in {"step": size.steps, "tokens": size.tokens, "heldout_loss": size.loss}.items():
        if last.get(key) != value:
            yield f"{TRAINING}/{size.name}/summary.json: its {key} is {value}, and the log ends with {last.get(key)}"


CLOSE = 1e-6
"""Relative difference of figures that other versions of numpy may compute."""
PROOF = (
    "sealed before the first recorded start, by the maker's own clock, and named in the statement about training; "
    "that no earlier training was left out, only a timestamp of it and trust can tell"
)


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
