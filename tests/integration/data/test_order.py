"""The data order: exact shares, every token once an epoch, looked up without the corpus."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import sha256_file, write_manifest
from pipeline.hub.client import FOLDER_FILES
from release.checks.order import segments
from release.opened_release import Release
from stages.data.order import order_stage
from stages.data.order.chunks import ALL, ChunkIndex, Cut, Permutation, seal_index
from stages.data.order.computed_order import ComputedOrder, read_indexes
from stages.data.order.order_config import DataCursor, OrderConfig
from stages.data.order.packing import SourceDraw, apportion
from stages.formats.seeds import permutation
from stages.formats.table import order_files, read_table
from tests.fixtures.order_fixtures import config, tokens
from tests.fixtures.train_fixtures import Reporter

FIXED = [3, 7, 2, 9, 6, 1, 0, 5, 8, 4]


def test_shares_are_exact_and_every_chunk_comes_once_an_epoch(tmp_path: Path, run_stage: Any) -> None:
    artifact = run_stage(order_stage.STAGE, config(), {"tokens": tokens(tmp_path / "t")})
    rows = pq.read_table(artifact / "part-00000.parquet").to_pylist()
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
    """Of a document with a prompt, every token of the first row: later ones would have lost the prompt."""
    (first,), _, (end,) = Cut(sequence_length).ranges(np.array([length]), np.array([loss_from]))
    targets = []
    for offset in range(first * sequence_length, end * sequence_length, sequence_length):
        n = min(sequence_length + 1, length - offset)
        silent = min(max(loss_from - offset - 1, 0), n - 1)
        assert 2 <= n <= sequence_length + 1 and 0 <= silent < n - 1
        targets += range(offset + 1 + silent, offset + n)
    seen = length if loss_from == 0 else min(length, sequence_length + 1)
    assert targets == list(range(max(1, loss_from), seen))


def test_what_has_lost_its_prompt_is_left_out_and_counted(tmp_path: Path, run_stage: Any) -> None:
    artifact = tokens(tmp_path / "t", [6, 9, 10, 40])
    out, reporter = tmp_path / "out", Reporter()
    out.mkdir()
    order_stage.run(OrderConfig.model_validate(config()), {"tokens": artifact}, tmp_path / "work", out, reporter)
    rows = [row for row in pq.read_table(out / "part-00000.parquet").to_pylist() if row["source"] == "b"]
    assert {(row["id"], row["offset"], row["length"]) for row in rows} == {
        ("b/0", 0, 6), ("b/1", 0, 9), ("b/2", 0, 9), ("b/3", 0, 9)
    }  # fmt: skip
    (note,) = (text for text in reporter.notes if "prompt" in text)
    assert note.startswith("b: 2 documents with a prompt are longer than a row")


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    digest = run_stage(order_stage.STAGE, config(), inputs).digest
    assert run_stage(order_stage.STAGE, config(), inputs).digest == digest
    assert run_stage(order_stage.STAGE, config(seed=1), inputs).digest != digest
    assert permutation(6, "fixed", 7).tolist() == [2, 5, 1, 0, 3, 4]
    assert sorted(permutation(1000, "x", 0).tolist()) == list(range(1000))


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
        run_stage(order_stage.STAGE, config(mix=mix), {"tokens": tokens(tmp_path / "t")})


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "order.parquet"
    with pytest.raises(AtomError, match="is missing"):
        read_table(path)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(AtomError, match=r"order\.parquet cannot be read"):
        read_table(path)


@given(shares=st.lists(st.integers(1, 50), min_size=1, max_size=6), total=st.integers(0, 5000))
def test_apportionment_is_exact(shares: list[int], total: int) -> None:
    mix = {f"s{i}": share / sum(shares) for i, share in enumerate(shares)}
    counts = apportion(mix, total)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - mix[name] * total) < 1 + 1e-6 for name in mix)


def test_a_growing_batch_changes_the_size_of_steps_alone(tmp_path: Path, run_stage: Any) -> None:
    """The rows come in the order of an even phase of as many rows; only where steps end is another."""
    inputs = {"tokens": tokens(tmp_path / "t")}
    artifact = run_stage(order_stage.STAGE, config(ramp=[[4, 2], [8, 3]], steps=24, rows=5), inputs)
    rows = pq.read_table(artifact / "part-00000.parquet").to_pylist()
    sizes = [2] * 4 + [3] * 4 + [5] * 16
    assert [(r["step"], r["row"]) for r in rows] == [(s, r) for s, n in enumerate(sizes, 1) for r in range(n)]
    even = run_stage(order_stage.STAGE, config(steps=sum(sizes), rows=1), inputs)
    assert [(r["id"], r["offset"]) for r in rows] == [
        (r["id"], r["offset"]) for r in pq.read_table(even / "part-00000.parquet").to_pylist()
    ]
    assert artifact.json("meta.json")["ramp"] == [[4, 2], [8, 3]] and "ramp" not in even.json("meta.json")


def test_a_growing_batch_goes_on_from_a_checkpoint(tmp_path: Path, run_stage: Any) -> None:
    inputs, ramp = {"tokens": tokens(tmp_path / "t")}, [[4, 2], [8, 3]]
    artifact = run_stage(order_stage.STAGE, config(ramp=ramp), inputs)
    table = pq.read_table(artifact / "part-00000.parquet").to_pylist()
    read = {name: sum(r["source"] == name and r["step"] <= 6 for r in table) for name in ("a", "b")}
    state = {"phase": "pretrain", "step": 6, "data_position": order_stage.position(artifact.json("meta.json"), read, 6)}
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/state.json").write_text(json.dumps(state))
    inputs["continue"] = write_manifest(tmp_path / "checkpoint", "pretrain@6")
    rest = run_stage(order_stage.STAGE, config(ramp=ramp, first_step=7), inputs)
    assert pq.read_table(rest / "part-00000.parquet").to_pylist() == [r for r in table if r["step"] > 6]


@settings(max_examples=150, deadline=None)
@given(n=st.one_of(st.integers(1, 300), st.integers(1, 1 << 40)), label=st.text(max_size=3), seed=st.integers(0, 9))
def test_a_permutation_and_its_inverse(n: int, label: str, seed: int) -> None:
    permuted = Permutation(n, label, seed)
    indices = np.arange(n) if n <= 300 else np.unique(np.linspace(0, n - 1, 100).astype(np.int64))
    images = permuted(indices)
    assert images.min() >= 0 and images.max() < n and len(np.unique(images)) == len(indices)
    assert np.array_equal(permuted.inverse(images), indices)


def test_permutations_are_fixed_and_mix_well() -> None:
    assert Permutation(10, "fixed", 7)(np.arange(10)).tolist() == FIXED
    with pytest.raises(ValueError, match="outside of 0..9"):
        Permutation(10, "fixed", 7)(np.array([10]))
    for n in (0, (1 << 40) + 1):
        with pytest.raises(ValueError, match="from 1 to 2\\^40"):
            Permutation(n, "", 0)
    # chi-squared of the places of each index, and of pairs, over 2,000 seeds: its expectation is 1 a degree of freedom
    n, seeds = 8, 2000
    images = np.stack([Permutation(n, "mix", seed)(np.arange(n)) for seed in range(seeds)])
    counts = np.stack([np.bincount(images[:, index], minlength=n) for index in range(n)])
    assert ((counts - seeds / n) ** 2 / (seeds / n)).sum() / (n - 1) ** 2 < 1.5
    pairs = np.bincount(images[:, 2] * n + images[:, 3], minlength=n * n).reshape(n, n)[~np.eye(n, dtype=bool)]
    assert ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum() / (len(pairs) - 1) < 1.5
    # neighbors do not stay neighbors, and the order is no trend
    images = Permutation(100_000, "mix", 0)(np.arange(100_000))
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(images, np.arange(100_000))[0, 1]) < 0.02


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    rows=st.integers(1, 30_000),
    cuts=st.lists(st.integers(0, 30_000), min_size=2, max_size=2),
)
def test_rows_of_sources_in_both_directions(shares: list[int], rows: int, cuts: list[int]) -> None:
    mix = {f"s{i}": share / sum(shares) for i, share in enumerate(shares)}
    draw = SourceDraw(mix, rows, "draw", 0)
    sources, places = draw.read(0, rows)
    assert np.bincount(sources, minlength=len(mix)).tolist() == [apportion(mix, rows)[name] for name in sorted(mix)]
    for source in range(len(mix)):
        assert np.array_equal(places[sources == source], np.arange(draw.totals[source]))
        assert draw.row(source, draw.totals[source]) is None
    first, end = sorted(min(cut, rows) for cut in cuts)
    part = draw.read(first, end)
    assert np.array_equal(part[0], sources[first:end]) and np.array_equal(part[1], places[first:end])
    for row in (first, rows - 1):
        if row < rows:
            assert draw.row(int(sources[row]), int(places[row])) == row


@pytest.mark.parametrize("steps", [1, 8_999, 9_001, 360_000, 3_000_000])
def test_the_parts_of_a_long_phase_fit_in_a_folder_of_the_hub(steps: int) -> None:
    parsed = OrderConfig.model_validate(config(rows=4096, sequence_length=4096, steps=steps))
    last = parsed.steps_of_block(parsed.blocks - 1)
    assert parsed.blocks < FOLDER_FILES and len(last) and last.stop == steps + 1


PACKED = {"pack": True, "sequence_length": 16, "rows": 4, "block_rows": 20}
LOOKED_UP = [
    {"block_rows": 15},
    {"ramp": [[4, 2], [8, 3]], "block_rows": 1},
    PACKED,
    {**PACKED, "ramp": [[3, 2]], "long_documents": {"over": 8, "share": 0.5, "max_epochs": 50.0}},
]


@pytest.mark.parametrize("changes", LOOKED_UP)
def test_functions_agree_with_the_table(tmp_path: Path, run_stage: Any, changes: dict[str, Any]) -> None:
    """Steps and documents are looked up in both directions without the table, and tell what is in it."""
    inputs = {"tokens": tokens(tmp_path / "t")}
    artifact = run_stage(order_stage.STAGE, config(**changes), inputs)
    files = order_files(artifact.path)
    parsed = OrderConfig.model_validate(config(**changes))
    assert len(files) == parsed.blocks > 1 and len(artifact.json("meta.json")["parts"]) == len(files)
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    keys = [(row["step"], row["row"], row["segment"]) for row in rows]
    assert keys == sorted(set(keys)) and {key[:2] for key in keys} == {
        (step, row) for step in range(1, 21) for row in range(parsed.rows_of(step, step)[0])
    }
    for part, file in zip(artifact.json("meta.json")["parts"], files, strict=True):
        steps = pq.read_table(file)["step"].to_pylist()
        assert (part["first_step"], part["last_step"]) == (steps[0], steps[-1])
        assert part["sha256"] == sha256_file(file)
    indexes = read_indexes(parsed, inputs["tokens"].path, tmp_path / "work")
    computed = ComputedOrder(parsed, indexes, DataCursor(1, parsed.seed), tmp_path / "work")
    for step in (1, 2, 7, 13, 20):
        assert computed.documents_of(step).to_pylist() == [row for row in rows if row["step"] == step]
    for source, part, ordinal in {(row["source"], row["part"], row["ordinal"]) for row in rows}:
        brute_force = {r["step"] for r in rows if (r["source"], r["part"], r["ordinal"]) == (source, part, ordinal)}
        assert computed.steps_of(source, part, ordinal) == sorted(brute_force)
    with pytest.raises(AtomError, match="part 1 has no training document 999"):
        computed.steps_of("b", 1, 999)
    with pytest.raises(ValueError, match="steps 1 to 20"):
        computed.documents_of(21)


@pytest.mark.parametrize("changes", LOOKED_UP)
def test_parts_are_the_same_from_any_process_in_any_order(
    tmp_path: Path, run_stage: Any, changes: dict[str, Any]
) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    alone = run_stage(order_stage.STAGE, config(**changes), inputs)
    parsed, work, out = OrderConfig.model_validate(config(**changes)), tmp_path / "work", tmp_path / "out"
    for shard in [*range(2, order_stage.STAGE.shards(parsed), 2), 0]:  # the others are left to `run`
        order_stage.run_shard(parsed, inputs, work, shard)
    (work / "blocks/00000/part-00000.parquet").write_bytes(b"cut short")
    out.mkdir()
    order_stage.run(parsed, inputs, work, out, Reporter())
    assert write_manifest(out, "order").digest == alone.digest


@pytest.mark.parametrize("changes", LOOKED_UP)
def test_batches_and_sums_leave_no_trace(
    tmp_path: Path, run_stage: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    digest = run_stage(order_stage.STAGE, config(**changes), inputs).digest
    for name, value in (("chunks.BATCH", 3), ("chunks.RUN", 6), ("chunks.STRIDE", 2)):
        monkeypatch.setattr(f"stages.data.order.{name}", value)
    assert run_stage(order_stage.STAGE, config(**changes), inputs).digest == digest


@pytest.mark.parametrize("changes", LOOKED_UP[:3])
@pytest.mark.parametrize("step", [5, 6])
def test_a_phase_of_many_parts_goes_on(tmp_path: Path, run_stage: Any, changes: dict[str, Any], step: int) -> None:
    """Unchanged, with the rows that were to come; with another mix, with no chunk of the epochs that it is in."""
    inputs = {"tokens": tokens(tmp_path / "t")}
    first = run_stage(order_stage.STAGE, config(**changes), inputs)
    rows = [row for file in order_files(first.path) for row in pq.read_table(file).to_pylist()]
    read = Counter(row["source"] for row in rows if row["step"] <= step)
    place = order_stage.position(first.json("meta.json"), read, step)
    write_state(tmp_path / "checkpoint", {"phase": "pretrain", "step": step, "data_position": place})
    inputs["continue"] = write_manifest(tmp_path / "checkpoint", f"pretrain@{step}")
    rest = run_stage(order_stage.STAGE, config(**changes, first_step=step + 1), inputs)
    later = [row for file in order_files(rest.path) for row in pq.read_table(file).to_pylist()]
    assert later == [row for row in rows if row["step"] > step]

    other = run_stage(
        order_stage.STAGE, config(**{**changes, "mix": {"a": 0.3, "b": 0.7}}, first_step=step + 1), inputs
    )
    meta = other.json("meta.json")
    assert meta["walk"]["first_step"] == step + 1
    later = [row for file in order_files(other.path) for row in pq.read_table(file).to_pylist()]
    for source in ("a", "b"):
        chunks = meta["sources"][source]["chunks"]
        before = [(r["id"], r["offset"]) for r in rows if r["source"] == source and r["step"] <= step]
        first_position = meta["walk"]["rows"][source]
        if not changes.get("pack"):
            assert first_position == len(before)
            epoch = [(r["id"], r["offset"]) for r in later if r["source"] == source][: -len(before) % chunks]
            assert not set(epoch) & set(before[len(before) // chunks * chunks :])
        else:  # chunks of the block in which the step is count as read
            assert first_position >= len(before)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("changes", LOOKED_UP)
def test_the_verifier_computes_an_order_again(tmp_path: Path, run_stage: Any, changes: dict[str, Any]) -> None:
    artifact = run_stage(order_stage.STAGE, config(**changes), {"tokens": tokens(tmp_path / "dataset/tokens")})
    folder = tmp_path / "dataset/order/pretrain"
    original = shutil.copytree(artifact.path, folder)

    def problems(**meta: Any) -> list[str]:
        (folder / "meta.json").write_text(json.dumps(artifact.json("meta.json") | meta))
        return segments(Release(tmp_path / "dataset", "dataset")).problems

    assert problems() == []
    files = order_files(folder)
    assert "another function" in problems(function=artifact.json("meta.json")["function"] | {"block_steps": 999})[0]
    assert "merkle_root" in problems(merkle_root="0" * 64)[0]
    differs = problems(seed=1)
    assert differs and all("rows that the function" in text or "other place" in text for text in differs), differs
    other = run_stage(order_stage.STAGE, config(**changes, seed=1), {"tokens": tokens(tmp_path / "t")})
    for file, another in zip(files, order_files(other.path), strict=True):
        shutil.copyfile(another, file)
    assert "differs from the rows that the function of the order gives" in problems()[0]
    files[-1].unlink()  # the function alone is no published order
    assert "its files are not the parts part-00000.parquet to" in problems()[0]
    shutil.copytree(artifact.path, original, dirs_exist_ok=True)
    if changes.get("pack"):
        parts = artifact.json("meta.json")["parts"]
        name, (position, targets) = next(iter(parts[1]["start"].items()))
        parts[1]["start"][name] = [position + 1, targets]
        assert "another place" in problems(parts=parts)[0]
    first = pq.read_table(files[0])
    for column, value, words in (
        ("ordinal", 25, "which is no training document"),
        ("id", "a/held", "a/held, which is no training document"),
        ("length", 400, "reaches beyond the end of"),
        ("step", 0, "is out of order or doubled"),
    ):
        index, rows = first.schema.get_field_index(column), first[column].to_pylist()
        rows[1] = value
        pq.write_table(first.set_column(index, column, pa.array(rows, first.schema.field(index).type)), files[0])
        assert any(words in text for text in problems()), (column, problems())


@pytest.mark.parametrize("changes", [{"block_rows": 1}, {**PACKED, "block_rows": 4}])
def test_a_sample_of_many_blocks_is_computed_again(
    tmp_path: Path, run_stage: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the places in the streams that meta.json states, without sums over the streams."""
    artifact = run_stage(order_stage.STAGE, config(**changes), {"tokens": tokens(tmp_path / "dataset/tokens")})
    folder = tmp_path / "dataset/order/pretrain"
    shutil.copytree(artifact.path, folder)
    blocks, block = [], ComputedOrder.block
    monkeypatch.setattr(ComputedOrder, "block", lambda self, n: blocks.append(n) or block(self, n))
    monkeypatch.setattr("stages.data.order.chunks.Stream.sums", None)
    check = partial(segments, Release(tmp_path / "dataset", "dataset"))
    assert check().problems == [] and len(set(blocks)) == 8 < len(order_files(folder))
    if changes.get("pack"):
        meta = artifact.json("meta.json")
        for part in meta["parts"][1:]:  # a chunk earlier everywhere, in places and in tokens
            name, (position, targets) = next(iter(part["start"].items()))
            part["start"][name] = [position + 40, targets + 400]
        (folder / "meta.json").write_text(json.dumps(meta))
        problems = check().problems
        assert problems and all("too early or too late in a" in text or "tokens of a" in text for text in problems)


def test_a_billion_chunks_are_looked_up_in_both_directions(tmp_path: Path) -> None:
    """The index of one part stands for each of 2,000: 1.2 billion chunks of half a billion documents."""
    count, parts = 250_000, 2000
    lengths = np.tile(np.array([9, 17, 30, 3], np.int32), count // 4)  # 1, 2, 4 and 1 chunks
    columns = {
        "source": np.repeat("a", count), "split": np.repeat("train", count), "ordinal": np.arange(count),
        "id": np.arange(count).astype(str), "tokens": lengths, "loss_from": np.zeros(count, np.int32),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "documents.parquet")
    parsed = OrderConfig.model_validate(config(mix={"a": 1.0}, rows=512, steps=3_000_000))
    cut = Cut(parsed.sequence_length)
    part = seal_index(tmp_path, tmp_path / "documents.parquet", "a", 0, cut)
    index = ChunkIndex([(number, part) for number in range(parts)], cut)
    computed = ComputedOrder(parsed, {"a": index}, DataCursor(1, 0), tmp_path)
    assert index.chunks == 10**9
    assert sum(array.nbytes for array in (index.place, index.batch, index.documents, index.starts[ALL])) < 10**6
    for step in (1, 1_953_125, 1_953_126, 3_000_000):  # the first epoch ends in between
        table = computed.documents_of(step)
        assert table["row"].to_pylist() == list(range(512)) and set(table["length"].to_pylist()) <= {3, 6, 9}
        row = table.slice(100, 1).to_pylist()[0]
        assert row["id"] == str(row["ordinal"])
        steps = computed.steps_of("a", row["part"], row["ordinal"])
        assert step in steps
        where = [computed.documents_of(n).to_pylist() for n in steps]
        assert all(any((r["part"], r["ordinal"]) == (row["part"], row["ordinal"]) for r in rows) for rows in where)
