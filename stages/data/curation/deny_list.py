"""The deny-list: documents that must not be trained on, because somebody asked for it.

A file of JSON Lines. A line names documents in one of four ways, with the reference and the date of the request:

    {"request": "2026-0017", "date": "2026-11-03", "id": "web/page-00042"}
    {"request": "2026-0018", "date": "2026-11-04", "content_hash": "9f86d081…"}
    {"request": "2026-0019", "date": "2026-11-05", "url": "https://example.org/about"}
    {"request": "2026-0020", "date": "2026-11-05", "host": "example.org"}

It has no field for a name or an address: who asked is in the operator's own files under the reference. What is
published holds the SHA-256 of the reference alone.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import sha256_bytes
from pipeline.core.text import escaped

OPT_OUT_RULE = "opt_out"
"""The rule of the dispositions."""
Kind = Literal["id", "content_hash", "url", "host"]
KINDS: tuple[Kind, ...] = ("id", "content_hash", "url", "host")
Found = Literal["id", "content_hash", "url", "host", "derived"]
MOST_ENTRIES = 1_000_000
"""The maximum number of lines: each takes some 200 bytes of memory in every task. A host stands for all its pages."""
MOST_LINE_BYTES = 20_000
REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")
HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_-]{1,63})*")
WEB = ("http://", "https://")


@dataclass(frozen=True)
class Denial:
    """The requests that a document falls under. found: how the first one names it; requests: the SHA-256 of each
    reference, sorted."""

    found: Found
    requests: tuple[str, ...]

    @property
    def match(self) -> str:
        """The column `match` of its disposition."""
        return match_text(self.found, " ".join(self.requests))


def match_text(found: str, requests: str) -> str:
    """The column `match` of a document that was removed on request. requests: hashes with spaces between them."""
    return f"{found} {requests}"


class DenyList:
    """The entries of a deny-list, by what they name."""

    def __init__(self, lines: Iterable[tuple[str, bytes]]) -> None:
        """lines: (place for messages, line). Raises RecipeError for the first one that is no entry."""
        self.entries: dict[Kind, dict[str, list[str]]] = {kind: defaultdict(list) for kind in KINDS}
        self.pages: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.dates: dict[str, str] = {}
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        for number, (place, line) in enumerate(lines, 1):
            if number > MOST_ENTRIES:
                raise RecipeError(f"{place}: more than {MOST_ENTRIES} entries; name hosts instead of their pages")
            self._add(place, line)

    @classmethod
    def read(cls, path: Path, sha256: str) -> DenyList:
        """The deny-list of a file. Raises RecipeError if it cannot be read, or is not the one in the key."""
        content = read_bytes(path)
        if sha256 != f"sha256:{sha256_bytes(content)}":
            raise RecipeError(f"deny-list {path} changed after the run was planned; plan and run again")
        return cls(_lines(path, content))

    def requests(self) -> list[dict[str, Any]]:
        """Every request for the evidence: the SHA-256 of its reference, its date, and its entries by kind."""
        return [
            {"request": request, "date": self.dates[request], "entries": dict(sorted(self.counts[request].items()))}
            for request in sorted(self.dates)
        ]

    def find(self, id: str, origin: str, hashes: Iterable[str], parents: Iterable[str] = ()) -> Denial | None:
        """The requests that a document falls under, or None.

        origin: a URL if it starts with http; hashes: SHA-256 of its text, as acquired and as kept; parents: the ids or
        URLs of the documents that it was made from.
        """
        found: list[tuple[Found, str]] = []
        found += [("id", request) for request in self._by_id(id)]
        found += [("content_hash", r) for hash in hashes for r in self.entries["content_hash"].get(hash, ())]
        found += self._by_address(origin)
        for parent in parents:
            by_address = [request for _, request in self._by_address(parent)]
            found += [("derived", request) for request in [*self._by_id(parent), *by_address]]
        if not found:
            return None
        return Denial(found[0][0], tuple(sorted({request for _, request in found})))

    def _by_id(self, id: str) -> Iterator[str]:
        """An entry also names the parts of a document: `a/b` names the turn `a/b#0` of a conversation."""
        ids = self.entries["id"]
        if ids:
            yield from ids.get(id, ())
            yield from ids.get(id.rpartition("#")[0], ()) if "#" in id else ()

    def _by_address(self, origin: str) -> list[tuple[Found, str]]:
        """An entry of a page also names its parts, and one of a part the page that is stored as a whole."""
        if not (origin.startswith(WEB) and (self.pages or self.entries["host"])):
            return []
        try:
            page, fragment, host = normalized_url(origin)
        except ValueError:
            return []
        hosts = self.entries["host"]
        found: list[tuple[Found, str]] = []
        found += [
            ("url", r) for stated, r in self.pages.get(page, ()) if stated == fragment or not (stated and fragment)
        ]
        labels = host.split(".")
        for start in range(len(labels)):
            found += [("host", request) for request in hosts.get(".".join(labels[start:]), ())]
        return found

    def _add(self, place: str, line: bytes) -> None:
        entry = _parse(place, line)
        kinds = [kind for kind in KINDS if kind in entry]
        if len(kinds) != 1 or set(entry) != {"request", "date", *kinds}:
            raise RecipeError(
                f"{place}: an entry has the fields request, date and one of {', '.join(KINDS)}; no others"
            )
        kind, value = kinds[0], entry[kinds[0]]
        reference, date = entry["request"], entry["date"]
        if not (isinstance(reference, str) and REFERENCE.fullmatch(reference)):
            raise RecipeError(
                f"{place}: request is the reference of the request in your files, such as 2026-0017: at most 64 "
                "letters, digits and . _ - /; no name and no address of a person"
            )
        if not (isinstance(date, str) and _is_date(date)):
            raise RecipeError(f"{place}: date is no day of the form 2026-11-03")
        request = sha256_bytes(reference.encode())
        if self.dates.setdefault(request, date) != date:
            raise RecipeError(f"{place}: request {reference} has the date {self.dates[request]} in another line")
        try:
            if not isinstance(value, str):
                raise ValueError("is no text")
            if kind == "url":
                page, fragment = _page(value)
                self.pages[page].append((fragment, request))
            else:
                self.entries[kind][_key(kind, value)].append(request)
        except ValueError as error:
            raise RecipeError(f"{place}: {kind} {error}") from None
        self.counts[request][kind] += 1


def read_bytes(path: Path) -> bytes:
    """The content of a deny-list. Raises RecipeError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"deny-list {path} cannot be read ({reason}); check curation.deny_list") from None


def digest_of(path: Path) -> str:
    """The digest of a deny-list, `sha256:…`, whose lines were all read. Raises RecipeError."""
    content = read_bytes(path)
    DenyList(_lines(path, content))
    return f"sha256:{sha256_bytes(content)}"


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a deny-list, each with its place for messages. Raises RecipeError if it cannot be read."""
    return _lines(path, read_bytes(path))


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"deny-list {path}, line {number}", line


def _parse(place: str, line: bytes) -> dict[str, Any]:
    if len(line) > MOST_LINE_BYTES:
        raise RecipeError(f"{place}: has {len(line)} bytes; an entry has at most {MOST_LINE_BYTES}")
    try:
        entry = json.loads(line.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{place}: no JSON object of one entry ({escaped(str(error), 100)})") from None
    if not isinstance(entry, dict):
        raise RecipeError(f"{place}: no JSON object of one entry")
    return entry


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields := dict(pairs)) != len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _key(kind: Kind, value: str) -> str:
    """The form in which an entry is compared. Raises ValueError in words."""
    if kind == "content_hash":
        if not re.fullmatch("[0-9a-f]{64}", value.lower()):
            raise ValueError("is no SHA-256 of a text, 64 hex digits")
        return value.lower()
    if kind == "host":
        return _host(value).removeprefix("www.")
    if not value.strip():
        raise ValueError("is empty")
    return value


def _page(value: str) -> tuple[str, str]:
    """(page, fragment) of a URL. Raises ValueError in words."""
    if not value.lower().startswith(WEB):
        raise ValueError("does not start with http:// or https://")
    page, fragment, _ = normalized_url(value)
    return page, fragment


def normalized_url(url: str) -> tuple[str, str, str]:
    """(page, fragment, host) of a URL such that equal pages are equal texts: without the scheme, the port, `www.`, a
    final slash, and differences of quoting. Raises ValueError in words."""
    try:
        parts = urlsplit(url)
        host = _host(parts.hostname or "")
    except ValueError:
        raise ValueError("is no URL with a host") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a user name; leave it out")
    path = quote(unquote(parts.path), safe="/:@!$&'()*+,;=~").rstrip("/")
    query = f"?{quote(unquote(parts.query), safe='/:@!$&()*+,;=?~%')}" if parts.query else ""
    return f"{host.removeprefix('www.')}{path}{query}", unquote(parts.fragment), host


def _host(text: str) -> str:
    """A host in lower case and in ASCII. Raises ValueError in words."""
    name = text.strip().rstrip(".").lower()
    try:
        name = name.encode("idna").decode() if not name.isascii() else name
    except UnicodeError:
        name = ""
    if not (HOST.fullmatch(name) or re.fullmatch(r"[0-9a-f:.]{2,45}", name)):
        raise ValueError("is no host, such as example.org")
    return name


def require_list(path: str | None, sha256: str | None) -> DenyList | None:
    """The deny-list of a config of filter, or None without one. Raises RecipeError, and AtomError for a config whose
    digest is not resolved."""
    if path is None:
        return None
    if sha256 is None:
        raise AtomError(f"deny-list {path} has no digest; run through the recipe's resolved() form")
    return DenyList.read(Path(path), sha256)
