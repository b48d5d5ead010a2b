"""The readers of web pages on a small web whose right dispositions were written by hand, and on hostile input."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.store import Artifact, write_manifest
from stages.data.acquire import acquire_stage
from stages.data.acquire.readers.base import Document, Refused, Unmapped
from stages.data.acquire.readers.web_pages import Warc
from stages.data.acquire.sources import Source, resolve_tree_digest
from stages.data.acquire.web import pages
from stages.data.curate import filter_stage
from stages.formats.table import ITEMS, part_files, write_rows
from tests.fixtures.small_web_fixtures import PAGES, WEB, html_of, record, records, text_of, write_warc

OPEN = '<link rel="license" href="https://creativecommons.org/licenses/by/4.0/">'
PAGE = {"url": "https://meadow.example/plain", "head": OPEN}


def acquire_config(path: Path, parts: int = 1, **reader: Any) -> dict[str, Any]:
    source = {
        "name": "web",
        "kind": "prose",
        "license": "ODC-By-1.0",
        "license_evidence": "the terms of the crawl",
        "origin": "https://crawl.example",
        "reader": {"reader": "warc", "path": str(path), **reader},
        "parts": parts,
    }
    digest = resolve_tree_digest(Source.model_validate(source))
    return {"source": {**source, "tree_digest": digest}, "seed": 0}


def filtered(acquired: Artifact, folder: Path, run_stage: Any, allow: list[str], parts: int = 1) -> Artifact:
    write_rows(folder / "items/items.parquet", ITEMS, [])
    items = write_manifest(folder / "items", "items")
    source = {"name": "web", "kind": "prose", "license_allow": allow, "parts": parts}
    config = {"sources": [source], "curation": {"minhash": None, "alarm_share": 1.0}, "seed": 0}
    result: Artifact = run_stage(filter_stage.STAGE, config, {"web": acquired, "items": items})
    return result


def rows(artifact: Artifact, table: str) -> list[dict[str, Any]]:
    return [row for path in part_files(artifact.path, table) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_warc(tmp_path_factory.mktemp("crawl") / "web.warc.gz", records())


@pytest.fixture(scope="module")
def read_pages(crawl: Path) -> dict[str, Any]:
    """{URL of a page: what the reader gives for it}."""
    reader = Warc(reader="warc", path=str(crawl))
    read = list(reader.documents("web", 0, reader.files("web")))
    assert [each.name for each in read] == [f"web.warc.gz:{number}" for number in range(1, len(PAGES) + 1)]
    return {page["url"]: each for page, each in zip(PAGES, read, strict=True)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page["url"].removeprefix("https://"))
def test_a_page_has_the_disposition_written_for_it(page: dict[str, Any], read_pages: dict[str, Any]) -> None:
    read = read_pages[page["url"]]
    if page.get("rule") == "opt_out/page":
        assert isinstance(read, Refused) and f"{read.kind}: {read.reason}" == page["reason"]
    elif page["license"] == "LicenseRef-unmapped":
        assert isinstance(read, Unmapped) and read.license_found == page["found"] and read.license in page["reason"]
    else:
        assert isinstance(read, Document), read
        assert (read.license, read.license_found, read.url) == (page["license"], page["found"], page["url"])
        assert text_of(page.get("text_of", page["url"])) in read.text


def test_the_small_web_through_acquire_and_filter(crawl: Path, tmp_path: Path, run_stage: Any) -> None:
    """Each page has one disposition; the crawl's own license is that of no page, and no origin hides a page's URL."""
    acquired = run_stage(acquire_stage.STAGE, acquire_config(crawl), {})
    dispositions = rows(filtered(acquired, tmp_path, run_stage, WEB["allow"]), "dispositions/web")
    names = {f"web/web.warc.gz:{number}": page for number, page in enumerate(PAGES, 1)}
    assert sorted(row["id"] for row in dispositions) == sorted(names)
    assert {row["id"]: row["rule"] for row in dispositions} == {id: page.get("rule") for id, page in names.items()}
    assert "ODC-By-1.0" not in {row["license"] for row in dispositions}
    documents = {row["id"]: row for row in rows(acquired, "documents")}
    assert {id: row["origin"] for id, row in documents.items()} == {id: names[id]["url"] for id in documents}
    failed = {row["id"]: row["reason"] for row in rows(acquired, "failed")}
    assert failed == {id: page["reason"] for id, page in names.items() if "reason" in page}
    counts = acquired.json("source.json")
    expected = Counter((page["license"], page["found"]) for page in PAGES if "license" in page)
    assert {(row["license"], row["found"]): row["documents"] for row in counts["licenses"]} == expected
    assert counts["documents"] == len(PAGES) and counts["documents_failed"] == 0
    assert counts["documents_opted_out"] == sum(page.get("rule") == "opt_out/page" for page in PAGES)
    assert counts["documents_unmapped"] == sum(row["documents"] for row in counts["licenses_unmapped"]) == 8


def test_parts_give_the_documents_of_the_whole(tmp_path: Path, run_stage: Any) -> None:
    """What a page gives does not depend on the pages that were read before it."""
    for number in range(3):
        write_warc(tmp_path / f"crawl/{number}.warc.gz", records()[number:12:3] * 2)
    whole, parts = (run_stage(acquire_stage.STAGE, acquire_config(tmp_path / "crawl", parts), {}) for parts in (1, 3))
    assert rows(whole, "documents") == rows(parts, "documents") and len(rows(whole, "documents")) == 24
    assert whole.json("source.json")["licenses"] == parts.json("source.json")["licenses"]


def read_warc(path: Path, **settings: Any) -> list[Any]:
    reader = Warc(reader="warc", path=str(path), **settings)
    return list(reader.documents("web", 0, reader.files("web")))


@pytest.mark.parametrize("name", ["cut.warc", "cut.warc.gz"])
def test_a_warc_that_is_cut_in_the_middle_has_one_disposition_there(tmp_path: Path, name: str) -> None:
    """What stands before the cut is used, half a page is not, and the next file is read."""
    whole = records()[:5]
    path = write_warc(tmp_path / name, whole)
    path.write_bytes(path.read_bytes()[:-400])
    write_warc(tmp_path / "next.warc.gz", records()[5:7])
    read = read_warc(tmp_path)
    assert [type(each) for each in read] == [Document] * 4 + [Refused] + [Document] * 2
    assert read[4].name == f"{name}:5" and read[4].kind == "page"
    assert "the file cannot be read from here on" in read[4].reason


@pytest.mark.parametrize(
    "content",
    [b"", b"\x1f\x8b\x08not gzip", b"WARC/1.0\r\nContent-Length: x\r\n\r\n", b"<html>no WARC</html>", b"a" * 5_000_000],
)
def test_a_file_that_is_no_warc_does_not_stop_the_others(tmp_path: Path, content: bytes, run_stage: Any) -> None:
    (tmp_path / "crawl").mkdir()
    (tmp_path / "crawl/a.warc").write_bytes(content)
    (tmp_path / "crawl/b.warc.gz").write_bytes(content)
    write_warc(tmp_path / "crawl/c.warc.gz", [record(PAGE["url"], html_of(PAGE).encode())])
    artifact = run_stage(acquire_stage.STAGE, acquire_config(tmp_path / "crawl"), {})
    assert [row["id"] for row in rows(artifact, "documents")] == ["web/c.warc.gz:1"]
    assert {row["id"] for row in rows(artifact, "failed")} <= {"web/a.warc:1", "web/b.warc.gz:1"}


def bomb(level: int) -> bytes:
    """A page of 100 MB in some hundred kilobytes, as `Content-Encoding: gzip` has it."""
    return gzip.compress(b"<p>" + b"word " * 20_000_000, compresslevel=level, mtime=0)


HOSTILE = {
    "a page of 100 MB": ({}, b"<p>" + b"word " * 20_000_000, "larger than 5000000 bytes"),
    "a bomb": ({"Content-Encoding": "gzip"}, bomb(9), "larger than 5000000 bytes"),
    "an encoding that nobody has": ({"Content-Encoding": "zstd, br"}, b"xx", "its body is encoded as zstd, br"),
    "a body that is cut": ({"Content-Encoding": "gzip"}, zlib.compress(b"x" * 9)[2:], None),
    "an encoding that takes the square of a time": (
        {"Content-Type": "text/html; charset=punycode"}, b"\xff" + b"a-b" * 1_000_000, None,
    ),
    "bytes of no encoding": ({"Content-Type": "text/html; charset=utf-8"}, bytes(range(128, 256)) * 400, None),
    "no text": ({}, b"<html><body></body></html>", "it has no text"),
    "nothing": ({}, b"", "it has no text"),
    "a page of many elements": ({}, b"<p>x</p>" * 60_000, "more than 50000 elements"),
    "elements in each other": ({}, b"<div>" * 100_000, "it has no text"),
    "an address that is none": ({}, html_of(PAGE).encode(), None),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_page_has_one_disposition(tmp_path: Path, case: str) -> None:
    headers, body, reason = HOSTILE[case]
    url = "http://[::1" if "address" in case else f"https://hostile.example/{case.replace(' ', '-')}"
    content = [record(url, body, headers), record(PAGE["url"], html_of(PAGE).encode())]
    first, second = read_warc(write_warc(tmp_path / "web.warc.gz", content))
    assert first.name == "web.warc.gz:1" and isinstance(first, Refused | Document)
    if reason is not None:
        assert isinstance(first, Refused) and (first.kind, first.reason) == ("page", reason)
    assert second.name == "web.warc.gz:2" and second.license == "CC-BY-4.0"


def test_many_unusable_pages_do_not_stop_the_source(tmp_path: Path, run_stage: Any) -> None:
    content = [record(f"https://empty.example/{n}", b"<p></p>") for n in range(30)]
    path = write_warc(tmp_path / "web.warc.gz", [*content, record(PAGE["url"], html_of(PAGE).encode())])
    artifact = run_stage(acquire_stage.STAGE, acquire_config(path), {})
    rules = Counter(row["rule"] for row in rows(filtered(artifact, tmp_path, run_stage, []), "dispositions/web"))
    assert rules == {"page/unusable": 30, None: 1}


def test_records_that_are_no_pages_are_no_documents(tmp_path: Path) -> None:
    html = html_of(PAGE).encode()
    others = [
        record("https://meadow.example/request", html, kind="request"),
        record("https://meadow.example/image", b"GIF89a", {"Content-Type": "image/gif"}),
        record("https://meadow.example/gone", html).replace(b"200 OK", b"404 NO"),
    ]
    assert read_warc(write_warc(tmp_path / "web.warc", others)) == []


def test_the_declared_encoding_is_used_unless_the_bytes_are_utf_8() -> None:
    text = "<p>Привет, мир, как дела сегодня</p>"
    assert pages.decode(text.encode("koi8-r"), "koi8-r") == text
    assert pages.decode(text.encode(), "koi8-r") == text
    assert pages.decode(b"\xff\xfe" + text.encode("utf-16-le"), "") == text
    meta = '<meta charset="windows-1251">' + text
    assert pages.decode(meta.encode("cp1251"), "") == meta
