"""Checks that a prediction is the one that was sealed before training, and that it follows from its runs."""

from __future__ import annotations

import math
from typing import Any

from pipeline.core import provenance
from pipeline.core.store import sha256_file
from release import untrusted
from release.checks.findings import Findings
from release.facts import forecast
from release.facts.forecast import FILE, FOLDER, MODEL, PHASE
from release.layout import folders_of, models_of
from release.opened_release import Release

CLOSE = 1e-6
"""Relative difference of figures that other versions of numpy may compute."""
PROOF = (
    "sealed before the first recorded start, by the maker's own clock, and named in the statement about training; "
    "that no earlier training was left out, only a timestamp of it and trust can tell"
)


def prediction(release: Release) -> Findings:
    """Checks the chain from prediction.json over its manifest and statement to the statement about training, whose
    first start names it, the order of their times, and that the forecast follows from the runs in it."""
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
    """Problems of the statements about the training: each start must name the prediction, and begin after it."""
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
            if start["startedOn"] < finished:
                problems.append(
                    f"{path.name}: start {start['start']} of {PHASE} began at {start['startedOn']}, before the "
                    f"prediction was sealed at {finished}"
                )
    return problems or (
        [] if starts_seen else [f"no statement about {PHASE} records a start, so none names the prediction"]
    )


def _of_runs(predicted: forecast.Prediction, statement: Any) -> list[str]:
    """Problems of the runs: their digests are the statement's materials, and the forecast is what follows from them."""
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
