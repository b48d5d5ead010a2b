"""Licenses and lengths of documents on the data card, against sums over all rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.parts import part_file
from release.assembly import document_facts
from release.assembly.data_facts import DataFacts, SourceFacts
from release.assembly.document_facts import read_document_facts
from release.cards import document_tables
from stages.data.table import TOKENIZED, write_rows

LICENSES = ("CC-BY-4.0", "CC0-1.0", "MIT OR Apache-2.0", "LicenseRef-unknown-web")


def write_dataset(folder: Path, licenses: tuple[str, ...] = LICENSES) -> list[dict[str, Any]]:
    rng, rows = random.Random(0), list[dict[str, Any]]()
    for source in ("web", "books"):
        for part in range(2):
            rows_of_part = [
                {"split": "train", "source": source, "part": part, "ordinal": n, "id": f"{source}/{part}/{n}",
                 "content_hash": "0" * 64, "license": rng.choice(licenses), "bytes": 1, "loss_from": 0,
                 "tokens": rng.choice([10, 256, 257, 5000, 300_000])}
                for n in range(50)
            ]  # fmt: skip
            write_rows(folder / "tokens/documents" / source / part_file(part), TOKENIZED, rows_of_part)
            rows += rows_of_part
    found = [
        {"license": "CC-BY-4.0", "found": "page", "documents": 7, "bytes": 1},
        {"license": "CC-BY-4.0", "found": "field", "documents": 5, "bytes": 1},
        {"license": "LicenseRef-unmapped", "found": "none", "documents": 9, "bytes": 1},
    ]
    (folder / "sources").mkdir()
    web = {"license": "CC0-1.0", "documents": 100, "licenses": found}
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
    assert dict(facts.licenses["CC-BY-4.0"].found) == {"page": 7, "field": 5}
    assert dict(facts.licenses["CC0-1.0"].found) == {"": 60}, "of books, whose license is that of every document"
    for source, lengths in facts.lengths.items():
        tokens = [row["tokens"] for row in rows if row["source"] == source]
        low = [n for n in tokens if n <= 256]
        assert (lengths.documents[0], lengths.tokens[0]) == (len(low), sum(low)), "a bound is inside its range"
        assert lengths.documents[-1] == tokens.count(300_000) and sum(lengths.documents) == len(tokens) == 100
        assert sum(lengths.tokens) == sum(tokens)


def test_the_card_says_how_licenses_were_found(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    data = DataFacts(documents=read_document_facts(tmp_path))
    by_license = {line.split(" | ")[0].removeprefix("| "): line for line in document_tables.licenses(data)[2:]}
    assert by_license["CC-BY-4.0"].endswith("| in a field of the document: 5; on its page: 7 |")
    assert by_license["CC0-1.0"].endswith("| declared by the source |")
    assert by_license["LicenseRef-unknown-web"].endswith("|  |"), "no source states it"
    shares = [float(line.split(" | ")[3].rstrip("%")) for line in by_license.values()]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    lengths = document_tables.lengths(data)
    assert lengths[0].endswith("| to 65,536 | to 262,144 | above 262,144 |") and lengths[2].startswith("| books | ")


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
     ("CC0-1.0", False), ("LicenseRef-public-domain", False), ("Unlicense", False)],
)  # fmt: skip
def test_licenses_that_ask_for_attribution(expression: str, asks: bool) -> None:
    assert document_tables.asks_for_attribution(expression) == asks


def test_the_card_lists_sources_that_ask_for_attribution() -> None:
    def source(*licenses: str) -> SourceFacts:
        return SourceFacts(1, 1, {}, {}, 1, 1, list(licenses), "https://example.org/corpus", "its card")

    data = DataFacts(sources={"web": source("CC-BY-4.0", "CC0-1.0"), "books": source("CC0-1.0")})
    lines = document_tables.attribution(data)
    assert lines[-1] == "| web | CC-BY-4.0 | https://example.org/corpus | its card |" and len(lines) == 5
    assert document_tables.attribution(DataFacts(sources={"books": source("CC0-1.0")})) == []
