"""Titles and authors from the rows of a source to the attribution tables of a release, and out of them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import AtomError
from pipeline.core.parts import part_file
from release.assembly.assemble import write_attribution
from release.retraction.rewrite import Reached, rewrite
from stages.data.acquire import acquire_stage
from stages.data.acquire.readers.row_files import MOST_CHARACTERS, _names
from stages.data.acquire.sources import Source, resolve_tree_digest
from stages.formats.table import DOCUMENTS, KEPT, content_hash, read_table, stream_rows, write_rows

ROWS = [
    {"title": " On\n gardens ", "by": [{"name": "A. Alder"}, {"name": "B. Birch"}], "rights": "CC-BY-4.0", "url": "https://a.example/1"},
    {"title": "Removed", "by": [{"name": "C. Cedar"}], "rights": "CC-BY-4.0", "url": ""},
    {"title": 7, "by": None, "rights": "CC-BY-SA-4.0", "url": None},
    {"title": "Free", "by": [{"name": "D. Dune"}], "rights": "CC0-1.0", "url": "https://a.example/4"},
    {"by": [{"name": "E. Elm"}], "rights": "MIT", "url": "https://a.example/5"},
]  # fmt: skip
EXPECTED = [
    ("web/f.jsonl:1", "CC-BY-4.0", "On gardens", "A. Alder; B. Birch", "https://a.example/1"),
    ("web/f.jsonl:3", "CC-BY-SA-4.0", None, None, "a corpus#f.jsonl"),
    ("web/f.jsonl:5", "MIT", None, "E. Elm", "https://a.example/5"),
]
"""The known answer: without the second, which deduplication removed, and the fourth, whose license asks for nothing."""


def acquired(folder: Path, run_stage: Any, **fields: str) -> Any:
    (folder / "f.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n}", **row}) + "\n" for n, row in enumerate(ROWS))
    )
    reader = {
        "reader": "jsonl",
        "path": str(folder / "f.jsonl"),
        "license_field": "rights",
        "url_field": "url",
        **fields,
    }
    source = {"name": "web", "kind": "prose", "license": "LicenseRef-by-document", "license_evidence": "here"}
    config = {**source, "origin": "a corpus", "reader": reader}
    digest = resolve_tree_digest(Source.model_validate(config))
    return run_stage(acquire_stage.STAGE, {"source": {**config, "tree_digest": digest}, "seed": 0}, {})


def write_kept(dataset: Path, artifact: Any) -> None:
    rows = [{**row, "split": "train"} for row in stream_rows(artifact / "documents" / part_file(0), list(DOCUMENTS))]
    write_rows(dataset / "kept/web" / part_file(0), KEPT, rows[:1] + rows[2:])
    public = {"id": "free/1", "text": "x", "source": "free", "license": "CC0-1.0", "origin": "", "prompt_chars": 0}
    free = {**public, "content_hash": content_hash("x"), "split": "train"}
    write_rows(dataset / "kept/free" / part_file(0), KEPT, [free])


def test_documents_that_ask_for_it_are_listed_with_what_their_source_states(tmp_path: Path, run_stage: Any) -> None:
    artifact = acquired(tmp_path, run_stage, title_field="title", author_field="by.name")
    write_kept(tmp_path / "release/dataset", artifact)
    (path,) = write_attribution(tmp_path / "release/dataset", {"web": artifact.path})
    assert path == tmp_path / "release/dataset/attribution/web" / part_file(0), "none of free"
    table = read_table(path)
    assert table.schema.names == ["id", "source", "license", "title", "author", "origin"]
    columns = ("id", "license", "title", "author", "origin")
    assert [tuple(row[name] for name in columns) for row in table.to_pylist()] == EXPECTED
    before = path.read_bytes()
    list(write_attribution(tmp_path / "release/dataset", {"web": artifact.path}))
    assert path.read_bytes() == before

    reached = Reached(kinds={"web/f.jsonl:3": "id"}, texts={"a text that is long enough, and in no table"})
    rewrite(tmp_path / "release", reached)
    assert [row["id"] for row in read_table(path).to_pylist()] == ["web/f.jsonl:1", "web/f.jsonl:5"], "taken back"


def test_a_source_that_states_neither_has_no_credits(tmp_path: Path, run_stage: Any) -> None:
    artifact = acquired(tmp_path, run_stage)
    assert not (artifact / "credits").exists()
    write_kept(tmp_path, artifact)
    (path,) = write_attribution(tmp_path, {"web": artifact.path})
    rows = read_table(path).to_pylist()
    assert [(row["id"], row["license"], row["origin"]) for row in rows] == [(e[0], e[1], e[4]) for e in EXPECTED]
    assert {row["title"] for row in rows} == {row["author"] for row in rows} == {None}


def test_credits_of_other_documents_are_refused(tmp_path: Path, run_stage: Any) -> None:
    artifact = acquired(tmp_path, run_stage, author_field="by.name")
    write_kept(tmp_path, artifact)
    credits = artifact / "credits" / part_file(0)
    assert [row["author"] for row in stream_rows(credits, ["author"])][1] == "C. Cedar", "a row for each document"
    pq.write_table(pq.read_table(credits).slice(3), credits)
    with pytest.raises(AtomError, match="no credits of document web/f.jsonl:1 are among those of part-00000.parquet"):
        list(write_attribution(tmp_path, {"web": artifact.path}))


def test_names_are_bounded_and_in_one_line() -> None:
    assert _names([" a\tb ", None, 3, "\ud800", "", "c"]) == "a b; c" and _names({"x": 1}) == ""
    assert len(_names("x" * 10_000)) == MOST_CHARACTERS
