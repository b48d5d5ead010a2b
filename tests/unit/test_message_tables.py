"""Tables of messages: part by part, in one process or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from release import layout
from release.facts import message_tables
from release.layout import over_parts
from stages.formats import chat
from stages.formats.table import KEPT, write_rows

ASK, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TALKS: list[list[dict[str, Any]]] = [
    [ASK, ANSWER],
    [{"role": "system", "content": "Be brief."}, ASK, {**ANSWER, "reasoning_content": "two and two"}],
    [{"role": "system", "content": " "}, ASK, ANSWER],
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def write_dataset(folder: Path, parts: int = 3) -> Path:
    """Each part has the conversations of TALKS, and one with a tool in the split `heldout`."""
    for number in range(parts):
        texts = [text for talk in TALKS for text, _ in chat.turns(talk)]
        (with_tool,) = (text for text, _ in chat.turns([ASK, ANSWER], [TOOL]))
        rows = [
            dict.fromkeys(KEPT, "") | {"id": f"talk/{number}-{n}", "text": text, "split": split, "prompt_chars": 0}
            for n, (text, split) in enumerate([*((text, "train") for text in texts), (with_tool, "heldout")])
        ]
        write_rows(folder / f"kept/talk/part-{number:05d}.parquet", KEPT, rows)
    (folder / "sources").mkdir()
    (folder / "sources/talk.json").write_text(json.dumps({"kind": "chat"}))
    return folder


def tables_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("messages/**/*.parquet"))
    }


def test_the_tables_have_the_messages_of_what_was_kept(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    assert len(list(message_tables.write_messages(dataset))) == 6
    assert list(message_tables.problems(dataset)) == []
    path = dataset / "messages/talk/train/part-00001.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    (problem,) = message_tables.problems(dataset)
    assert problem.endswith("part-00001.parquet: talk/1-0 has other messages")


def test_several_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, together = write_dataset(tmp_path / "alone"), write_dataset(tmp_path / "together")
    list(message_tables.write_messages(alone))
    monkeypatch.setattr(layout, "MOST_ALONE", 0)
    monkeypatch.setattr(layout, "cores", lambda: 2)
    list(message_tables.write_messages(together))
    assert tables_of(alone) == tables_of(together)
    (together / "messages/talk/heldout/part-00002.parquet").unlink()
    assert list(message_tables.problems(together)) == ["messages/talk/heldout/part-00002.parquet is missing"]


def test_an_error_in_a_process_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MOST_ALONE", -1)
    monkeypatch.setattr(layout, "cores", lambda: 2)
    with pytest.raises(FileNotFoundError):
        list(over_parts(Path.read_bytes, [tmp_path / "a", tmp_path / "b"], []))
