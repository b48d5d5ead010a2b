"""How often the jobs of a run read its statements for the budget."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from pipeline.core.store import Store
from pipeline.graph import budget
from pipeline.graph.budget import Hours, Limits


def test_the_jobs_of_a_run_read_each_statement_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read, keys = Store(tmp_path), list[str](), [f"stage{n}-0123456789ab" for n in range(50)]

    def used(store: Store, keys: Iterable[str]) -> Hours:
        (key,) = keys
        read.append(key)
        return {"gpu_hours": float(len(list((store.ledger / key).iterdir()))), "core_hours": 0.0}

    monkeypatch.setattr(budget, "used", used)
    limits: Limits = {"gpu_hours": 60.0, "core_hours": None}
    for key in keys:
        (store.ledger / key).mkdir(parents=True)
        (store.ledger / key / "1.json").touch()
    counted = tmp_path / "hours.json"
    for _ in range(50):
        assert budget.exceeded(limits, store, keys, counted) is None
    assert read == keys
    for number in range(2, 12):  # failed attempts at one of them count as well
        (store.ledger / keys[3] / f"{number}.json").touch()
    sentence = budget.exceeded(limits, store, keys, counted)
    assert sentence == "the budget of 60 gpu hours is used up (60.00); raise budget.gpu_hours of the recipe"
    assert read == [*keys, keys[3]]
    counted.write_text("{")
    assert budget.exceeded(limits, store, keys, counted) == sentence and read[51:] == keys, "it is made anew"
