"""Readers and problems: stable ids, licenses on every document, errors that name file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import random
import sysconfig
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from pydantic import ValidationError

import data_recipes
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact
from stages.data.acquire import acquire_stage
from stages.data.acquire.readers import row_files
from stages.data.acquire.readers.base import Document, Unmapped, Unreadable
from stages.data.acquire.readers.python_stdlib import read
from stages.data.acquire.sources import Source, resolve_tree_digest
from stages.formats import chat
from stages.formats.seeds import seed_of
from stages.formats.table import content_hash, part_files
from stages.scorers.problems_v1 import score
from stages.tasks import eval_set
from stages.tasks.synthetic.problems import FORMS, TASKS, add, draw
from tests.fixtures.run_fixtures import RecordingReport


def config(path: Path, reader: str = "jsonl", parts: int = 1, **options: Any) -> dict[str, Any]:
    source = {
        "name": "notes",
        "kind": "chat" if options.keys() & {"messages_field", "answer_field"} else "prose",
        "license": "CC-BY-4.0",
        "license_evidence": "LICENSE",
        "origin": "https://example.org",
        "reader": {"reader": reader, "path": str(path), **options},
        "parts": parts,
    }
    digest = resolve_tree_digest(Source.model_validate(source))
    return {"source": {**source, "tree_digest": digest}, "seed": 0}


def documents(artifact: Artifact, table: str = "documents") -> list[dict[str, Any]]:
    return [row for path in part_files(artifact.path, table) for row in pq.read_table(path).to_pylist()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_documents_of_jsonl_and_parquet(tmp_path: Path, run_stage: Any) -> None:
    (tmp_path / "a").mkdir()
    rows = [{"body": f"Document {i}, é\x00", "key": f"k{i}"} for i in range(5)]
    (tmp_path / "a" / "one.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:3]) + "\n")
    with gzip.open(tmp_path / "a" / "two.jsonl.gz", "wt") as f:
        f.write("".join(json.dumps(r) + "\n" for r in rows[3:]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a" / "all.parquet")
    numbered = run_stage(acquire_stage.STAGE, config(tmp_path / "a", text_field="body"), {})
    table = documents(numbered)
    assert [d["id"] for d in table] == [f"notes/one.jsonl:{n}" for n in (1, 2, 3)] + [
        f"notes/two.jsonl.gz:{n}" for n in (1, 2)
    ]
    assert all(d["license"] == "CC-BY-4.0" and d["content_hash"] == content_hash(d["text"]) for d in table)
    assert str(tmp_path) not in (numbered / "source.json").read_text()
    artifact = run_stage(acquire_stage.STAGE, config(tmp_path / "a", "parquet", text_field="body", id_field="key"), {})
    same = documents(artifact)
    assert [d["id"] for d in same] == [f"notes/k{i}" for i in range(5)]
    assert [d["text"] for d in same] == [d["text"] for d in table] == [r["body"] for r in rows]


def test_a_document_may_bring_its_own_license(tmp_path: Path, run_stage: Any) -> None:
    """A string or a list, in SPDX's spelling; a row without a license is not used."""
    path = tmp_path / "code.parquet"
    rows = [{"text": f"x = {i}", "terms": terms} for i, terms in enumerate([["mit"], ["MIT", "apache-2.0"]])]
    pq.write_table(pa.Table.from_pylist(rows), path)
    table = documents(run_stage(acquire_stage.STAGE, config(path, "parquet", license_field="terms"), {}))
    assert [row["license"] for row in table] == ["MIT", "Apache-2.0 AND MIT"]
    lines = tmp_path / "code.jsonl"
    write_lines(lines, [{"text": f"x = {n}", "terms": t} for n, t in enumerate(["bsd-3-clause", None, ["my own"]])])
    artifact = run_stage(acquire_stage.STAGE, config(lines, license_field="terms"), {})
    assert [row["license"] for row in documents(artifact)] == ["BSD-3-Clause"]
    assert [(row["id"], row["license"], row["reason"]) for row in documents(artifact, "failed")] == [
        ("notes/code.jsonl:2", "LicenseRef-unmapped", "license: the document states none"),
        ("notes/code.jsonl:3", "LicenseRef-unmapped", "license: no map knows '[\"my own\"]'"),
    ]


CC_BY = "Creative Commons - Attribution - https://creativecommons.org/licenses/by/4.0/"


@pytest.mark.parametrize("reader", ["jsonl", "parquet"])
def test_nested_fields_and_maps_of_license_strings(tmp_path: Path, run_stage: Any, reader: str) -> None:
    """As the Common Pile has them; a string that no map knows is listed, and its text is no document."""
    stated = [CC_BY, "Public Domain", "MIT,Apache-2.0", "A license of 2031", "", "House license"]
    rows = [
        {"text": f"Document {n}.", "metadata": {"license": license, "url": f"https://example.org/{n}", "spare": n}}
        for n, license in enumerate(stated)
    ]
    path = tmp_path / f"pile.{reader}"
    if reader == "jsonl":
        write_lines(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    fields = {"license_field": "metadata.license", "url_field": "metadata.url", "license_map": "common-pile"}
    settings = config(path, reader, **fields, license_strings={"House license": "MIT"})
    artifact = run_stage(acquire_stage.STAGE, settings, {})
    expected = ["CC-BY-4.0", "LicenseRef-Public-Domain", "Apache-2.0 AND MIT", "MIT"]
    assert [row["license"] for row in documents(artifact)] == expected
    assert [row["origin"] for row in documents(artifact)] == [f"https://example.org/{n}" for n in (0, 1, 2, 5)]
    source = artifact.json("source.json")
    assert (source["documents"], source["documents_failed"], source["documents_unmapped"]) == (6, 0, 2)
    size = len("Document 0.")
    assert source["licenses"] == [
        {"license": license, "found": basis, "documents": 1, "bytes": size}
        for license, basis in sorted([*((name, "field") for name in expected), *UNMAPPED])
    ]
    assert source["licenses_unmapped"] == [
        {"string": "", "documents": 1}, {"string": "A license of 2031", "documents": 1},
    ]  # fmt: skip


UNMAPPED = [("LicenseRef-unmapped", "field"), ("LicenseRef-unmapped", "none")]


@pytest.mark.parametrize("reader", ["jsonl", "parquet"])
def test_rows_are_left_out_by_their_fields(tmp_path: Path, run_stage: Any, reader: str) -> None:
    """As the Common Corpus states languages and licenses; the strings that were understood are listed."""
    stated = [("English", "Open Culture", "Public Domain"), ("French", "Open Culture", "Public Domain"),
              ("English", "Open Source", "MIT"), ("English", "Open Science", "CC-By"), ("English", "Open Science", "CC-By"),
              ("English", "Open Science", "CC-BY-4.0"), (None, "Open Culture", "Public Domain"),
              ("English", "Open Government", "Various open data")]  # fmt: skip
    names = ("language", "open_type", "license")
    rows = [{"text": f"Text {n}.", **dict(zip(names, row, strict=True))} for n, row in enumerate(stated)]
    path = tmp_path / f"corpus.{reader}"
    if reader == "jsonl":
        write_lines(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    where = {"language": ["English"], "open_type": ["Open Culture", "Open Science", "Open Government"]}
    artifact = run_stage(acquire_stage.STAGE, config(path, reader, license_field="license", where=where), {})
    table = {row["text"]: row["license"] for row in documents(artifact)}
    by = "LicenseRef-CC-BY-unversioned"
    assert table == {"Text 0.": "LicenseRef-Public-Domain", "Text 3.": by, "Text 4.": by, "Text 5.": "CC-BY-4.0"}
    source = artifact.json("source.json")
    assert (source["documents"], source["documents_found"], source["rows_left_out"]) == (5, 5, 3)
    assert source["licenses_stated"] == [
        {"string": "CC-By", "license": by, "documents": 2},
        {"string": "Public Domain", "license": "LicenseRef-Public-Domain", "documents": 1},
    ]
    assert source["licenses_unmapped"] == [{"string": "Various open data", "documents": 1}]
    limited = config(path, reader, license_field="license", where=where, limit=2)
    assert run_stage(acquire_stage.STAGE, limited, {}).json("source.json")["documents"] == 2


@pytest.mark.parametrize("reader", ["jsonl", "parquet"])
def test_rows_below_a_minimum_are_left_out(tmp_path: Path, run_stage: Any, reader: str) -> None:
    """As OpenCodeInstruct has them: a share of passed tests as text, and a model's judgement as JSON."""
    right, wrong = (json.dumps({"logic": {"score": score}, "edges": {"score": 5}}) for score in (5, 4))
    stated = [("1.0", right), ("0.9", right), ("1", right), ("1", wrong), ("n/a", right), (None, right), ("1", "{"),
              ("1", None), ("nan", right), ("1", "[5]")]  # fmt: skip
    names = ("average_test_score", "judgement")
    rows = [{"q": f"Ask {n}?", "a": f"Text {n}.", **dict(zip(names, row, strict=True))} for n, row in enumerate(stated)]
    path = tmp_path / f"corpus.{reader}"
    if reader == "jsonl":
        write_lines(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    minimum = {"average_test_score": 1, "judgement.logic.score": 5, "judgement.edges.score": 5}
    artifact = run_stage(
        acquire_stage.STAGE, config(path, reader, question_fields=["q"], answer_field="a", minimum=minimum), {}
    )
    assert [text.partition("Text ")[2][0] for text in (row["text"] for row in documents(artifact))] == ["0", "2"]
    assert artifact.json("source.json")["rows_left_out"] == 8


def test_reasoning_of_an_answer_is_kept_apart_or_removed(tmp_path: Path, run_stage: Any) -> None:
    answers = ["<think>\nTwo and two.\n</think>\n\nFour.", "Four.", "<think>x</think>", "<think>x</think>y</think>"]
    write_lines(tmp_path / "traces.jsonl", [{"q": "2 + 2?", "a": answer} for answer in answers])
    settings = {"question_fields": ["q"], "answer_field": "a"}
    texts = {}
    for use in ("reasoning", "removed"):
        artifact = run_stage(acquire_stage.STAGE, config(tmp_path / "traces.jsonl", **settings, think_tags=use), {})
        (row,) = documents(artifact)
        texts[use] = row["text"][row["prompt_chars"] :]
    assert texts["removed"] == "Four.<|im_end|>"
    assert texts["reasoning"] == "<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>"
    plain = run_stage(acquire_stage.STAGE, config(tmp_path / "traces.jsonl", **settings), {})
    assert len(documents(plain)) == 1, "without the setting, the names of special tokens are refused"
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answers[0]},
             {"role": "user", "content": "+ 1?"}, {"role": "assistant", "content": "5.", "reasoning_content": "Add."},
             {"role": "user", "content": "Look."}, {"role": "assistant", "content": "", "tool_calls": [
                 {"type": "function", "function": {"name": "look", "arguments": "{}"}}]}]  # fmt: skip
    write_lines(tmp_path / "talk.jsonl", [{"messages": turns}])
    talk = config(tmp_path / "talk.jsonl", messages_field="messages", think_tags="removed", tools_field="tools")
    assert not any("<think>" in row["text"] for row in documents(run_stage(acquire_stage.STAGE, talk, {})))
    with pytest.raises(ValueError, match="think_tags is set, but rows are plain text"):
        acquire_stage.AcquireConfig.model_validate(config(tmp_path / "traces.jsonl", think_tags="removed"))


def test_a_notice_in_a_text_goes_before_its_license_field(tmp_path: Path, run_stage: Any) -> None:
    headers = [
        "// Licensed under the MIT license.\n",
        "// All rights reserved.\n",
        "",
        "// SPDX-License-Identifier: Zlib\n",
    ]
    write_lines(tmp_path / "code.jsonl", [{"text": f"{header}f();", "license": "Apache-2.0"} for header in headers])
    settings = config(tmp_path / "code.jsonl", license_field="license", license_notice="header")
    artifact = run_stage(acquire_stage.STAGE, settings, {})
    assert [row["license"] for row in documents(artifact)] == ["MIT", "Apache-2.0", "Zlib"]
    (failed,) = documents(artifact, "failed")
    assert failed["reason"] == "license: no map knows '// All rights reserved.'"
    found = {row["license"]: row["found"] for row in artifact.json("source.json")["licenses"]}
    assert found == {"Apache-2.0": "field", "LicenseRef-unmapped": "notice", "MIT": "notice", "Zlib": "notice"}


def test_a_list_of_mappings_in_parquet_and_an_empty_list(tmp_path: Path, run_stage: Any) -> None:
    """As The Stack has it: several licenses of a repository all apply, and an empty list states none."""
    values = [[{"id": "MIT"}, {"id": "deprecated_LGPL-3.0+"}], []]
    pq.write_table(pa.table({"text": ["a", "b"], "licenses": values}), tmp_path / "x.parquet")
    settings = config(tmp_path / "x.parquet", "parquet", license_field="licenses.id", license_map="the-stack")
    artifact = run_stage(acquire_stage.STAGE, settings, {})
    assert [row["license"] for row in documents(artifact)] == ["LGPL-3.0-or-later AND MIT"]
    assert [row["reason"] for row in documents(artifact, "failed")] == ["license: the document states none"]
    with pytest.raises(AtomError, match=r"no column 'licenses.name' \(columns: text, licenses\)"):
        run_stage(acquire_stage.STAGE, config(tmp_path / "x.parquet", "parquet", license_field="licenses.name"), {})


@pytest.mark.parametrize("reader", ["jsonl", "parquet"])
def test_a_question_and_its_answer_in_fields_of_their_own(tmp_path: Path, run_stage: Any, reader: str) -> None:
    """As Dolly has them: an instruction, a context that may be empty, and a response; a row without one has failed."""
    rows = [
        {"task": {"instruction": "Name it.", "context": "A red fruit."}, "response": "An apple."},
        {"task": {"instruction": "Say hello.", "context": ""}, "response": "Hello."},
        {"task": {"instruction": "Say nothing.", "context": ""}, "response": None},
    ]
    path = tmp_path / f"pairs.{reader}"
    write_lines(path, rows) if reader == "jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
    settings = config(path, reader, question_fields=["task.instruction", "task.context"], answer_field="response")
    artifact = run_stage(acquire_stage.STAGE, settings, {})
    texts = [
        chat.render([{"role": "user", "content": question}, {"role": "assistant", "content": answer}]).rstrip("\n")
        for question, answer in (("Name it.\n\nA red fruit.", "An apple."), ("Say hello.", "Hello."))
    ]
    acquired = documents(artifact)
    assert [row["text"] for row in acquired] == texts
    assert [text[row["prompt_chars"] :] for row, text in zip(acquired, texts, strict=True)] == [
        "An apple.<|im_end|>", "Hello.<|im_end|>",
    ]  # fmt: skip
    assert ["no text in field 'response'" in row["reason"] for row in documents(artifact, "failed")] == [True]
    for wrong, words in (
        ({"answer_field": "response"}, "question_fields and answer_field belong together"),
        ({"question_fields": ["q"], "answer_field": "a", "messages_field": "m"}, "messages_field = m holds whole"),
    ):
        with pytest.raises(ValidationError, match=words):
            acquire_stage.AcquireConfig.model_validate(config(path, reader, **wrong))


def test_many_unknown_licenses_do_not_stop_the_stage(tmp_path: Path, run_stage: Any) -> None:
    path = tmp_path / "x.jsonl"
    write_lines(path, [{"text": f"Document {n}.", "license": f"unheard {n}"} for n in range(40)])
    artifact = run_stage(acquire_stage.STAGE, config(path, license_field="license"), {})
    assert documents(artifact) == [] and len(documents(artifact, "failed")) == 40


def test_a_license_of_a_collection_is_that_of_no_document(tmp_path: Path, run_stage: Any) -> None:
    path = tmp_path / "x.jsonl"
    write_lines(path, [{"text": "A page.", "url": "https://example.org/page"}, {"text": "Another.", "url": "ftp://x"}])
    settings = config(path, url_field="url")
    settings["source"] |= {"license": "ODC-By-1.0"}
    with pytest.raises(
        ValidationError, match="ODC-By-1.0 covers a collection, not the texts in it; set document_license"
    ):
        acquire_stage.AcquireConfig.model_validate(settings)
    settings["source"] |= {"document_license": "LicenseRef-unknown-web"}
    artifact = run_stage(acquire_stage.STAGE, settings, {})
    assert {row["license"] for row in documents(artifact)} == {"LicenseRef-unknown-web"}
    origins = ["https://example.org/page", "https://example.org#x.jsonl"]
    assert [row["origin"] for row in documents(artifact)] == origins
    assert [row["found"] for row in artifact.json("source.json")["licenses"]] == ["none"]


def zstd_file(path: Path, lines: int = 3000) -> list[str]:
    """A file of two frames; returns the texts in it."""
    texts = [str(random.Random(n).random()) for n in range(lines)]
    content = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    halves = (b"".join(content[: lines // 2]), b"".join(content[lines // 2 :]))
    path.write_bytes(b"".join(zstandard.compress(half) for half in halves))
    return texts


def test_zstandard_files(tmp_path: Path, run_stage: Any) -> None:
    """Of several frames; one that is cut short or damaged is named, although the library takes it for a whole one."""
    path = tmp_path / "x.jsonl.zst"
    texts = zstd_file(path)
    assert [row["text"] for row in documents(run_stage(acquire_stage.STAGE, config(path), {}))] == texts
    whole = path.read_bytes()
    for content, words in ((whole[:-100], "Truncated"), (whole[:-9000] + b"\x00" * 9000, "")):
        path.write_bytes(content)
        with pytest.raises(
            AtomError, match=rf"x\.jsonl\.zst cannot be read at line \d+ .*{words}.*cut short or corrupt"
        ):
            run_stage(acquire_stage.STAGE, config(path), {})


def test_a_line_without_end_fails_alone(tmp_path: Path, run_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line in a file of a megabyte may have a terabyte."""
    monkeypatch.setattr(row_files, "MAX_LINE", 2**20)
    path = tmp_path / "x.jsonl.zst"
    lines = [b'{"text": "first"}\n', b'{"text": "' + b"x" * 2**25 + b'"}\n', b'{"text": "last"}\n']
    path.write_bytes(zstandard.compress(b"".join(lines)))
    artifact = run_stage(acquire_stage.STAGE, config(path), {})
    assert [row["text"] for row in documents(artifact)] == ["first", "last"]
    assert [row["reason"] for row in documents(artifact, "failed")] == [f"longer than {2**20} bytes"]


BAD_LINES = [
    (b'{"text": "cut', ["not a JSON object"]),
    (b'{"body": "x"}', ["no text in field 'text'", "body"]),
    (b'{"text": 3}', ["no text in field 'text'"]),
    (b'["text"]', ["object is expected, not list"]),
    (b'{"text": "\\ud800"}', ["surrogate"]),
    (b'{"text": "\xff"}', ["utf-8"]),
    (b"[" * 100_000, ["not a JSON object"]),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_a_bad_line_fails_alone(tmp_path: Path, run_stage: Any, line: bytes, words: list[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine too"}\n')
    artifact = run_stage(acquire_stage.STAGE, config(path), {})
    assert [row["id"] for row in documents(artifact)] == ["notes/x.jsonl:1", "notes/x.jsonl:3"]
    (failed,) = documents(artifact, "failed")
    assert (failed["id"], failed["source"], failed["license"]) == ("notes/x.jsonl:2", "notes", "CC-BY-4.0")
    assert all(word in failed["reason"] for word in words), failed
    counts = artifact.json("source.json")
    assert (counts["documents"], counts["documents_failed"]) == (3, 1)


@pytest.mark.parametrize("bad, stops", [(10, False), (11, True)])
def test_many_bad_lines_stop_the_stage(tmp_path: Path, run_stage: Any, bad: int, stops: bool) -> None:
    path = tmp_path / "x.jsonl"
    write_lines(path, [{"text": "fine"}] * 20 + [{"body": "x"}] * bad)
    if not stops:
        assert len(documents(run_stage(acquire_stage.STAGE, config(path), {}), "failed")) == bad
        return
    sentence = (
        r"source notes: 11 of 31 documents cannot be read; check the settings of its reader; the first is "
        r"notes/x.jsonl:21 \(no text in field 'text' \(fields: body\); set reader.text_field\)"
    )
    with pytest.raises(AtomError, match=sentence):
        run_stage(acquire_stage.STAGE, config(path), {})


def write_conversations(path: Path, good: int, bad: int) -> None:
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    write_lines(path, [{"messages": talk}] * good + [{"messages": talk[:1]}] * bad)


def test_skipped_conversations_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    """One note, and 20 names in source.json, of parts of a source together."""
    for number in range(3):
        write_conversations(tmp_path / f"talk/{number}.jsonl", 400, 300 if number else 0)
    settings = acquire_stage.AcquireConfig.model_validate(config(tmp_path / "talk", parts=3, messages_field="messages"))
    out, report = tmp_path / "out", RecordingReport()
    out.mkdir()
    acquire_stage.run(settings, {}, tmp_path / "work", out, report)
    source = json.loads((out / "source.json").read_text())
    names = [f"1.jsonl:{number} (no message is the assistant's)" for number in range(401, 421)]
    assert (source["files_skipped"], source["files_skipped_count"], source["documents"]) == (names, 600, 1200)
    assert [note for note in report.notes if "skipped" in note] == [
        f"source notes: skipped, because they cannot be read: documents {', '.join(names[:3])}, … (600 in all)"
    ]
    (seal,) = (tmp_path / "work").glob("*-00001/part.json")
    assert len(seal.read_bytes()) < 3000, "a part keeps as few names"


@pytest.mark.parametrize("good, bad, stops", [(0, 10, False), (11, 11, False), (10, 11, True)])
def test_a_source_that_is_mostly_unreadable_stops_the_stage(
    tmp_path: Path, run_stage: Any, good: int, bad: int, stops: bool
) -> None:
    write_conversations(tmp_path / "talk/0.jsonl", good, bad)
    write_conversations(tmp_path / "talk/1.jsonl", 1, 0)
    settings = config(tmp_path / "talk", parts=2, messages_field="messages")
    if not stops:
        assert len(documents(run_stage(acquire_stage.STAGE, settings, {}))) == good + 1
        return
    sentence = (
        "source notes: 11 of 21 documents cannot be read; check the settings of its reader; the first is "
        r"0.jsonl:11 \(no message is the assistant's\)$"
    )
    with pytest.raises(AtomError, match=sentence):
        run_stage(acquire_stage.STAGE, settings, {})


def test_a_parquet_row_that_is_not_utf8_fails_alone(tmp_path: Path, run_stage: Any) -> None:
    path = tmp_path / "x.parquet"
    values = pa.array([b"one", b"\xff", b"three"]).view(pa.string())
    pq.write_table(pa.table({"text": values}), path)
    artifact = run_stage(acquire_stage.STAGE, config(path, "parquet"), {})
    assert [row["id"] for row in documents(artifact)] == ["notes/x.parquet:1", "notes/x.parquet:3"]
    assert [row["id"] for row in documents(artifact, "failed")] == ["notes/x.parquet:2"]


def test_a_truncated_file_is_named(tmp_path: Path, run_stage: Any) -> None:
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wt") as f:
        f.write("".join(json.dumps({"text": random.Random(i).random()}) + "\n" for i in range(5000)))
    path.write_bytes(path.read_bytes()[:-20000])
    with pytest.raises(AtomError, match=r"x\.jsonl\.gz cannot be read at line \d+ .*cut short"):
        run_stage(acquire_stage.STAGE, config(path), {})
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "cu')
    with pytest.raises(AtomError, match=r"x\.jsonl, line 2: not a JSON object .*; the file is cut short"):
        run_stage(acquire_stage.STAGE, config(path), {})
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(1000)]}), path)
    with pytest.raises(AtomError, match=r"no column 'body'.*text"):
        run_stage(acquire_stage.STAGE, config(path, "parquet", text_field="body"), {})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(AtomError, match=r"x\.parquet cannot be read"):
        run_stage(acquire_stage.STAGE, config(path, "parquet"), {})


def test_an_id_twice_and_a_tree_that_changed_are_refused(tmp_path: Path, run_stage: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "id": "1"}\n{"text": "b", "id": "1"}\n')
    with pytest.raises(AtomError, match="two documents have the id notes/1"):
        run_stage(acquire_stage.STAGE, config(path, id_field="id"), {})
    before = config(path)
    path.write_text('{"text": "other"}\n')
    with pytest.raises(RecipeError, match="tree_digest"):
        run_stage(acquire_stage.STAGE, before, {})


def test_a_small_file_that_changed_is_read_again_after_it_was_restored(tmp_path: Path, run_stage: Any) -> None:
    """What was made from other files than the pinned ones is not used later."""
    path, work = tmp_path / "x.jsonl", tmp_path / "work"
    path.write_text('{"text": "first"}\n')
    pinned = config(path)
    path.write_text('{"text": "another"}\n')
    with pytest.raises(RecipeError, match="tree_digest is pinned to"):
        run_stage(acquire_stage.STAGE, pinned, {}, work)
    path.write_text('{"text": "first"}\n')
    assert [row["text"] for row in documents(run_stage(acquire_stage.STAGE, pinned, {}, work))] == ["first"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven files of documents, one of them with a line that fails, and one empty."""
    for n in range(7):
        rows = [{"text": f"Document {i} of file {n}.", "key": f"{n}-{i}"} for i in range(n and 5 + n)]
        write_lines(tmp_path / "files" / f"{n}.jsonl", rows)
    with open(tmp_path / "files/3.jsonl", "a") as file:
        file.write('{"txt": "poison"}\n')
    return tmp_path / "files"


@pytest.mark.parametrize("id_field", [None, "key"])
def test_parts_in_any_order_and_process_give_the_same_bytes(
    folder: Path, tmp_path: Path, run_stage: Any, id_field: str | None
) -> None:
    """A process does all parts, or several do some each; a part that was killed is made again."""
    whole = config(folder, parts=3, id_field=id_field)
    expected = run_stage(acquire_stage.STAGE, whole, {})
    assert [path.name for path in part_files(expected.path, "documents")] == [f"part-{n:05d}.parquet" for n in range(3)]
    assert [len(pq.read_table(path)) for path in part_files(expected.path, "documents")] == [6, 15, 30]
    work, model = tmp_path / "work", acquire_stage.AcquireConfig.model_validate(whole)
    assert acquire_stage.STAGE.shards(model) == 3
    for part in (2, 0, 1):
        acquire_stage.run_shard(model, {}, work, part)
    (work / "notes-00001/documents/part-00001.parquet").write_bytes(b"cut")
    draft = work / ".notes-00002.1"
    draft.mkdir()
    (draft / "half").touch()
    again = run_stage(acquire_stage.STAGE, whole, {}, work)
    assert again.digest == expected.digest
    assert [row for row in documents(again)] == documents(
        run_stage(acquire_stage.STAGE, config(folder, id_field=id_field), {})
    )


def test_one_id_in_two_parts_is_refused(folder: Path, run_stage: Any) -> None:
    write_lines(folder / "6.jsonl", [{"text": "Another text.", "key": "1-4"}])
    with pytest.raises(AtomError, match="two documents have the id notes/1-4"):
        run_stage(acquire_stage.STAGE, config(folder, parts=7, id_field="key"), {})


def test_a_limit_takes_those_of_the_smallest_hashes(folder: Path, run_stage: Any) -> None:
    everything, sample = (
        documents(run_stage(acquire_stage.STAGE, config(folder, limit=limit), {})) for limit in (None, 9)
    )
    salt = f"{seed_of('limit/notes', 0)}/"
    ids = [f"notes/{n}.jsonl:{i}" for n in range(1, 7) for i in range(1, 6 + n + (n == 3))]
    chosen = sorted(ids, key=lambda id: hashlib.sha256((salt + id).encode()).digest())[:9]
    assert [row["id"] for row in sample] == [row["id"] for row in everything if row["id"] in chosen]


def test_standard_library_documents(smoke_data: Path) -> None:
    (docs, code) = (
        documents(Artifact.open(folder))
        for name in ("docstrings", "code")
        for folder in (smoke_data / "artifacts").glob(f"acquire-{name}-*")
    )
    # of 400 and 300; the others are of files with license terms of their own
    assert 300 < len(docs) < 400 and 200 < len(code) < 300
    assert len({d["id"] for d in docs + code}) == len(docs) + len(code)
    # a docstring may be held out, so it must not stand in the function that it documents
    texts = [c["text"] for c in code]
    assert not any(d["text"].split("\n")[0] in t for d in docs for t in texts if len(d["text"]) > 60)


def test_problems_are_right_and_follow_the_seed() -> None:
    tasks = {"add": 0.4, "sort": 0.4, "sort_six": 0.2}
    drawn = draw(tasks, 500, random.Random(1))
    assert drawn == draw(dict(reversed(tasks.items())), 500, random.Random(1))
    assert {(len(p.answer), p.task) for p in drawn if p.task != "add"} == {(5, "sort"), (6, "sort_six")}
    for problem in drawn:
        if problem.task == "add":
            assert eval(problem.question) == int(problem.answer)  # our own digits
        else:
            assert sorted(problem.question.removeprefix("sort ")) == list(problem.answer)
        for form in FORMS.values():
            text, prompt_chars = form(problem)
            assert (
                text.startswith(problem.question) and text[prompt_chars - 1] in "=:" and text.endswith(problem.answer)
            )
        text, prompt_chars = FORMS["worked"](problem)
        assert score(problem.answer, text[prompt_chars:] + "<|endoftext|>junk") == 1
        assert score(problem.answer, text[prompt_chars:] + "0") == 0

    class Fixed(random.Random):
        def randrange(self, *args: int) -> int:  # type: ignore[override]
            return self.numbers.pop(0)

    for task, levels in (("sort", 5), ("sort_six", 6)):
        for level in range(levels):
            digits = TASKS[task](random.Random(2), level).question.removeprefix("sort ")
            assert sum(after < before for before, after in pairwise(digits)) == level
        with pytest.raises(ValueError, match=f"{task} has the levels 0 to {levels - 1}"):
            TASKS[task](random.Random(2), levels)

    rng = Fixed()
    rng.numbers = [347, 586]
    assert FORMS["worked"](add(rng))[0] == "347+586:7+6+0=13;4+8+1=13;3+5+1=09:933"


def test_items_differ_from_each_other_and_cannot_exceed_their_space(
    run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"add": 50, "sort": 10, "sort_six": 10, "trace": 30}
    artifact = run_stage(eval_set.STAGE, {"problems": counts, "seed": 3}, {})
    rows = pq.read_table(artifact / "items.parquet").to_pylist()
    assert len({r["text"] for r in rows}) == sum(counts.values()) and {r["task"] for r in rows} == set(TASKS)
    assert all(r["prompt"] == r["text"] + ":" for r in rows)
    few = draw({"sort": 1.0}, 30, random.Random(0))
    monkeypatch.setitem(TASKS, "sort", lambda rng: rng.choice(few))
    with pytest.raises(RecipeError, match=r"sort gave only \d+ different problems of 40"):
        run_stage(eval_set.STAGE, {"problems": {"sort": 40}, "seed": 3}, {})


def test_library_files_are_cut_by_the_parsers_lines(tmp_path: Path) -> None:
    """Form feeds and other encodings occur in the standard library; a file that does not parse is named."""
    (tmp_path / "a.py").write_bytes(
        b"# coding: latin-1\n\x0c\ndef outer(x):\r\n    '''Caf\xe9.'''\r\n    def inner():\n        '''Inside.'''\n"
        b"    return x\n\x0c\n\nclass C:\n    @property\n    def value(self):\n        return 1\n"
    )
    (tmp_path / "b.py").write_text("print 'two'\n")
    files = [(name, tmp_path / name) for name in ("a.py", "b.py")]
    functions = list(read(files, "function"))
    url = f"https://github.com/python/cpython/blob/v{platform.python_version()}/Lib/a.py"
    outer = "def outer(x):\n    def inner():\n        '''Inside.'''\n    return x"
    assert functions == [
        Document("a.py:outer", outer, "a.py", url=url),
        Document("a.py:C.value", "@property\ndef value(self):\n    return 1", "a.py", url=url),
        Unreadable("b.py"),
    ]
    assert list(read(files, "docstring")) == [Document("a.py:outer", "Café.", "a.py", url=url), Unreadable("b.py")]


@pytest.mark.parametrize(
    ("header", "terms"),
    [
        ("# Permission  is  hereby granted,  free  of charge", ("Permission  is  hereby granted,  free  of charge", None)),
        ("# Permission\n# to use, copy", ("Permission\n# to use, copy", None)),
        ("# Redistribution and use in source and binary", ("Redistribution and use in source and binary", None)),
        ("# SPDX-License-Identifier: MIT\n# Licensed to PSF under a Contributor Agreement.",
         ("SPDX-License-Identifier: MIT", "MIT")),
        ("# Released to the public domain, by the author.",
         ("Released to the public domain, by the author.", "LicenseRef-Public-Domain")),
        ("# (c) Copyright Example Corp, All Rights Reserved.",
         ("(c) Copyright Example Corp, All Rights Reserved.", None)),
        ("# Copyright (c) 2004 Python Software Foundation.\n# All rights reserved.", None),
        ("# Copyright 2009 A. Author. All Rights Reserved.\n# Licensed to PSF under a Contributor Agreement.", None),
        ("# Copyright (C) 2001 A. Author.", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_file_with_terms_of_its_own_is_not_under_the_librarys_license(
    tmp_path: Path, header: str, terms: tuple[str, str | None] | None
) -> None:
    (tmp_path / "a.py").write_text(f'{header}\ndef f(x):\n    """Double x."""\n    return 2 * x\n')
    files = [("a.py", tmp_path / "a.py")]
    for unit in ("docstring", "function", "file"):
        (document,) = read(files, unit)
        if isinstance(document, Document):
            assert (document.stated, document.license) == (terms or ("", None))
        else:
            assert isinstance(document, Unmapped) and (document.license, None) == terms
        assert document.license_found == ("notice" if terms else "")


FOREIGN = {
    "turtle.py": "Zlib",
    "tarfile.py": "MIT",
    "optparse.py": "BSD-3-Clause",
    "profile.py": "Apache-2.0",
    "tabnanny.py": "LicenseRef-Public-Domain",
    "trace.py": None,
    "xml/etree/ElementTree.py": "MIT-CMU",
    "http/cookies.py": "HPND",
}
"""Modules with a notice of their own, in the library of any supported version of Python."""


def test_modules_of_the_library_with_a_notice_of_their_own() -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    found = {name: next(iter(read([(name, library / name)], "file"))) for name in FOREIGN}
    assert {name: isinstance(document, Unmapped) for name, document in found.items()} == {
        name: license is None for name, license in FOREIGN.items()
    }
    licenses = {name: document.license for name, document in found.items() if isinstance(document, Document)}
    assert licenses == {name: license for name, license in FOREIGN.items() if license}


@pytest.mark.parametrize("recipe", ["smoke", "tiny"])
def test_the_demos_corpora_hold_no_file_of_the_library_with_other_terms(recipe: str, run_stage: Any) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = yaml.safe_load(Path(data_recipes.__file__).with_name(f"{recipe}.yaml").read_text())["sources"]
    for source in sources[:2]:
        section = {name: source[name] for name in ("name", "kind", "license", "license_evidence", "origin", "reader")}
        parsed = Source.model_validate(section)
        resolved = parsed.model_copy(update={"tree_digest": resolve_tree_digest(parsed)})
        artifact = run_stage(acquire_stage.STAGE, {"source": resolved.model_dump(mode="json"), "seed": 0}, {})
        tag = f"https://github.com/python/cpython/tree/v{platform.python_version()}/Lib"
        assert artifact.json("source.json")["origin"] == tag
        assert artifact.json("source.json")["documents_unmapped"] > 0
        rows = documents(artifact)
        assert source["license_allow"] == ["PSF-2.0"]
        paths = {row["origin"].removeprefix(tag.replace("/tree/", "/blob/") + "/"): row["license"] for row in rows}
        assert all(license == FOREIGN.get(name, license) for name, license in paths.items())
        assert not {name for name, license in paths.items() if license == "PSF-2.0"} & FOREIGN.keys()
        assert "PSF-2.0" in paths.values() and len(set(paths.values())) > 1
        assert all((library / name).is_file() for name in paths)
