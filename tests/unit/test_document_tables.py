"""Licenses and languages of documents on the data card, against sums over all rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import CheckFailed
from pipeline.core.parts import part_file
from release.cards import document_tables
from release.facts import document_facts
from release.facts.data_facts import DataFacts, SourceFacts
from release.facts.document_facts import read_document_facts
from stages.data.acquire.licenses.expressions import asks_for_attribution
from stages.formats.table import NOTICES, TOKENIZED, content_hash, stream_rows, write_rows

LICENSES = ("CC-BY-4.0", "CC0-1.0", "MIT OR Apache-2.0", "LicenseRef-unknown-web")


def write_dataset(folder: Path, licenses: tuple[str, ...] = LICENSES) -> list[dict[str, Any]]:
    rng, rows = random.Random(0), list[dict[str, Any]]()
    for source in ("web", "books"):
        for part in range(2):
            rows_of_part = [
                {"split": "heldout" if n % 7 == 3 else "train", "source": source, "part": part, "ordinal": n, "id": f"{source}/{part}/{n}",
                 "content_hash": "0" * 64, "license": rng.choice(licenses), "bytes": 1, "loss_from": 0,
                 "tokens": rng.choice([10, 256, 257, 5000, 300_000])}
                for n in range(50)
            ]  # fmt: skip
            write_rows(folder / "tokens/documents" / source / part_file(part), TOKENIZED, rows_of_part)
            rows += rows_of_part
    counts = [
        {"license": "CC-BY-4.0", "found": "page", "documents": 7, "bytes": 1},
        {"license": "CC-BY-4.0", "found": "field", "documents": 5, "bytes": 1},
        {"license": "LicenseRef-unmapped", "found": "none", "documents": 9, "bytes": 1},
    ]
    (folder / "sources").mkdir()
    web = {"license": "CC0-1.0", "documents": 100, "licenses": counts}
    (folder / "sources/web.json").write_text(json.dumps(web))
    (folder / "sources/books.json").write_text(json.dumps({"license": "CC0-1.0", "documents": 60}))
    return rows


def test_facts_are_the_sums_over_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_facts, "BATCH", 7)
    rows, facts = write_dataset(tmp_path), read_document_facts(tmp_path)
    assert set(facts.licenses) == set(LICENSES)
    for license, row in facts.licenses.items():
        tokens = [document["tokens"] for document in rows if document["license"] == license]
        assert (row.documents, row.tokens) == (len(tokens), sum(tokens))
    assert [row.tokens for row in facts.licenses.values()] == sorted(
        (r.tokens for r in facts.licenses.values()), reverse=True
    )
    assert dict(facts.licenses["CC-BY-4.0"].bases) == {"page": 7, "field": 5}
    assert dict(facts.licenses["CC0-1.0"].bases) == {"": 60}, "of books, whose license is that of every document"


def test_the_card_says_how_licenses_were_found(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    data = DataFacts(documents=read_document_facts(tmp_path))
    by_license = {line.split(" | ")[0].removeprefix("| "): line for line in document_tables.licenses(data)[2:]}
    assert by_license["CC-BY-4.0"].endswith("| in a field of the document: 5; on its page: 7 |")
    assert by_license["CC0-1.0"].endswith("| declared by the source |")
    assert by_license["LicenseRef-unknown-web"].endswith("|  |"), "no source states it"
    shares = [float(line.split(" | ")[3].rstrip("%")) for line in by_license.values()]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_many_licenses_share_the_last_row(tmp_path: Path) -> None:
    names = tuple(f"LicenseRef-{n:02d}" for n in range(40))
    rows = write_dataset(tmp_path, names)
    used = {row["license"] for row in rows}
    lines = document_tables.licenses(DataFacts(documents=read_document_facts(tmp_path)))
    assert len(lines) == 2 + document_tables.MOST_LICENSES + 1
    assert lines[-1].startswith(f"| {len(used) - document_tables.MOST_LICENSES} other expressions | ")
    documents = [int(line.split(" | ")[1].replace(",", "")) for line in lines[2:]]
    assert sum(documents) == len(rows)


@pytest.mark.parametrize(
    "expression, asks",
    [("CC-BY-SA-4.0", True), ("MIT OR (CC0-1.0 AND Zlib)", True), ("GPL-2.0-or-later WITH x", True),
     ("MIT OR CC0-1.0", False), ("MIT AND CC0-1.0", True), ("Zlib", True), ("LicenseRef-CC-BY-2.0-FR", True),
     ("MIT OR", True), ("(" * 5000, True), ("LicenseRef-unknown-web", False), ("CC0-1.0", False), ("LicenseRef-public-domain", False), ("Unlicense", False)],
)  # fmt: skip
def test_licenses_that_ask_for_attribution(expression: str, asks: bool) -> None:
    assert asks_for_attribution(expression) == asks


COLUMNS = {"id": "string", "language": "string", "language_score": "float"}


def write_measures(dataset: Path, source: str, part: int) -> list[dict[str, Any]]:
    """A row for each tokenized document, and for some that deduplication removed; returns those of tokenized ones."""
    rng, rows, measured = random.Random(part), list[dict[str, Any]](), list[dict[str, Any]]()
    for document in stream_rows(dataset / "tokens/documents" / source / part_file(part), ["id", "tokens"]):
        removed = [f"{document['id']}/removed/{n}" for n in range(rng.choice([0, 0, 1, 9]))]
        for id in [*removed, document["id"]]:
            language = rng.choice(["en", "de", "fr|", None, "en"])
            rows.append({"id": id, "language": language, "language_score": 0.5})
        measured.append({**rows[-1], "tokens": document["tokens"]})
    rows.append({"id": "a last one that was removed", "language": "en", "language_score": 0.5})
    write_rows(dataset / "measures" / source / part_file(part), COLUMNS, rows)
    return measured


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_languages_are_those_of_the_tokenized_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(document_facts, "BATCH", batch)
    write_dataset(tmp_path)
    rows = [row for part in range(2) for row in write_measures(tmp_path, "web", part)]
    facts = read_document_facts(tmp_path)
    assert list(facts.languages) == ["web"] and facts.measured, "no step measured the documents of books"
    tokens = {
        language: [row["tokens"] for row in rows if (row["language"] or "") == language]
        for language in ("en", "de", "fr|", "")
    }
    assert {name: (row.documents, row.tokens) for name, row in facts.languages["web"].items()} == {
        name: (len(each), sum(each)) for name, each in tokens.items()
    }


def test_the_card_has_languages_and_names_sources_without(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    for part in range(2):
        write_measures(tmp_path, "web", part)
    source = SourceFacts(1, 1, {}, {}, 1, 1, [], "", "")
    data = DataFacts(sources={"books": source, "web": source}, documents=read_document_facts(tmp_path))
    lines = document_tables.languages(data)
    assert lines[0].endswith("No step identified it in books.")
    assert {line.split(" | ")[1] for line in lines[4:]} == {"en", "de", "fr\\|", "not identified"}
    shares = [float(line.split(" | ")[4].rstrip("% |")) for line in lines[4:]]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.2)


def test_a_release_without_measures_has_no_table(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    data = DataFacts(documents=read_document_facts(tmp_path))
    assert document_tables.languages(data) == [] and not data.documents.measured


@pytest.mark.parametrize("damage", ["missing", "late"])
def test_measures_of_other_documents_are_refused(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_facts, "BATCH", 5)
    write_dataset(tmp_path)
    write_measures(tmp_path, "web", 0)
    path = tmp_path / "measures/web" / part_file(0)
    rows = list(stream_rows(path, list(COLUMNS)))
    first = next(n for n, row in enumerate(rows) if row["id"] == "web/0/7")
    row = rows.pop(first)
    if damage == "late":
        rows.append(row)
    write_rows(path, COLUMNS, rows)
    sentence = "does not have the document web/0/[78] among"
    with pytest.raises(CheckFailed, match=f"measures/web/{part_file(0)} .*{sentence}"):
        read_document_facts(tmp_path)


def test_attribution_tables_list_the_documents_that_ask_for_it(tmp_path: Path) -> None:
    rows = write_dataset(tmp_path)
    asking = [row for row in rows if row["license"] in ("CC-BY-4.0", "MIT OR Apache-2.0")]
    for source in ("web", "books"):
        ids = [{"id": row["id"]} for row in asking if row["source"] == source]
        write_rows(tmp_path / f"attribution/{source}" / part_file(0), {"id": "string"}, ids[:3])
        write_rows(tmp_path / f"attribution/{source}" / part_file(1), {"id": "string"}, ids[3:])
    facts = read_document_facts(tmp_path)
    assert facts.attributed["web"] == sum(row["source"] == "web" for row in asking) > 10
    (tmp_path / "attribution/web" / part_file(1)).unlink()
    with pytest.raises(CheckFailed, match="attribution/web lists 3 documents, and the licenses of [0-9]+ ask"):
        read_document_facts(tmp_path)


def test_each_notice_has_its_text_once(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    rows = [
        {"sha256": content_hash(text), "source": "web", "package": f"{n}.deb", "path": "copyright", "text": text}
        for n, text in enumerate(["one", "two", "one"])
    ]
    rows[2]["text"] = ""
    for part in range(2):
        write_rows(tmp_path / "notices/web" / part_file(part), NOTICES, rows[part * 2 : part * 2 + 2])
    facts = read_document_facts(tmp_path)
    assert facts.notices == 2
    write_rows(tmp_path / "notices/web" / part_file(0), NOTICES, [{**rows[0], "text": "another"}])
    with pytest.raises(CheckFailed, match=f"notices has no text whose SHA-256 is {rows[0]['sha256']}"):
        read_document_facts(tmp_path)
