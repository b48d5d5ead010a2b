"""Tracing documents, steps and texts through a release, compared with scans over all its rows."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import AtomError
from release import merkle, tracing
from release.assembly import build_release as builder
from release.facts.published_tables import read_rows
from release.layout import SUMS
from release.repositories import files_below, write_sums
from release.tracing.documents import FATE, PLACE
from stages.formats.table import DISPOSITIONS, write_rows
from tests.fixtures import parts_fixtures, release_fixtures

ORDERS = [
    ("pretrain", "order/pretrain", 1, 2), ("midtrain", "earlier/order-midtrain-aaaa", 1, 2),
    ("midtrain", "order/midtrain", 3, 4), ("longcontext-1", "order/longcontext-1", 1, 2),
    ("longcontext-2", "order/longcontext-2", 1, 2), ("rlvr", "order/rlvr", 1, 2),
]  # fmt: skip
"""(phase, order, first and last step of it that was followed), in the order of training."""
IDLE = {("longcontext-2", 1), ("rlvr", 1)}
TRAINED = {"base": "pretrain", "mid": "midtrain", "long-1": "longcontext-1", "long-2": "longcontext-2", "rlvr": "rlvr"}
PHASES = list(dict.fromkeys(phase for phase, *_ in ORDERS))
WILD = {
    "prose/001": 'He said "no" AND left; NOT "x" OR text:y * (z) ^ {a b}\n\n\ttab',
    "prose/002": "nul\0inside and after\0\0it, the Zürich naïve façade 日本語のテキスト 🦊🦊🦊 end",
    "prose/004": "aaaaaaaa aaa\u0301 \ufffd \ufffe '' \"\" \"\"\" \\ % _",
    "prose/005": "<|im_start|>user\nsort 312<|im_end|>\n<|im_start|>assistant\n123<|im_end|>",
    "prose/006": "He said \"No\" and LEFT; ß SS",
}  # fmt: skip
OLD = {"id": "old/1", "text": "an older text 🦊🦊", "source": "old", "license": "MIT", "origin": "https://old.example.org/1",
       "content_hash": release_fixtures.sha("an older text 🦊🦊"), "prompt_chars": 0, "split": "train"}  # fmt: skip


def segment(step: int, row: int, id: str, **changed: Any) -> dict[str, Any]:
    return {"step": step, "row": row, "segment": 0, "source": id.split("/")[0], "part": 0, "ordinal": 0, "id": id,
            "offset": row, "length": 5 + step, "loss_from": 0, **changed}  # fmt: skip


def change(path: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Other values in the rows of some ids. The schema stays."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    rows = [{**row, **changes.get(row["id"], {})} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def enrich(folder: Path) -> None:
    """What a small release lacks: wild texts, duplicates, a phase that went on from an earlier run, tasks, a replay."""
    data = folder / "dataset"
    hashed = {id: release_fixtures.sha(text) for id, text in WILD.items()}
    change(data / "kept/prose/part-00000.parquet", {id: {"text": WILD[id], "content_hash": hashed[id]} for id in WILD})
    dispositions: dict[str, dict[str, Any]] = {id: {"content_hash": h, "kept_hash": h} for id, h in hashed.items()}
    dispositions["prose/003"] = {
        "rule": "exact_duplicate",
        "duplicate_of": "prose/001",
        "content_hash": hashed["prose/001"],
    }
    dispositions["prose/007"] = {"rule": "near_duplicate", "duplicate_of": "sums/003"}
    dispositions["sums/003"] = {"rule": "exact_duplicate", "duplicate_of": "sums/002"}
    dispositions["sums/011"] = {"id": "sums/é"}
    dispositions["sums/007"] = {"content_hash": hashed["prose/001"]}  # the same text, removed for another reason
    tokens = {id: {"content_hash": h} for id, h in hashed.items()} | {"sums/011": dispositions["sums/011"]}
    for source in release_fixtures.SOURCES:
        change(data / f"dispositions/{source}/part-00000.parquet", dispositions)
        change(data / f"tokens/documents/{source}/part-00000.parquet", tokens)
    change(data / "kept/sums/part-00000.parquet", {"sums/011": dispositions["sums/011"]})
    order = data / "order/longcontext-2/part-00000.parquet"
    release_fixtures.table(order, [*read_rows(order), segment(2, 2, "sums/é")])  # which no other phase read

    earlier = data / "earlier"
    for name in ("kept", "dispositions"):
        shutil.copytree(data / name, earlier / "dedup-bbbb" / name)
    release_fixtures.table(earlier / "dedup-bbbb/kept/old/part-00000.parquet", [OLD])
    disposition = read_rows(data / "dispositions/prose/part-00000.parquet")[0] | {
        "id": "old/1", "source": "old", "license": "MIT", "content_hash": OLD["content_hash"], "split": "train",
        "kept_hash": OLD["content_hash"], "rule": None, "value": None, "threshold": None,
    }  # fmt: skip
    write_rows(earlier / "dedup-bbbb/dispositions/old/part-00000.parquet", DISPOSITIONS, [disposition])
    rows = [segment(step, row, id) for step in range(1, 6) for row, id in enumerate(("old/1", "prose/001", "sums/002"))]
    release_fixtures.table(earlier / "order-midtrain-aaaa/part-00000.parquet", rows)
    release_fixtures.write_json(earlier / "order-midtrain-aaaa/meta.json", {"phase": "midtrain", "steps": 5})
    rows = [segment(step, row, id) for step in (3, 4) for row, id in enumerate(("prose/005", "sums/006", "sums/006"))]
    release_fixtures.table(data / "order/midtrain/part-00000.parquet", rows)
    release_fixtures.write_json(data / "order/midtrain/meta.json", {"phase": "midtrain", "steps": 4, "first_step": 3})
    log(folder, "midtrain", [{"step": step, "tokens": 1, "loss": 1.0} for step in (3, 4)])
    shutil.copytree(folder / "checkpoints/midtrain-step-2", folder / "checkpoints/midtrain-step-4")

    rows = [segment(1, 0, "prose/009"), segment(2, 0, "prose/010")]
    release_fixtures.table(data / "order/rlvr/part-00000.parquet", rows)
    release_fixtures.write_json(data / "order/rlvr/meta.json", {"phase": "rlvr", "steps": 2})
    log(folder, "rlvr", [{"step": 1, "tokens": 0, "idle": True}, {"step": 2, "tokens": 9, "loss": 1.0}])
    release_fixtures.write_json(folder / "evidence/training/rlvr/a.json", {"documents": ["sums/é"]})
    (folder / "evidence/training/rlvr/b.json").write_text('{"documents": ["sums/é"]}')
    shutil.copytree(folder / "checkpoints/longcontext-2-step-2", folder / "checkpoints/rlvr-step-2")
    shutil.copytree(data / "evaluation/mid", data / "evaluation/rlvr")
    tasks = [{"id": f"sort/1/{n}", "responses_create_params": {"input": [{"role": "user", "content": question}]}}
             for n, question in enumerate(("sort 312", "sort 31", "sort 312"))]  # fmt: skip
    (data / "rl/rlvr").mkdir(parents=True)
    (data / "rl/rlvr/tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    answers = [{"step": step, "task": f"sort/1/{n}", "text": WILD["prose/005"] if n else "12", "dropped": dropped,
                "wave": 0, "group": n, "sample": 0, "kind": "sort", "level": 1, "finished": True, "reward": n / 2,
                "parts": json.dumps({"reward": n / 2}), "verifier": "exact", "verifier_version": "1", "policy": "p",
                "seed": step}
               for step, n, dropped in ((1, 0, "variance"), (1, 1, ""), (2, 2, ""), (2, 0, ""))]  # fmt: skip
    release_fixtures.table(data / "rl/rlvr/rollouts.parquet", answers)
    write_sums(data / SUMS, data, [path for path in files_below(data) if path != SUMS])


def log(folder: Path, phase: str, lines: list[dict[str, Any]]) -> None:
    path = folder / f"evidence/training/{phase}/training.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def divide(data: Path, parts: int) -> None:
    """Divides all tables of documents and orders, also those of earlier runs."""
    earlier = data / "earlier/dedup-bbbb"
    places = parts_fixtures.places_in(data, parts)
    earlier_places = places | parts_fixtures.places_in(earlier, parts)
    for folder in (data, earlier):
        parts_fixtures.divide_documents(folder, earlier_places)
    parts_fixtures.divide_tokens(data / "tokens/documents", places)
    for path in [*data.glob("order/*/meta.json"), *data.glob("earlier/order-*/meta.json")]:
        parts_fixtures.divide_order(path.parent, earlier_places, steps=2)
    write_sums(data / SUMS, data, [path for path in files_below(data) if path != SUMS])


@pytest.fixture(scope="module", params=[1, 3], ids=["one part", "parts"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = release_fixtures.build_input(tmp_path_factory.mktemp("run"), release_fixtures.inputs_with_long_context())
    folder = builder.build(source, tmp_path_factory.mktemp("home"))
    enrich(folder)
    if request.param > 1:
        divide(folder / "dataset", request.param)
    return folder


@pytest.fixture
def alone(release: Path, tmp_path: Path) -> Path:
    """The data repository as it is pulled."""
    return Path(shutil.copytree(release / "dataset", tmp_path / "alone"))


def moved_weights(phase: str, order: str, step: int) -> bool | None:
    return None if order.startswith("earlier") else (phase, step) not in IDLE


@functools.lru_cache
def order_rows(order: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(order.glob("*.parquet")) for row in read_rows(path)]


def uses_of(release: Path, id: str) -> list[dict[str, Any]]:
    """Brute force: every row of every order, one after the other."""
    uses = []
    for phase, order, first, last in ORDERS:
        rows = [row for row in order_rows(release / "dataset" / order) if row["id"] == id]
        for step in range(first, last + 1):
            places = [{name: row[name] for name in PLACE} for row in rows if row["step"] == step]
            if places:
                uses.append({"phase": phase, "step": step, "order": order, "moved": moved_weights(phase, order, step),
                              "rows": places})  # fmt: skip
    return uses


def kept_tables(release: Path) -> list[Path]:
    tables = [sorted(release.glob(f"dataset/{place}/**/*.parquet")) for place in ("kept", "earlier/*/kept")]
    return [path for paths in tables for path in paths]


def kept_documents(release: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in kept_tables(release):
        for row in read_rows(path):
            yield path.relative_to(release / "dataset").as_posix(), row


def dispositions_of(release: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(table, row)"""
    data = release / "dataset"
    for path in sorted(data.glob("dispositions/*/*.parquet")):
        for row in read_rows(path):
            yield path.relative_to(data).as_posix(), row


def ids(release: Path) -> list[str]:
    return [row["id"] for _, row in dispositions_of(release)]


def plain(answer: Any) -> Any:
    return json.loads(json.dumps(answer.to_json()))


def test_every_step_has_its_rows(release: Path) -> None:
    about = {row["id"]: {"license": row["license"], "origin": row["origin"]} for _, row in kept_documents(release)}
    for phase, order, first, last in ORDERS:
        for step in range(first, last + 1):
            rows = [row for row in order_rows(release / "dataset" / order) if row["step"] == step]
            names = (*PLACE, "source", "id")
            expected = [{**{name: row[name] for name in names}, **about[row["id"]]} for row in rows]
            answer = tracing.trace_step(release, phase, step)
            assert rows and [dataclasses.asdict(segment) for segment in answer.segments] == expected
            assert (answer.phase, answer.step, answer.order, answer.moved) == (
                phase,
                step,
                order,
                moved_weights(phase, order, step),
            )
            page = tracing.text(answer)
            assert all(f"{row['id']}  {row['license']}  {row['origin']}" in page for row in expected)
            assert ("without a weight update" in page) == ((phase, step) in IDLE)
            assert plain(answer)["kind"] == "step"
    only = tracing.trace_step(release, None, 4)  # one phase alone has so many
    assert only.phase == "midtrain" and only.segments[0].id == "prose/005"


def test_a_step_that_there_is_not_is_reported(release: Path, alone: Path) -> None:
    for phase, n, text in (
        (None, 2, "pretrain, midtrain, longcontext-1, longcontext-2, rlvr each have a step 2; name the phase"),
        (None, 9, "has no step 9; pretrain ends with step 2, midtrain ends with step 4, "),
        ("midtrain", 5, "has no step 5 of midtrain; "),  # the earlier run's own step 5 was not followed
        ("pretrain", 0, "has no step 0 of pretrain; "),
        (
            "sft",
            1,
            "has no order and no answers of phase sft; it has pretrain, midtrain, longcontext-1, longcontext-2, rlvr",
        ),
    ):
        for folder in (release, alone):
            with pytest.raises(AtomError, match=text):
                tracing.trace_step(folder, phase, n)
    with pytest.raises(AtomError, match="model is neither a release nor its data repository"):
        tracing.trace_step(release / "model", None, 1)


def test_every_document_has_its_outcome_and_its_steps(release: Path) -> None:
    dispositions = {row["id"]: row for _, row in dispositions_of(release)}
    table_of = {row["id"]: table for table, row in dispositions_of(release)}
    origins = {row["id"]: row["origin"] for _, row in kept_documents(release)}
    checkpoints = [(path.name.rpartition("-step-")[0], int(path.name.rpartition("-")[2]), path.name)
                   for path in (release / "checkpoints").glob("*-step-*")]  # fmt: skip
    assert len(checkpoints) == 10
    reached = set()
    for id in [*dispositions, "old/1"]:
        document = tracing.trace_document(release, id)
        if id in dispositions:
            disposition = {name: dispositions[id][name] for name in FATE} | {"table": table_of[id]}
            assert dataclasses.asdict(document.fates[0]) == {**disposition, "origin": origins.get(id)}
            assert (document.fates[0].origin is None) == (dispositions[id]["disposition"] == "removed")
        uses = uses_of(release, id)
        assert [dataclasses.asdict(use) for use in document.uses] == uses
        trained = [(PHASES.index(use["phase"]), use["step"]) for use in uses if use["moved"] is not False]
        include = {name for phase, step, name in checkpoints
                   if any(at < PHASES.index(phase) or (at == PHASES.index(phase) and n <= step) for at, n in trained)}  # fmt: skip
        assert set(document.checkpoints or []) == include and len(document.checkpoints or []) == len(include), id
        models = [m for m, phase in TRAINED.items() if any(at <= PHASES.index(phase) for at, _ in trained)]
        assert document.models == models and document.unknown == tracing.trace_document(release, "prose/000").unknown
        reached.add((len(include), len(models)))
        page = tracing.text(document)
        assert page.startswith(id) and all(name in page for name in include)
        assert plain(document)["uses"] == uses
    assert len(reached) > 3
    assert tracing.trace_document(release, "prose/009").uses[0].moved is False
    assert tracing.trace_document(release, "prose/009").checkpoints == []  # it was read by an idle step only
    old = tracing.trace_document(release, "old/1")
    assert [use.step for use in old.uses] == [1, 2]
    assert old.fates[0].table.startswith("earlier/dedup-bbbb/dispositions") and old.fates[0].origin == OLD["origin"]
    assert old.checkpoints[0] == "midtrain-step-2"  # type: ignore[index]
    assert len(tracing.trace_document(release, "prose/001").fates) == 2
    assert "removed by near_duplicate: 1, threshold 2, duplicate of sums/003" in tracing.text(
        tracing.trace_document(release, "prose/007")
    )


def test_tasks_that_ask_what_a_document_asks(release: Path) -> None:
    table = "rl/rlvr/tasks.jsonl"
    tasks = tracing.trace_document(release, "prose/005").asked
    assert [dataclasses.asdict(task) for task in tasks] == [{"phase": "rlvr", "table": table, "tasks": ["sort/1/0", "sort/1/2"], "steps": [1, 2], "answers": 3,
                      "learnt": 2}]  # fmt: skip
    assert "a task of rlvr, steps 1-2: 3 answers, 2 trained on" in tracing.text(
        tracing.trace_document(release, "prose/005")
    )
    assert all(tracing.trace_document(release, id).asked == [] for id in ids(release) if id != "prose/005")


def test_an_unknown_document_is_reported(release: Path) -> None:
    with pytest.raises(AtomError, match=r"has no document prose/0001, and no task; look for its id in"):
        tracing.trace_document(release, "prose/0001")
    with pytest.raises(AtomError, match=r"has no document zzz, and no task; look for its id in"):
        tracing.trace_removal(release, "zzz")


def kept_of(data: Path, source: str) -> list[Path]:
    return sorted(data.glob(f"kept/{source}/*.parquet"))


def agrees(release: Path, span: str) -> tracing.TextMatches:
    """Asks for a span, and compares the answer with Python's own `in` over all kept texts."""
    answer = tracing.trace_text(release, span)
    expected: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for table, row in kept_documents(release):
        if span in row["text"]:
            expected.setdefault((row["id"], row["content_hash"]), (row["text"].count(span), []))[1].append(table)
    assert {(m.id, m.content_hash): (m.count, m.tables) for m in answer.matches} == expected, span
    for match in answer.matches:
        assert [dataclasses.asdict(use) for use in match.uses] == uses_of(release, match.id)
    return answer


def test_spans_are_found_where_they_stand(release: Path) -> None:
    texts = [row["text"] for _, row in kept_documents(release)]
    rng = random.Random(7)
    spans = {"🦊", "🦊🦊", "🦊🦊🦊", "\0", "\0i", "l\0in", "\0\0it", "after\0\0it, the", '"', '""', '"""', '"no" AND', 'NOT "x"',
             "text:y *", "^ {a b}\n\n\ttab", "aaa", "aaaa", "a\u0301", "aa\u0301 \ufffd \ufffe", "\ufffe '", "\\ % _", "日本", "日本語",
             "the", "THE", "ß S", "texts", "NEAR(a b)", "nul\ufffdinside", "no such text at all", *texts[:3]}  # fmt: skip
    for _ in range(40):
        text = rng.choice(texts)
        start = rng.randrange(len(text))
        span = text[start : start + rng.randint(1, 30)]
        spans |= {span, span.swapcase(), span + rng.choice("\n\"'*x")}
    results = [agrees(release, span) for span in sorted(spans)]
    assert sum(len(answer.matches) > 0 for answer in results) > 40
    assert [m.id for m in agrees(release, "left").matches] == ["prose/001"]  # and not LEFT
    page = tracing.text(agrees(release, "older text 🦊"))
    assert "old/1: once; train; MIT; https://old.example.org/1" in page and "in midtrain, steps 1-2 (earlier/" in page
    assert agrees(release, "aaa").matches[0].count == 3  # without overlap


def repository(folder: Path, texts: list[str]) -> Path:
    """No more than kept texts in two tables, as a data repository has them."""
    data = folder / "dataset"
    release_fixtures.table(data / "dispositions/a/part-00000.parquet", [{"id": "a/0"}])
    for source, source_texts in (("a", texts[::2]), ("b", texts[1::2])):
        rows = [{"id": f"{source}/{n}", "text": text, "source": source, "license": "MIT", "origin": "o", "split": "train",
                 "content_hash": release_fixtures.sha(text)} for n, text in enumerate(source_texts)]  # fmt: skip
        if rows:
            release_fixtures.table(data / f"kept/{source}/part-00000.parquet", rows)
    write_sums(data / SUMS, data, [path for path in files_below(data) if path != SUMS])
    return folder


CHARACTERS = st.text(st.sampled_from('ab"\0\n* é🦊\ufffd\uffff\u0301\u2028'), max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(CHARACTERS, min_size=1, max_size=6), st.lists(CHARACTERS.filter(bool), max_size=4), st.data())
def test_any_text_and_any_span(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], spans: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    release = repository(folder, texts)
    for text in texts:
        if text:
            start = data.draw(st.integers(0, len(text) - 1))
            spans.append(text[start : data.draw(st.integers(start + 1, len(text)))])
    for span in spans:
        agrees(release, span)
    shutil.rmtree(folder)


def test_rows_are_found_in_every_row_group(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    release = repository(tmp_path, [f"text number {n} of many" for n in range(200)])
    data = release / "dataset"
    for path in kept_tables(release):
        pq.write_table(pq.read_table(path), path, row_group_size=7)
    write_sums(data / SUMS, data, [path.relative_to(data).as_posix() for path in kept_tables(release)])
    for n in range(0, 200, 9):
        assert len(agrees(release, f"number {n} of").matches) == 1
    assert len(agrees(release, "number 1").matches) == 111
    long = "text number 77 of many" * 500
    assert agrees(release, long).matches == []


def test_what_cannot_be_searched_is_refused(release: Path, alone: Path) -> None:
    with pytest.raises(AtomError, match="the span is empty"):
        tracing.trace_text(release, "")
    with pytest.raises(AtomError, match="not valid Unicode text"):
        tracing.trace_text(release, "a\udc80b")
    kept = kept_of(alone, "sums")[-1]
    kept.write_bytes(kept.read_bytes()[:200])
    with pytest.raises(AtomError, match=f"{kept.name} cannot be read as Parquet"):
        tracing.trace_text(alone, "said")


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)


def test_a_request_for_removal_names_every_file(release: Path) -> None:
    """Against a reading of every value of every table and JSON file."""
    content: dict[str, list[list[str]]] = {}
    for path in files_below(release):
        if path.endswith(".parquet"):
            content[path] = [list(strings(row)) for row in
                             ([v for v in r.values() if isinstance(v, str)] for r in read_rows(release / path))]  # fmt: skip
        elif path.endswith((".json", ".jsonl")) and not path.startswith("code/"):
            text = (release / path).read_text()
            lines = text.splitlines() if path.endswith(".jsonl") else [text]
            content[path] = [[s for line in lines for s in strings(json.loads(line))]]
    roots = merkle.roots(release / "dataset")
    ids_of_table = {t: {row["id"] for f in table_files(release, t) for row in read_rows(release / f)} for t in roots}
    texts: dict[str, set[str]] = {}
    for _, row in kept_documents(release):
        texts.setdefault(row["id"], set()).add(row["text"])
    texts["prose/003"] = texts["sums/007"] = texts["prose/001"]  # the same text, of those that were removed
    found_in = set()
    for id in [*ids(release), "old/1"]:
        report = tracing.trace_removal(release, id)
        expected = []
        for path, rows in content.items():
            by_id = sum(id in row for row in rows)
            by_text = sum(any(text in s for s in row for text in texts.get(id, ())) for row in rows)
            if by_id or by_text:
                expected.append({"path": path, "by_id": by_id, "by_text": by_text})
        assert [
            {k: v for k, v in dataclasses.asdict(row).items() if k != "repository"} for row in report.files
        ] == expected, id
        found_in |= {row.path for row in report.files}
        assert report.document == tracing.trace_document(release, id)
        assert set(report.proofs) == {table for table in roots if id in ids_of_table[table]}
        assert [merkle.check(dataclasses.asdict(proof), roots) for proof in report.proofs.values()] == [None] * len(
            report.proofs
        )
        page = tracing.text(report)
        assert all(row["path"] in page for row in expected) and page.startswith(f"Request to remove {id}\n")
        assert ("a proof: the document is of an earlier run" in page) == (id == "old/1")
        assert plain(report)["document"]["id"] == id
    assert {f"evidence/training/rlvr/{name}.json" for name in "ab"} <= found_in  # an id that JSON writes in two ways
    assert {"dataset/rl/rlvr/rollouts.parquet", "evidence/training/longcontext-2/training.jsonl"} <= found_in
    repositories = {row.path: row.repository for row in tracing.trace_removal(release, "prose/001").files}
    kept = next(path for path in repositories if path.startswith("dataset/kept/prose"))
    assert repositories[kept] == "local/tiny-data"
    assert repositories["evidence/training/longcontext-2/training.jsonl"] == "local/tiny-evidence"
    assert repositories["model/training/longcontext-2.jsonl"] == "local/tiny"


def table_files(release: Path, table: str) -> list[str]:
    """The files of a table that has a root."""
    name = re.sub("^tokens", "tokens/documents", table)
    files = [*release.glob(f"dataset/{name}.parquet"), *sorted(release.glob(f"dataset/{name}/part-*.parquet"))]
    assert files, table
    return [path.relative_to(release).as_posix() for path in files]


def test_duplicates_are_followed_both_ways(release: Path) -> None:
    replaces_this, replaced_by_this, same_text = (
        "it stands for this one",
        "this one stands for it",
        "it has the same text",
    )
    for id, expected in {
        "prose/007": {"sums/003": replaces_this, "sums/002": replaces_this},
        "sums/003": {"sums/002": replaces_this, "prose/007": replaced_by_this},
        "sums/002": {"sums/003": replaced_by_this, "prose/007": replaced_by_this},
        "prose/003": {"prose/001": replaces_this, "sums/007": same_text},
        "prose/001": {"prose/003": replaced_by_this, "sums/007": same_text},
        "sums/007": {"prose/001": same_text, "prose/003": same_text},
        "prose/002": {},
    }.items():
        related = tracing.trace_removal(release, id).related
        assert {row.document.id: row.relation for row in related} == expected
        assert all(row.document == tracing.trace_document(release, row.document.id) for row in related)
    assert tracing.trace_removal(release, "prose/007").related[0].document.checkpoints  # sums/002 was trained on


def test_of_the_data_alone_it_says_what_it_cannot_tell(release: Path, alone: Path, tmp_path: Path) -> None:
    for id in ("prose/001", "prose/003", "old/1"):
        complete, partial = tracing.trace_document(release, id), tracing.trace_document(alone, id)
        assert partial.checkpoints is None and partial.fates == complete.fates
        unmoved = [dataclasses.replace(use, moved=None) for use in complete.uses]
        assert partial.uses == unmoved and partial.models == complete.models
        assert [text.split(":")[0] for text in partial.unknown] == [
            "which checkpoints include a step", "which steps moved no weight"
        ]  # fmt: skip
        assert "unknown here: which checkpoints" in tracing.text(partial)
        report = tracing.trace_removal(alone, id)
        assert all(row.repository is None for row in report.files) and "only the data is here" in str(report.unknown)
        assert report.proofs == tracing.trace_removal(release, id).proofs
        paths = {row.path for row in tracing.trace_removal(release, id).files if row.path.startswith("dataset/")}
        assert {f"dataset/{row.path}" for row in report.files} == paths
    step = tracing.trace_step(alone, "longcontext-2", 1)
    assert step.moved is None and step.segments == tracing.trace_step(release, "longcontext-2", 1).segments
    assert len(step.unknown) == 1 and tracing.trace_step(release, "longcontext-2", 1).unknown != step.unknown
    partial = tracing.trace_text(alone, "said")
    assert [m.id for m in partial.matches] == ["prose/001", "prose/006"] and len(partial.unknown) == 1
    assert tracing.trace_document(release, "prose/001").unknown == [
        "which steps of earlier runs moved no weight: their logs are not published"
    ]


def test_what_a_terminal_would_obey_is_not_printed(release: Path) -> None:
    document = tracing.trace_document(release, "prose/001")
    disposition = dataclasses.replace(document.fates[0], origin="a\nb", license="\x9b2J")
    page = tracing.text(dataclasses.replace(document, id="prose/\x1b[2J", fates=[disposition]))
    assert "\x1b" not in page and r"prose/\x1b[2J" in page and r"\x9b2J; a\nb" in page
