"""The budget of a recipe counts all attempts at its keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.store import Store
from pipeline.graph import budget
from pipeline.graph.budget import Limits


def test_a_budget_is_used_up_by_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = {"a-0123456789ab": 20.0, "b-0123456789ab": 39.0}
    monkeypatch.setattr(
        budget, "used", lambda store, keys: {"gpu_hours": sum(hours[key] for key in keys), "core_hours": 0.0}
    )
    limits: Limits = {"gpu_hours": 60.0, "core_hours": None}
    assert (
        budget.exceeded(limits, Store(tmp_path), hours) is None and budget.exceeded(None, Store(tmp_path), []) is None
    )
    hours["b-0123456789ab"] += 1.0
    sentence = budget.exceeded(limits, Store(tmp_path), hours)
    assert sentence == "the budget of 60 gpu hours is used up (60.00); raise budget.gpu_hours of the recipe"
