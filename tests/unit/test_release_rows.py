"""Rows of large tables in bounded memory: cursors, repeated ids, distinct numbers, selected rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import AtomError
from release.checks import documents
from release.checks.documents import Rows, repeated_ids
from release.facts.data_facts import BYTES, Distinct
from release.tracing.release_data import select_rows

NUMBERS = st.lists(st.integers(0, 2**62 - 1) | st.integers(0, 9000), max_size=60)


@given(st.lists(NUMBERS, max_size=6))
def test_distinct_numbers_are_counted(batches: list[list[int]]) -> None:
    distinct = Distinct()
    for batch in batches:
        distinct.add(np.array(batch, np.int64))
    assert distinct.count() == len({number for batch in batches for number in batch})


def test_a_million_neighbors_take_a_bit_each() -> None:
    distinct, numbers = Distinct(), np.random.default_rng(0).permutation(1_000_000)
    for part in np.array_split(numbers, 20):
        distinct.add(part)
        distinct.add(part[::7] + (1 << 40))
    assert distinct.count() == 2_000_000 - sum(len(part) - len(part[::7]) for part in np.array_split(numbers, 20))
    assert distinct._bits.nbytes < 1_000_000 and BYTES == 512


def write_ids(folder: Path, parts: list[list[str]]) -> list[Path]:
    files = [folder / f"part-{number:05d}.parquet" for number in range(len(parts))]
    for path, ids in zip(files, parts, strict=True):
        pq.write_table(pa.table({"id": pa.array(ids, pa.string())}), path)
    return files


def test_ids_that_occur_twice_are_found(tmp_path: Path) -> None:
    ids = [f"a/{number}" for number in range(60)]
    files = write_ids(tmp_path, [ids[:30], [], [*ids[30:], "a/7"], ["a/59", "a/7", "b"]])
    assert list(repeated_ids(files)) == [(files[2], "a/7"), (files[3], "a/59"), (files[3], "a/7")]
    assert list(repeated_ids(files[:2])) == []
    assert len(list(repeated_ids(write_ids(tmp_path, [["x"] * 50])))) == 49


def test_equal_hashes_of_different_ids_are_no_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "hash", lambda id: len(id), raising=False)
    files = write_ids(tmp_path, [["aa", "bb", "c"], ["dd", "aa"]])
    assert list(repeated_ids(files)) == [(files[1], "aa")]


def test_the_next_rows_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BATCH", 4)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [str(n) for n in range(30)], "kind": ["xyz"[n % 3] for n in range(30)]}), path)
    cursor = Rows(path, ["id"], {"kind": "y"})
    assert [cursor.take(n)["id"].to_pylist() for n in (0, 1, 5, 9)] == [
        [], ["1"], ["4", "7", "10", "13", "16"], ["19", "22", "25", "28"],
    ]  # fmt: skip
    assert cursor.next() is None and Rows(tmp_path / "none.parquet", ["id"]).next() is None


FILTERS = [
    [("id", "=", "b/07")], [("id", "in", ["b/07", "a/00", "no"])], [("step", ">=", 5), ("step", "<=", 6)],
    [("id", "in", ["b/07"]), ("step", "=", 3)], [("id", "in", [])], [("id", "=", "zz")], [],
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_selected_rows_are_those_of_a_scan(filters: list[tuple[str, str, Any]], tmp_path: Path) -> None:
    table = [{"id": f"{'ab'[n % 2]}/{n:02d}", "step": n // 3, "text": f"text {n}"} for n in range(40)]
    files = [tmp_path / f"part-{part:05d}.parquet" for part in range(3)]
    for part, path in enumerate(files):
        pq.write_table(pa.Table.from_pylist(table[part * 15 : part * 15 + 15]), path, row_group_size=4)
    compare = {
        "=": lambda left, right: left == right, "in": lambda left, right: left in right,
        "<=": lambda left, right: left <= right, ">=": lambda left, right: left >= right,
    }  # fmt: skip
    expected = [row for row in table if all(compare[how](row[name], value) for name, how, value in filters)]
    if filters:
        assert select_rows(files, ["text", "id"], *filters) == [
            {"text": row["text"], "id": row["id"]} for row in expected
        ]
    with pytest.raises(AtomError, match="part-00000.parquet has no column other"):
        select_rows(files[0], ["other"], ("id", "=", "a/00"))
    files[1].write_bytes(files[1].read_bytes()[:-9])
    with pytest.raises(AtomError, match="part-00001.parquet cannot be read as Parquet"):
        select_rows(files[1], ["id"], ("id", "=", "a/00"))
