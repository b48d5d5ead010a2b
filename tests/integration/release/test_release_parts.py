"""A release whose tables are in several parts: the same facts, and nothing that is wrong in a part goes unnoticed."""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import AtomError
from release import tracing
from release.assembly import build_release as builder
from release.audit.verify import kind_of
from release.cards import croissant
from release.checks import documents
from release.facts.data_facts import read_data_facts
from release.facts.published_tables import read_rows
from release.opened_release import Release
from release.tracing import documents as tracing_documents
from tests.fixtures import release_fixtures
from tests.fixtures.audit_fixtures import verify
from tests.fixtures.corpus_fixtures import LICENSES, Truth, make_corpus

PARTS = 3


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = release_fixtures.build_input(tmp_path_factory.mktemp("run"), parts=PARTS)
    return builder.build(source, tmp_path_factory.mktemp("home"))


@pytest.fixture
def data(in_parts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(in_parts / "dataset", tmp_path / "dataset"))


def test_it_has_the_files_of_the_artifacts_and_verifies(in_parts: Path, tmp_path: Path) -> None:
    origins = json.loads((in_parts / "evidence/origins.json").read_text())
    for path, node, file in (
        ("kept/prose/part-00002.parquet", "dedup", None), ("dispositions/sums/part-00000.parquet", "dedup", None),
        ("measures/prose/part-00001.parquet", "filter", None),
        ("tokens/documents/prose/part-00001.parquet", "tokenize", "documents/prose/part-00001.parquet"),
        ("order/midtrain/part-00001.parquet", "order-midtrain", "part-00001.parquet"),
    ):  # fmt: skip
        assert origins[f"dataset/{path}"] == {"artifact": node, "file": file or path}
    verdict = verify(in_parts, deep=True)
    assert verdict.ok, verdict.to_json()
    alone = Path(shutil.copytree(in_parts / "dataset", tmp_path / "alone"))
    assert kind_of(alone) == "dataset" and verify(alone, deep=True).ok
    (alone / "README.md").unlink()
    assert not verify(alone).ok


def test_its_facts_are_those_of_one_part(built: Path, in_parts: Path) -> None:
    facts, expected = read_data_facts(in_parts / "dataset"), read_data_facts(built / "dataset")
    measured = {
        source: {language: row.documents for language, row in rows.items()}
        for source, rows in facts.documents.languages.items()
    }
    assert measured == {"prose": {"en": 7, "de": 3}}, "of 12 documents without numbers 3 and 7, every third in German"
    documents = dataclasses.replace(facts.documents, languages={})
    assert dataclasses.replace(facts, documents=documents) == expected


OUTPUTS = [f"evaluation/{model}/{table}" for model in ("init", "base", "mid") for table in ("documents", "items")]
OUTPUTS.append("evaluation/memorization/mid/documents")
OUTPUTS += ["evaluation/harness/mid/items"]


def test_it_is_described_by_patterns(built: Path, in_parts: Path) -> None:
    description = json.loads((in_parts / "dataset/croissant.json").read_text())
    patterns = {row["name"]: row.get("includes", row.get("contentUrl")) for row in description["distribution"]}
    assert patterns == {
        "dispositions-parts": "dispositions/*/part-*.parquet", "kept-prose-parts": "kept/prose/part-*.parquet",
        "kept-sums-parts": "kept/sums/part-*.parquet", "tokens-parts": "tokens/documents/*/part-*.parquet",
        "problems.parquet": "evaluation/items.parquet", "measures-prose-parts": "measures/prose/part-*.parquet",
        "attribution-prose-parts": "attribution/prose/part-*.parquet",
        "order-midtrain-parts": "order/midtrain/part-*.parquet", "order-pretrain-parts": "order/pretrain/part-*.parquet",
        **{f"{path.replace('/', '-')}.parquet": f"{path}.parquet" for path in OUTPUTS},
    }  # fmt: skip
    assert croissant.problems(in_parts / "dataset/croissant.json", records=30) == []
    card, other = ((folder / "dataset/README.md").read_text() for folder in (in_parts, built))
    assert "path: kept/prose/*.parquet" in card and "path: dispositions/*/*.parquet" in card
    assert "| `order/<phase>/*.parquet` |" in card and "| `dispositions/<source>/*.parquet` |" in card
    assert "`attribution/` lists each of these documents" in card and "| `attribution/<source>/*.parquet` |" in card
    rows = [
        row for n in range(PARTS) for row in read_rows(in_parts / f"dataset/attribution/prose/part-{n:05d}.parquet")
    ]
    assert [row["id"] for row in rows] == [f"prose/{n:03d}" for n in range(12) if n not in (3, 7)]
    assert rows[1]["title"] == "Title of prose/001" and [rows[n]["author"] for n in (0, 1)] == [None, "Author 1"]
    assert "## Languages of the documents" in card
    assert "| `measures/<source>/*.parquet` |" in card and "measures" not in other and "## Languages" not in other


def change(path: Path, changed: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    pq.write_table(pa.Table.from_pylist(changed(read_rows(path)), pq.read_schema(path)), path)


def with_value(id: str, column: str, value: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda rows: [{**row, column: value} if row["id"] == id else row for row in rows]


def without(id: str) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda rows: [row for row in rows if row["id"] != id]


DISPOSITIONS, KEPT, TOKENS = (
    f"{table}/prose/part-00001.parquet" for table in ("dispositions", "kept", "tokens/documents")
)
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a lost disposition": (
        lambda data: change(data / DISPOSITIONS, without("prose/005")),
        f"{KEPT}: document prose/005 is not kept in both tables",
    ),
    "a lost document": (
        lambda data: change(data / KEPT, without("prose/005")), f"{KEPT}: document prose/005 is not kept in both tables",
    ),
    "the last documents are lost": (
        lambda data: change(data / KEPT, lambda rows: rows[:1]), f"{KEPT}: document prose/005 is not kept in both tables",
    ),
    "a document more": (
        lambda data: change(data / KEPT, lambda rows: [*rows, {**rows[0], "id": "prose/x"}]),
        f"{KEPT}: document prose/x is not kept in both tables",
    ),
    "another order": (
        lambda data: change(data / KEPT, lambda rows: rows[::-1]),
        f"{KEPT}: document prose/006 is not in the order of the dispositions",
    ),
    "another split": (
        lambda data: change(data / KEPT, with_value("prose/005", "split", "heldout")),
        f"{KEPT}: document prose/005 has another split or license than its disposition",
    ),
    "two dispositions": (
        lambda data: change(data / "dispositions/sums/part-00002.parquet", with_value("sums/009", "id", "prose/004")),
        "dispositions/sums/part-00002.parquet: document prose/004 has two fates",
    ),
    "no disposition": (
        lambda data: change(data / DISPOSITIONS, with_value("prose/007", "rule", None)),
        f"{DISPOSITIONS}: document prose/007 is neither kept nor removed by a rule",
    ),
    "another source": (
        lambda data: change(data / DISPOSITIONS, with_value("prose/007", "source", "sums")),
        f"{DISPOSITIONS}: 1 documents of sums stand among those of prose",
    ),
    "a missing part of dispositions": (lambda data: (data / DISPOSITIONS).unlink(), f"{DISPOSITIONS} is missing"),
    "a missing part of all tables": (
        lambda data: [(data / table).unlink() for table in (DISPOSITIONS, KEPT, TOKENS)],
        "dispositions/prose does not have the parts 0 to 1",
    ),
    "no dispositions": (lambda data: shutil.rmtree(data / "dispositions"), "dispositions has no table"),
    "fewer than declared": (
        lambda data: [change(data / table, without("prose/007")) for table in (DISPOSITIONS,)],
        "dispositions: 11 documents of prose, the source says another number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named(damage: str, data: Path) -> None:
    damaged, expected = DAMAGES[damage]
    assert documents.dispositions(Release(data, "dataset")).problems == []
    damaged(data)
    assert expected in documents.dispositions(Release(data, "dataset")).problems


HASHES: dict[str, tuple[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]], list[str]]] = {
    "another text": (KEPT, with_value("prose/005", "text", "!"), [f"{KEPT}: the text of prose/005 is not what its content hash says"]),
    "another split": (
        KEPT, with_value("prose/005", "split", "x"),
        [f"{KEPT}: the split of prose/005 is neither train nor heldout",
         f"{TOKENS}: the content hash of prose/006 is not that of {KEPT}", f"{TOKENS}: prose/005 is no kept document"],
    ),
    "another hash": (
        DISPOSITIONS, with_value("prose/005", "kept_hash", "0"),
        [f"{DISPOSITIONS}: the kept hash of prose/005 is not that of {KEPT}"],
    ),
    "a removed document with a hash": (
        DISPOSITIONS, with_value("prose/007", "kept_hash", "0"), [f"{DISPOSITIONS}: prose/007 has a kept hash, but is not kept"],
    ),
    "other tokens": (
        TOKENS, with_value("prose/006", "content_hash", "0"),
        [f"{TOKENS}: the content hash of prose/006 is not that of {KEPT}"],
    ),
    "lost tokens": (
        TOKENS, without("prose/006"), [f"{TOKENS}: the content hash of prose/006 is not that of {KEPT}"],
    ),
    "tokens of another source": (
        TOKENS, lambda rows: [*rows, {**rows[0], "id": "x", "source": "sums"}], [f"{TOKENS}: x is no kept document"],
    ),
    "tokens twice": (TOKENS, lambda rows: [*rows, rows[-1]], [f"{TOKENS}: prose/004 is no kept document"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", HASHES)
def test_another_text_in_a_part_is_named(damage: str, data: Path) -> None:
    file, changed, expected = HASHES[damage]
    assert documents.content_hashes(Release(data, "dataset")).problems == []
    change(data / file, changed)
    assert documents.content_hashes(Release(data, "dataset")).problems == expected


def test_a_document_without_a_license_is_named(data: Path) -> None:
    change(data / DISPOSITIONS, with_value("prose/007", "license", "Unknown"))
    findings = documents.licenses(Release(data, "dataset"))
    assert findings.problems == [f"{DISPOSITIONS}: document prose/007 of source prose has no license"]
    assert findings.summary == "every document has a license: CC0-1.0, PSF-2.0, Unknown"


DOCUMENTS = 10_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    folder = tmp_path_factory.mktemp("corpus") / "dataset"
    return folder, make_corpus(folder, DOCUMENTS, 4)


def rows_of(data: Path, table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Brute force: every row of every part."""
    for path in sorted((data / table).rglob("part-*.parquet")):
        for row in read_rows(path):
            yield path.relative_to(data).as_posix(), row


def test_the_facts_of_ten_thousand_documents(corpus: tuple[Path, Truth]) -> None:
    data, truth = corpus
    facts = read_data_facts(data)
    for source in LICENSES:
        row = facts.sources[source]
        assert row.documents_in == truth.documents[source]
        assert row.by_split == {split: truth.kept[source, split] for split in ("heldout", "train")}
        assert row.removed == {rule: n for (name, rule), n in sorted(truth.removed.items()) if name == source}
        tokens = [row for _, row in rows_of(data, f"tokens/documents/{source}")]
        assert row.tokens["train"] == sum(row["tokens"] for row in tokens if row["split"] == "train")
        kept = [row for _, row in rows_of(data, f"kept/{source}")]
        assert row.bytes_kept == sum(len(row["text"].encode()) for row in kept)
    [part] = facts.order["pretrain"].parts
    assert {name: (row.documents, row.tokens, row.rows) for name, row in part.by_source.items()} == {
        name: (truth.seen[name], truth.tokens[name], truth.seen[name]) for name in LICENSES
    }
    for check in (documents.dispositions, documents.content_hashes, documents.licenses):
        assert check(Release(data, "dataset")).problems == []


def test_documents_among_ten_thousand_are_traced_as_by_brute_force(corpus: tuple[Path, Truth]) -> None:
    data, _ = corpus
    dispositions = {row["id"]: (table, row) for table, row in rows_of(data, "dispositions")}
    order = [row for _, row in rows_of(data, "order/pretrain")]
    kept = {row["id"]: row for _, row in rows_of(data, "kept")}
    steps: dict[str, list[int]] = {}
    for row in order:
        steps.setdefault(row["id"], []).append(row["step"])
    for id in sorted(dispositions)[::397]:
        document = tracing.trace_document(data, id)
        [fate] = document.fates
        table, row = dispositions[id]
        assert (fate.table, fate.rule, fate.kept_hash) == (table, row["rule"], row["kept_hash"])
        assert fate.origin == (kept[id]["origin"] if id in kept else None)
        assert [use.step for use in document.uses] == steps.get(id, [])
    for n in (1, 7, order[-1]["step"]):
        segments = tracing.trace_step(data, "pretrain", n).segments
        expected = [row for row in order if row["step"] == n]
        assert [segment.id for segment in segments] == [row["id"] for row in expected]
        assert all((s.license, s.origin) == (kept[s.id]["license"], kept[s.id]["origin"]) for s in segments)


@pytest.mark.parametrize("near", [40, 20_000])
def test_the_nearest_id_among_ten_thousand(
    near: int, corpus: tuple[Path, Truth], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing_documents, "NEAR", near)
    data, _ = corpus
    ids = sorted({row["id"] for _, row in rows_of(data, "dispositions")})
    for id in ("aaa", "web", f"{ids[5000]}x", ids[17][:-1], ids[-1] + "z", "zzz", f"{ids[0][:8]}é"):
        if id in ids:
            continue
        position = bisect.bisect(ids, id)
        close = difflib.get_close_matches(id, ids[max(position - near // 2, 0) : position + near // 2], 1, 0.8)
        expected = f"did you mean {close[0]}?" if close else "look for its id in the dispositions"
        with pytest.raises(AtomError) as error:
            tracing.trace_document(data, id)
        assert expected in str(error.value)


def test_texts_among_ten_thousand_are_found(corpus: tuple[Path, Truth], tmp_path: Path) -> None:
    data, _ = corpus
    kept = [row for _, row in rows_of(data, "kept")]
    for span in (kept[4321]["text"][3:40], "word17 word", "no such text"):
        answer = tracing.trace_text(data, span, tmp_path)
        assert {match.id for match in answer.matches} == {row["id"] for row in kept if span in row["text"]}
        assert answer.by == "index"


def test_an_order_that_is_not_by_step_is_refused(data: Path) -> None:
    path = data / "order/pretrain/part-00001.parquet"
    pq.write_table(pq.read_table(path).set_column(0, "step", pa.array([1, 1], pa.int32())), path)
    pq.write_table(
        pq.read_table(path).take(pc.array_sort_indices(pq.read_table(path)["row"], order="descending")), path
    )
    with pytest.raises(AtomError, match="pretrain: the order is not sorted by step and row"):
        read_data_facts(data)
