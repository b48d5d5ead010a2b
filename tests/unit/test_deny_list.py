"""The deny-list: what an entry names, and files that are no deny-list."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.core.errors import RecipeError
from stages.data.curate import deny_list
from stages.data.curate.deny_list import DenyList

REQUEST = {"request": "2026-0017", "date": "2026-11-03"}
HASH = hashlib.sha256(b"text").hexdigest()


def list_of(**entry: str) -> DenyList:
    return DenyList([("deny-list d, line 1", json.dumps({**REQUEST, **entry}).encode())])


@pytest.mark.parametrize(
    ("entry", "origin", "denied"),
    [
        ("https://example.org/a", "http://EXAMPLE.org:8080/a/", True),
        ("http://www.example.org/a%20b", "https://example.org/a b", True),
        ("https://example.org/a", "https://example.org/a/b", False),
        ("https://example.org/a?p=1", "https://example.org/a", False),
        ("https://example.org/a?p=1", "https://example.org/a?p=1", True),
        ("https://example.org/a", "https://example.org/a#part", True),
        ("https://example.org/a#part", "https://example.org/a", True),
        ("https://example.org/a#part", "https://example.org/a#other", False),
        ("https://bücher.example/", "https://xn--bcher-kva.example", True),
        ("https://example.org/", "example.org/", False),
        ("https://example.org/", "https://", False),
        ("https://example.org/", "https://[bad", False),
    ],
)
def test_a_url_is_a_page_however_it_is_written(entry: str, origin: str, denied: bool) -> None:
    denial = list_of(url=entry).find("web/1", origin, [])
    assert (denial is not None) == denied
    assert denial is None or denial.match == f"url {hashlib.sha256(b'2026-0017').hexdigest()}"


@pytest.mark.parametrize(
    ("host", "denied"),
    [("example.org", True), ("www.Example.org.", True), ("blog.example.org", True), ("other.example.org", False),
     ("ample.org", False), ("org", True)],
)  # fmt: skip
def test_a_host_is_also_its_subdomains(host: str, denied: bool) -> None:
    assert (list_of(host=host).find("web/1", "https://a.blog.example.org/x", []) is not None) == denied


def test_an_id_is_also_the_turns_of_a_conversation() -> None:
    entries = list_of(id="chat/a#b")
    assert [entries.find(id, "", []) is not None for id in ("chat/a#b", "chat/a#b#1", "chat/a", "chat/a#c")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert list_of(id="web/1").find("made/1", "", [], ["web/2", "web/1"]) == deny_list.Denial(
        "derived", (hashlib.sha256(b"2026-0017").hexdigest(),)
    )
    assert list_of(content_hash=HASH.upper()).find("x", "", ["0" * 64, HASH]) is not None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "no JSON object of one entry"),
        (b"[1]", "no JSON object of one entry"),
        (b"\xff", "no JSON object of one entry"),
        (b'{"id": "a", "id": "b"}', "a field occurs twice"),
        (b"[" * 19_000, "no JSON object of one entry"),
        (b'"' + b"a" * 30_000 + b'"', "at most 20000"),
        ({}, "has the fields request, date and one of id, content_hash, url, host"),
        ({"id": "a", "url": "https://a.example"}, "has the fields request, date and one of"),
        ({"id": "a", "name": "Jane Roe"}, "no others"),
        ({"id": "a", "request": "jane@roe.example"}, "no name and no address of a person"),
        ({"id": "a", "request": 17}, "reference of the request"),
        ({"id": "a", "date": "3.11.2026"}, "no day of the form 2026-11-03"),
        ({"id": "a", "date": "2026-02-30"}, "no day of the form 2026-11-03"),
        ({"id": 1}, "id is no text"),
        ({"id": " "}, "id is empty"),
        ({"content_hash": "abc"}, "content_hash is no SHA-256 of a text"),
        ({"url": "example.org/a"}, "url does not start with http"),
        ({"url": "https://"}, "url is no URL with a host"),
        ({"url": "https://jane:pass@a.example/"}, "url holds a user name"),
        ({"host": "https://a.example"}, "host is no host, such as example.org"),
        ({"host": ""}, "host is no host"),
    ],
)  # fmt: skip
def test_another_line_is_one_sentence_with_its_number(tmp_path: Path, line: object, problem: str) -> None:
    path = tmp_path / "deny.jsonl"
    content = line if isinstance(line, bytes) else json.dumps({**REQUEST, **line}).encode()  # type: ignore[dict-item]
    path.write_bytes(json.dumps({**REQUEST, "id": "a"}).encode() + b"\n\n" + content + b"\n")
    with pytest.raises(RecipeError, match=f"deny-list {path}, line 3: .*{problem}") as error:
        deny_list.digest_of(path)
    assert "\n" not in str(error.value)


def test_one_request_has_one_date(tmp_path: Path) -> None:
    path = tmp_path / "deny.jsonl"
    lines = [{**REQUEST, "id": "a"}, {**REQUEST, "host": "a.example"}, {**REQUEST, "id": "b", "date": "2026-11-04"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(RecipeError, match="line 3: request 2026-0017 has the date 2026-11-03 in another line"):
        deny_list.digest_of(path)
    path.write_text("\n".join(map(json.dumps, lines[:2])))
    entries = deny_list.read(str(path), deny_list.digest_of(path))
    request = hashlib.sha256(b"2026-0017").hexdigest()
    assert entries is not None and entries.requests() == [
        {"request": request, "date": "2026-11-03", "entries": {"host": 1, "id": 1}}
    ]


def test_a_list_of_too_many_entries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deny_list, "MOST_ENTRIES", 1)
    lines = [(f"line {n}", json.dumps({**REQUEST, "id": str(n)}).encode()) for n in range(2)]
    with pytest.raises(RecipeError, match="more than 1 entries; name hosts"):
        DenyList(lines)
