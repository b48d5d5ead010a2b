"""Held-out documents are drawn by their content hash within a bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from pipeline.core.parts import part_file, part_slice
from stages.evaluation import bits_per_byte
from stages.formats import table

COUNT = 40


def rows_of(source: str) -> list[dict[str, Any]]:
    """Documents of which every second one is held out, and every third one begins with a prompt."""
    return [
        {
            "id": f"{source}/{n}",
            "text": f"{source} {n} " + "x" * 100,
            "source": source,
            "license": "CC0-1.0",
            "origin": "test",
            "content_hash": table.content_hash(f"{source} {n}"),
            "prompt_chars": 5 if n % 3 == 0 else 0,
            "split": "heldout" if n % 2 else "train",
        }
        for n in range(COUNT)
    ]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(table, "ROWS_PER_GROUP", 4)
    for source in ("code", "prose"):
        rows = rows_of(source)
        for part in range(3):
            path = tmp_path / source / part_file(part)
            table.write_rows(path, table.KEPT, rows[part_slice(COUNT, part, 3)])
    return tmp_path


def lottery(sources: list[str], prompts: bool) -> list[dict[str, Any]]:
    rows = [row for source in sources for row in rows_of(source) if row["split"] == "heldout"]
    rows = [row for row in rows if prompts or not row["prompt_chars"]]
    return sorted(rows, key=lambda row: row["content_hash"])


def test_the_smallest_hashes_of_each_source_are_drawn(kept: Path) -> None:
    expected = [
        row["id"]
        for source in ("code", "prose")
        for row in sorted(lottery([source], prompts=True)[:5], key=lambda row: row["id"])
    ]
    assert [row["id"] for row in bits_per_byte.heldout_documents(kept, 5)] == expected
    assert len(bits_per_byte.heldout_documents(kept, 1000)) == COUNT


def test_texts_of_all_sources_in_the_order_of_the_lottery(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lottery(["code", "prose"], prompts=False)
    assert [row["text"] for row in bits_per_byte.heldout_texts(kept)] == [row["text"] for row in expected]
    monkeypatch.setattr(bits_per_byte, "MOST_BYTES", 600)  # the sixth document passes it
    assert [row["id"] for row in bits_per_byte.heldout_texts(kept)] == [row["id"] for row in expected[:6]]
    monkeypatch.setattr(bits_per_byte, "MOST_DOCUMENTS", 4)
    assert [row["id"] for row in bits_per_byte.heldout_texts(kept)] == [row["id"] for row in expected[:4]]


def test_one_held_out_document_gives_no_error_bar(tmp_path: Path) -> None:
    rows = [row for row in rows_of("prose") if row["split"] == "train" or row["id"] == "prose/7"]
    table.write_rows(tmp_path / "prose" / part_file(0), table.KEPT, rows)
    with pytest.raises(AtomError, match="source prose has 1 held-out document, two are needed"):
        bits_per_byte.heldout_documents(tmp_path, 5)
