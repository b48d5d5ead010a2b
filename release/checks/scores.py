"""Checks every scores.json against the tables beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from release import schema
from release.assembly.score_facts import (
    HARNESS,
    MEMORIZATION,
    chat_tables_of,
    compute_chat_scores,
    compute_harness,
    compute_memorization,
    compute_scores,
    read_scores,
)
from release.cards import versions
from release.checks.check import Subject
from release.checks.findings import Findings


def scores(subject: Subject) -> Findings:
    """Checks that each scores.json follows from its tables, of every measurement."""
    evaluation = subject.folder / "evaluation"
    return Findings(score_problems(evaluation), compared=any(evaluation.rglob("scores.json")))


def score_problems(evaluation: Path) -> list[str]:
    """The problems with scores. evaluation: the folder of that name in a dataset repository."""
    folders = [path.parent for path in sorted(evaluation.glob("*/scores.json"))]
    problems = [
        f"evaluation/{folder.name}/scores.json is not what its tables give"
        for folder in folders
        if not _equals_measured(folder / "scores.json", compute_scores(folder))
    ]
    for benchmark, models in compute_chat_scores(evaluation).items():
        for table in chat_tables_of(evaluation, benchmark):
            path, measured = table.with_name("scores.json"), models[schema.model(table.parent)]
            if not path.exists() or not _equals_measured(path, measured):
                problems.append(f"evaluation/{benchmark}/{table.parent.name}/scores.json is not what its table gives")
    for kind, name, compute in (
        (MEMORIZATION, "documents", compute_memorization), (HARNESS, "items", compute_harness)
    ):  # fmt: skip
        for path in sorted((evaluation / kind).glob(f"*/{name}.parquet")):
            stated = path.with_name("scores.json")
            if not stated.exists() or not _equals_measured(stated, compute(path.parent)):
                problems.append(f"evaluation/{kind}/{path.parent.name}/scores.json is not what its tables give")
    return problems


def _equals_measured(path: Path, measured: Mapping[str, Any]) -> bool:
    """Whether a scores.json equals the measured scores. One of an older schema may lack figures that were added
    later."""
    newer_figures = {figure for figure, schema_ in versions.FIGURES.items() if schema_ > schema.stated(path).cards}
    return _equal(read_scores(path), json.loads(json.dumps(measured)), newer_figures)


def _equal(stated: Any, expected: Any, newer_figures: set[str], name: str = "") -> bool:
    """Whether two JSON values are equal, except for fields of `newer_figures`, which the first may lack."""
    if not (isinstance(stated, dict) and isinstance(expected, dict)):
        return bool(stated == expected)
    names = {key: f"{name}.{key}".lstrip(".") for key in expected}
    return stated.keys() <= expected.keys() and all(
        _equal(stated[key], expected[key], newer_figures, names[key]) if key in stated else names[key] in newer_figures
        for key in expected
    )
