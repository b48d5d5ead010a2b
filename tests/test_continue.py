"""Going on from a release checkpoint of an earlier run: the order goes on, the ledger tells, nothing is repeated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_order import config as order_config
from test_order import tokens

from pipeline.errors import AtomError
from pipeline.store import Artifact, write_manifest
from stages.data import order
from stages.data.table import write_json


def rows(made: Artifact) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(made / "order.parquet").to_pylist()
    return found


def checkpoint(folder: Path, made: Artifact, step: int) -> Artifact:
    """A release checkpoint after `step` of the phase that follows an order: its place in the data is all that counts."""
    meta = made.json("meta.json")
    read = Counter(row["source"] for row in rows(made) if row["step"] <= step)
    folder.mkdir()
    place = order.position(meta, read, step)
    write_json(folder / "state.json", {"phase": meta["phase"], "step": step, "data_position": place})
    return write_manifest(folder, f"{meta['phase']}@{step}-000000000000")


def chunks(found: list[dict[str, Any]], source: str) -> list[tuple[str, int]]:
    return [(row["id"], row["offset"]) for row in found if row["source"] == source]


@pytest.mark.parametrize("steps", [(7,), (3, 4, 11)])
def test_an_unchanged_phase_reads_the_rows_that_were_to_come(
    tmp_path: Path, run_stage: Any, steps: tuple[int, ...]
) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    whole = made = run_stage(order.STAGE, order_config(), inputs)
    for step in steps:
        at = checkpoint(tmp_path / f"c{step}", made, step)
        made = run_stage(order.STAGE, order_config(first_step=step + 1), {**inputs, "continue": at})
    assert rows(made) == [row for row in rows(whole) if row["step"] > steps[-1]]
    assert made.json("meta.json")["first_step"] == steps[-1] + 1


def test_after_a_changed_mix_each_source_goes_on_without_a_repeat(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    first = run_stage(order.STAGE, order_config(), inputs)
    before = [row for row in rows(first) if row["step"] <= 6]
    at = checkpoint(tmp_path / "c6", first, 6)
    changes = {"first_step": 7, "steps": 30, "rows": 4, "mix": {"a": 0.25, "b": 0.75}, "seed": 5}
    second = run_stage(order.STAGE, order_config(**changes), {**inputs, "continue": at})
    found = rows(second)
    assert [row["step"] for row in found] == [step for step in range(7, 31) for _ in range(4)]
    assert Counter(row["source"] for row in found) == {"a": 24, "b": 72}
    sizes = {"a": 16, "b": 50}
    for source, size in sizes.items():
        read = chunks(before + found, source)
        assert {len(set(read[i : i + size])) for i in range(0, len(read) - size, size)} == {size}, "an epoch is whole"
    # A source that is left out keeps its place: the third part goes on with it where the first stood.
    alone = order_config(**{**changes, "mix": {"b": 1.0}})
    only_b = run_stage(order.STAGE, alone, {**inputs, "continue": at})
    again = order_config(first_step=21, steps=40, mix={"a": 0.5, "b": 0.5})
    third = run_stage(order.STAGE, again, {**inputs, "continue": checkpoint(tmp_path / "c20", only_b, 20)})
    read = chunks(before + rows(third), "a")
    assert len(set(read[16:32])) == 16 and read[16 : len(chunks(before, "a")) + 5] != read[: len(chunks(before, "a"))]
    read_b = chunks(before + [row for row in rows(only_b) if row["step"] <= 20] + rows(third), "b")
    assert len(set(read_b[:50])) == len(set(read_b[50:100])) == 50


def test_rows_of_another_length_go_on_at_the_same_fraction_of_an_epoch(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    first = run_stage(order.STAGE, order_config(), inputs)
    at = checkpoint(tmp_path / "c4", first, 4)
    longer = order_config(first_step=5, sequence_length=16)
    second = run_stage(order.STAGE, longer, {**inputs, "continue": at}).json("meta.json")
    read, size = at.json("state.json")["data_position"]["rows"]["a"], second["sources"]["a"]["chunks"]
    assert size < 16 and second["start"]["rows"]["a"] == -(-read * size // 16)


def test_a_checkpoint_of_another_step_is_refused(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    at = checkpoint(tmp_path / "c4", run_stage(order.STAGE, order_config(), inputs), 4)
    with pytest.raises(AtomError, match="stands after step 4 of pretrain, and the order was to begin with step 9"):
        run_stage(order.STAGE, order_config(first_step=9), {**inputs, "continue": at})
