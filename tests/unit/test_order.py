"""The data order: exact shares, every token once an epoch, looked up without the corpus."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact, write_manifest
from stages.data import order
from stages.data.chunks import chunk
from stages.data.row_draw import apportion
from stages.data.seeds import permutation
from stages.data.table import TOKENIZED, write_rows


def tokens(folder: Path) -> Artifact:
    """Shards are absent on purpose: the order is made from the table of documents alone."""
    rows = []
    for source, lengths, loss_from in (("a", [5, 40, 9, 17, 2, 8, 33, 8], 0), ("b", [6] * 50, 3), ("empty", [1], 0)):
        for ordinal, length in enumerate(lengths):
            common = {"source": source, "split": "train", "content_hash": "", "license": "CC0-1.0", "bytes": 1}
            rows.append(
                {"id": f"{source}/{ordinal}", "ordinal": ordinal, "tokens": length, "loss_from": loss_from, **common}
            )
    common = {"source": "a", "split": "heldout", "content_hash": "", "license": "CC0-1.0", "bytes": 1}
    rows.append({"id": "a/held", "ordinal": 0, "tokens": 12, "loss_from": 0, **common})
    write_rows(folder / "documents.parquet", TOKENIZED, rows)
    return write_manifest(folder, "tokenize")


def config(**changes: Any) -> dict[str, Any]:
    mix = {"a": 0.75, "b": 0.25}
    return {"phase": "pretrain", "mix": mix, "sequence_length": 8, "rows": 5, "steps": 20, "seed": 0, **changes}


def test_shares_are_exact_and_every_chunk_comes_once_an_epoch(tmp_path: Path, run_stage: Any) -> None:
    artifact = run_stage(order.STAGE, config(), {"tokens": tokens(tmp_path / "t")})
    rows = pq.read_table(artifact / "order.parquet").to_pylist()
    assert [(r["step"], r["row"], r["segment"]) for r in rows] == [(s, r, 0) for s in range(1, 21) for r in range(5)]
    assert Counter(r["source"] for r in rows) == {"a": 75, "b": 25}
    meta = artifact.json("meta.json")
    assert meta["sources"]["a"]["rows"] == 75 and meta["sources"]["b"]["documents_seen"] == 25
    assert meta["tokens"] == sum(r["length"] - 1 for r in rows)
    chunks = [(r["id"], r["offset"]) for r in rows if r["source"] == "a"]
    size = meta["sources"]["a"]["chunks"]
    assert size == 1 + 5 + 1 + 2 + 1 + 1 + 4 + 1
    first, second = chunks[:size], chunks[size : 2 * size]
    assert set(first) == set(second) and len(set(first)) == size and first != second
    assert "a/held" not in {r["id"] for r in rows}
    assert all(r["length"] <= 9 and r["loss_from"] == (2 if r["source"] == "b" else 0) for r in rows)


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 300), loss_from=st.integers(0, 60), sequence_length=st.integers(2, 40))
def test_chunks_make_every_token_a_target_once(length: int, loss_from: int, sequence_length: int) -> None:
    targets = []
    for offset, n, silent in chunk(length, loss_from, sequence_length):
        assert 2 <= n <= sequence_length + 1 and 0 <= silent < n - 1
        targets += range(offset + 1 + silent, offset + n)
    assert targets == list(range(max(1, loss_from), length))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    digest = run_stage(order.STAGE, config(), inputs).digest
    assert run_stage(order.STAGE, config(), inputs).digest == digest
    assert run_stage(order.STAGE, config(seed=1), inputs).digest != digest
    assert permutation(6, "fixed", 7).tolist() == [2, 5, 1, 0, 3, 4]
    assert sorted(permutation(1000, "x", 0).tolist()) == list(range(1000))


def test_look_up_by_step_and_by_document(tmp_path: Path, run_stage: Any) -> None:
    artifact = run_stage(order.STAGE, config(), {"tokens": tokens(tmp_path / "t")})
    step = order.documents_of_step(artifact.path, 7)
    assert step["row"].to_pylist() == [0, 1, 2, 3, 4]
    name = step["id"][0].as_py()
    assert 7 in order.steps_of_document(artifact.path, name)["step"].to_pylist()
    assert len(order.steps_of_document(artifact / "order.parquet", "none")) == 0
    assert len(order.documents_of_step(artifact.path, 21)) == 0


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ({"a": 0.5, "c": 0.5}, r"source c, of which curation left no document \(it left a, b, empty\)"),
        ({"a": 0.5, "b": 0.4}, "sum to 0.9"),
        ({"a": 0.5, "empty": 0.5}, "empty has no training tokens"),
    ],
)
def test_a_wrong_mix_is_refused(tmp_path: Path, run_stage: Any, mix: dict[str, float], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        run_stage(order.STAGE, config(mix=mix), {"tokens": tokens(tmp_path / "t")})


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "order.parquet"
    with pytest.raises(AtomError, match="is missing"):
        order.documents_of_step(path, 1)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(AtomError, match=r"order\.parquet cannot be read"):
        order.documents_of_step(path, 1)


@given(shares=st.lists(st.integers(1, 50), min_size=1, max_size=6), total=st.integers(0, 5000))
def test_apportionment_is_exact(shares: list[int], total: int) -> None:
    mix = {f"s{i}": share / sum(shares) for i, share in enumerate(shares)}
    counts = apportion(mix, total)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - mix[name] * total) < 1 + 1e-6 for name in mix)


def test_a_growing_batch_changes_the_size_of_steps_alone(tmp_path: Path, run_stage: Any) -> None:
    """The rows come in the order of an even phase of as many rows; only where steps end is another."""
    inputs = {"tokens": tokens(tmp_path / "t")}
    artifact = run_stage(order.STAGE, config(ramp=[[4, 2], [8, 3]], steps=24, rows=5), inputs)
    rows = pq.read_table(artifact / "order.parquet").to_pylist()
    sizes = [2] * 4 + [3] * 4 + [5] * 16
    assert [(r["step"], r["row"]) for r in rows] == [(s, r) for s, n in enumerate(sizes, 1) for r in range(n)]
    even = run_stage(order.STAGE, config(steps=sum(sizes), rows=1), inputs)
    assert [(r["id"], r["offset"]) for r in rows] == [
        (r["id"], r["offset"]) for r in pq.read_table(even / "order.parquet").to_pylist()
    ]
    assert artifact.json("meta.json")["ramp"] == [[4, 2], [8, 3]] and "ramp" not in even.json("meta.json")


def test_a_growing_batch_goes_on_from_a_checkpoint(tmp_path: Path, run_stage: Any) -> None:
    inputs, ramp = {"tokens": tokens(tmp_path / "t")}, [[4, 2], [8, 3]]
    artifact = run_stage(order.STAGE, config(ramp=ramp), inputs)
    table = pq.read_table(artifact / "order.parquet").to_pylist()
    read = {name: sum(r["source"] == name and r["step"] <= 6 for r in table) for name in ("a", "b")}
    state = {"phase": "pretrain", "step": 6, "data_position": order.position(artifact.json("meta.json"), read, 6)}
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/state.json").write_text(json.dumps(state))
    inputs["continue"] = write_manifest(tmp_path / "checkpoint", "pretrain@6")
    rest = run_stage(order.STAGE, config(ramp=ramp, first_step=7), inputs)
    assert pq.read_table(rest / "order.parquet").to_pylist() == [r for r in table if r["step"] > 6]
