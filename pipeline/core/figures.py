"""Numbers of JSON files by name, for comparisons and for MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from pipeline.core import json_files
from pipeline.core.json_files import Damaged
from pipeline.core.store import Artifact

SCORES = ("scores.json", "report.json")
"""The files of an artifact with results of a measurement."""
ESTIMATE = "value"
"""The field of an estimate beside its standard error and its count; the estimate has the name of the whole."""
_ANY: TypeAdapter[Any] = TypeAdapter(Any)


def scores_of(artifact: Artifact) -> dict[str, float]:
    """The numbers of a measurement, such as `bits_per_byte/code` and `bits_per_byte/code/se`; none of a stage that
    measures nothing. A damaged file is reported and left out."""
    numbers: dict[str, float] = {}
    for name in SCORES:
        if any(row.path == name for row in artifact.rows):
            try:
                numbers |= dict(_numbers(json_files.read(artifact / name, _ANY)))
            except FileNotFoundError:
                json_files.note(f"{json_files.printable(artifact / name)} is missing; its scores are left out")
            except Damaged as error:
                json_files.report(error, "its scores are left out")
    return numbers


def estimates(numbers: dict[str, float]) -> dict[str, float]:
    """The numbers that have a standard error, an interval or a count beside them."""
    wholes = {name.rpartition("/")[0] for name in numbers}
    return {name: value for name, value in numbers.items() if name in wholes}


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Texts, flags, null and lists are left out."""
    if isinstance(value, dict):
        for part, inner in value.items():
            yield from _numbers(inner, name if part == ESTIMATE and name else f"{name}/{part}".lstrip("/"))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)
