"""Readers and problems: stable ids, licenses on every document, errors that name file and line."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import AtomError, RecipeError
from stages.data import acquire
from stages.data.python_stdlib import read_docstrings, read_functions
from stages.data.readers.base import Document, Unreadable
from stages.data.recipe import load
from stages.data.sources import Source, resolve_tree_digest
from stages.data.synthetic.problems import FORMS, TASKS, add, draw
from stages.data.table import content_hash
from stages.evaluation import eval_set
from stages.scorers.problems_v1 import score


def config(path: Path, reader: str = "jsonl", **options: Any) -> dict[str, Any]:
    source = {
        "name": "notes",
        "kind": "prose",
        "license": "CC-BY-4.0",
        "license_evidence": "LICENSE",
        "origin": "https://example.org",
        "reader": {"reader": reader, "path": str(path), **options},
    }
    digest = resolve_tree_digest(Source.model_validate(source))
    return {"source": {**source, "tree_digest": digest}, "seed": 0}


def test_documents_of_jsonl_and_parquet(tmp_path: Path, run_stage: Any) -> None:
    (tmp_path / "a").mkdir()
    rows = [{"body": f"Document {i}, é\x00", "key": f"k{i}"} for i in range(5)]
    (tmp_path / "a" / "one.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:3]) + "\n")
    with gzip.open(tmp_path / "a" / "two.jsonl.gz", "wt") as f:
        f.write("".join(json.dumps(r) + "\n" for r in rows[3:]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a" / "all.parquet")
    numbered = run_stage(acquire.STAGE, config(tmp_path / "a", text_field="body"), {})
    table = pq.read_table(numbered / "documents.parquet").to_pylist()
    assert [d["id"] for d in table] == [f"notes/one.jsonl:{n}" for n in (1, 2, 3)] + [
        f"notes/two.jsonl.gz:{n}" for n in (1, 2)
    ]
    assert all(d["license"] == "CC-BY-4.0" and d["content_hash"] == content_hash(d["text"]) for d in table)
    assert str(tmp_path) not in (numbered / "source.json").read_text()
    artifact = run_stage(acquire.STAGE, config(tmp_path / "a", "parquet", text_field="body", id_field="key"), {})
    same = pq.read_table(artifact / "documents.parquet").to_pylist()
    assert [d["id"] for d in same] == [f"notes/k{i}" for i in range(5)]
    assert [d["text"] for d in same] == [d["text"] for d in table] == [r["body"] for r in rows]


def test_a_document_may_bring_its_own_license(tmp_path: Path, run_stage: Any) -> None:
    """A string or a list, in SPDX's spelling; what is no license names the row."""
    path = tmp_path / "code.parquet"
    rows = [{"text": f"x = {i}", "terms": terms} for i, terms in enumerate([["mit"], ["MIT", "apache-2.0"]])]
    pq.write_table(pa.Table.from_pylist(rows), path)
    table = pq.read_table(
        run_stage(acquire.STAGE, config(path, "parquet", license_field="terms"), {}) / "documents.parquet"
    )
    assert table["license"].to_pylist() == ["MIT", "Apache-2.0 AND MIT"]
    lines = tmp_path / "code.jsonl"
    lines.write_text('{"text": "x = 1", "terms": "bsd-3-clause"}\n{"text": "x = 2", "terms": null}\n')
    with pytest.raises(AtomError, match=r"line 2: field 'terms' holds None, which is no SPDX license"):
        run_stage(acquire.STAGE, config(lines, license_field="terms"), {})
    lines.write_text('{"text": "x = 1", "terms": ["my own"]}\n')
    with pytest.raises(AtomError, match=r"line 1: field 'terms' holds \['my own'\], which is no SPDX license"):
        run_stage(acquire.STAGE, config(lines, license_field="terms"), {})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut', ["line 2", "cut short or corrupt"]),
        ('{"body": "x"}', ["line 2", "'text'", "body"]),
        ('{"text": 3}', ["line 2", "'text'"]),
        ('["text"]', ["line 2", "object"]),
        ('{"text": "\\ud800"}', ["line 2", "surrogate"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, run_stage: Any, line: str, words: list[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(AtomError) as caught:
        run_stage(acquire.STAGE, config(path), {})
    assert all(word in str(caught.value) for word in [*words, str(path)]), caught.value
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_named(tmp_path: Path, run_stage: Any) -> None:
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wt") as f:
        f.write("".join(json.dumps({"text": random.Random(i).random()}) + "\n" for i in range(5000)))
    path.write_bytes(path.read_bytes()[:-20000])
    with pytest.raises(AtomError, match=r"x\.jsonl\.gz"):
        run_stage(acquire.STAGE, config(path), {})
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(1000)]}), path)
    with pytest.raises(AtomError, match=r"no column 'body'.*text"):
        run_stage(acquire.STAGE, config(path, "parquet", text_field="body"), {})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(AtomError, match=r"x\.parquet cannot be read"):
        run_stage(acquire.STAGE, config(path, "parquet"), {})


def test_an_id_twice_and_a_tree_that_changed_are_refused(tmp_path: Path, run_stage: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "id": "1"}\n{"text": "b", "id": "1"}\n')
    with pytest.raises(AtomError, match="two documents have the id notes/1"):
        run_stage(acquire.STAGE, config(path, id_field="id"), {})
    before = config(path)
    path.write_text('{"text": "other"}\n')
    with pytest.raises(RecipeError, match="tree_digest"):
        run_stage(acquire.STAGE, before, {})


def test_standard_library_documents(run_stage: Any) -> None:
    recipe = load("smoke").resolved()
    docs = pq.read_table(
        run_stage(acquire.STAGE, recipe.acquire_config("docstrings", 0), {}) / "documents.parquet"
    ).to_pylist()
    code = pq.read_table(
        run_stage(acquire.STAGE, recipe.acquire_config("code", 0), {}) / "documents.parquet"
    ).to_pylist()
    assert len(docs) == 400 and len(code) == 300
    assert len({d["id"] for d in docs + code}) == 700
    # a docstring may be held out, so it must not stand in the function that it documents
    texts = [c["text"] for c in code]
    assert not any(d["text"].split("\n")[0] in t for d in docs for t in texts if len(d["text"]) > 60)


def test_problems_are_right_and_follow_the_seed() -> None:
    drawn = draw({"add": 0.5, "sort": 0.5}, 500, random.Random(1))
    assert drawn == draw({"sort": 0.5, "add": 0.5}, 500, random.Random(1))
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

    rng = Fixed()
    rng.numbers = [347, 586]
    assert FORMS["worked"](add(rng))[0] == "347+586:7+6+0=13;4+8+1=13;3+5+1=09:933"


def test_items_differ_from_each_other_and_cannot_exceed_their_space(
    run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = run_stage(eval_set.STAGE, {"problems": {"add": 50, "sort": 20}, "seed": 3}, {})
    rows = pq.read_table(artifact / "items.parquet").to_pylist()
    assert len({r["text"] for r in rows}) == 70 and {r["task"] for r in rows} == set(TASKS)
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
    functions = list(read_functions(files))
    assert functions == [
        Document("a.py:outer", "def outer(x):\n    def inner():\n        '''Inside.'''\n    return x", "a.py"),
        Document("a.py:C.value", "@property\ndef value(self):\n    return 1", "a.py"),
        Unreadable("b.py"),
    ]
    assert list(read_docstrings(files)) == [Document("a.py:outer", "Café.", "a.py"), Unreadable("b.py")]
