"""Verifiers by name, and the judges of answers to which no rule has one right answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.stage import Inputs
from stages.data import courtesies
from stages.rl.contracts import Parts, Response, Row, Verifier


class Exact:
    name, version, runs_code = "exact", "1", False

    def score(self, answers: Sequence[tuple[Row, Response]]) -> list[Parts]:
        return [{"reward": float(r.finished and r.answer == row["expected_answer"])} for row, r in answers]

    def close(self) -> None:
        return None


class Courtesy:
    """The rules of stages/data/courtesies.py for a courteous note."""

    name, version, runs_code = "courtesy", "1", False

    def score(self, answers: Sequence[tuple[Row, Response]]) -> list[Parts]:
        return [self._parts(row, response) for row, response in answers]

    def _parts(self, row: Row, response: Response) -> Parts:
        act = next(act for act in courtesies.ACTS if act.name == row["act"])
        parts = courtesies.judge(courtesies.Request(act, row["who"], row["what"]), response.answer)
        return parts if response.finished else parts | {"reward": 0.0}

    def close(self) -> None:
        """Nothing is held."""


MADE: dict[str, type[Any]] = {"exact": Exact, "courtesy": Courtesy}


def verifiers_of(rows: Sequence[Row], inputs: Inputs, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Verifier]:
    """The verifiers that these tasks name. Raises RecipeError for a name that is none."""
    return {str(name): MADE[name]() for name in sorted({row["verifier"] for row in rows})}
