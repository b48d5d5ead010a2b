"""Scorer `exact`, version 1: the answer, or what follows its last colon, is the expected one but for white space.

Row: expected_answer. Frozen: a change is a new version in a new file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def score(row: Mapping[str, Any], answer: str, finished: bool) -> dict[str, float]:
    """Raises ValueError if the row has no expected answer."""
    expected = " ".join(str(row.get("expected_answer", "")).split())
    if not expected:
        raise ValueError("no expected_answer")
    given = " ".join(answer.split())
    right = given == expected or given.endswith((f":{expected}", f": {expected}"))
    return {"reward": float(right and finished), "finished": float(finished)}
