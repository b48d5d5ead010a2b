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

# The rule of the dispositions.
OPT_OUT_RULE = "opt_out"
Kind = Literal["id", "content_hash", "url", "host"]
KINDS: tuple[Kind, ...] = ("id", "content_hash", "url", "host")
Match = Literal["id", "content_hash", "url", "host", "derived"]
# The maximum number of lines: each takes some 200 bytes of memory in every task. A host stands for all its pages.
MOST_ENTRIES = 1_000_000
MOST_LINE_BYTES = 20_000
# (file and number of the line for messages, line).
Line = tuple[str, bytes]
HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_-]{1,63})*")
IP_ADDRESS = re.compile(r"[0-9.]+|[0-9a-f]*:[0-9a-f:.]*")
WEB = ("http://", "https://")
REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")


@dataclass(frozen=True)
class Denial:
    """The requests that a document falls under.

    Attributes:
        kind: The way in which the first one names it.
        requests: The SHA-256 of each reference, sorted.
    """

    kind: Match
    requests: tuple[str, ...]

    @property
    def match(self) -> str:
        """The column `match` of its disposition."""
        return match_text(self.kind, " ".join(self.requests))


def match_text(kind: str, requests: str) -> str:
    """Returns the column `match` of a document that was removed on request.

    `requests` are hashes with spaces between them.
    """
    return f"{kind} {requests}"


class DenyList:
    """The entries of a deny-list, by what they name."""

    def __init__(self, lines: Iterable[Line]) -> None:
        """Raises RecipeError for the first line that is no entry."""
        self.entries: dict[Kind, dict[str, list[str]]] = {kind: defaultdict(list) for kind in KINDS}
        self.pages: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.dates: dict[str, str] = {}
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        for number, (place, line) in enumerate(lines, 1):
            if number > MOST_ENTRIES:
                raise RecipeError(f"{place}: more than {MOST_ENTRIES} entries; name hosts instead of their pages")
            self._add(place, line)

    def requests(self) -> list[dict[str, Any]]:
        """Returns the SHA-256 of the reference of every request, its date, and the number of its entries by kind."""
        return [
            {"request": request, "date": self.dates[request], "entries": dict(sorted(self.counts[request].items()))}
            for request in sorted(self.dates)
        ]

    def find(self, id: str, origin: str, hashes: Iterable[str], parents: Iterable[str] = ()) -> Denial | None:
        """Returns the requests that a document falls under, or None.

        Args:
            id: The id of the document.
            origin: Its origin: a URL if it starts with http.
            hashes: SHA-256 of its text, as acquired and as kept.
            parents: The ids or URLs of the documents that it was made from.
        """
        matches: list[tuple[Match, str]] = []
        # The order of the kinds matters: the first match names the removal.
        matches += [("id", request) for request in self._by_id(id)]
        matches += [("content_hash", r) for hash in hashes for r in self.entries["content_hash"].get(hash, ())]
        matches += self._by_address(origin)
        for parent in parents:
            by_address = [request for _, request in self._by_address(parent)]
            matches += [("derived", request) for request in [*self._by_id(parent), *by_address]]
        if not matches:
            return None
        return Denial(matches[0][0], tuple(sorted({request for _, request in matches})))

    def _by_id(self, id: str) -> Iterator[str]:
        """Yields the requests that name an id.

        An entry also names the parts of a document: `a/b` names the turn `a/b#0` of a conversation.
        """
        ids = self.entries["id"]
        if ids:
            yield from ids.get(id, ())
            yield from ids.get(id.rpartition("#")[0], ()) if "#" in id else ()

    def _by_address(self, origin: str) -> list[tuple[Match, str]]:
        """Returns the requests that name a page or its host.

        An entry of a page also names its parts, and one of a part the page that is stored as a whole.
        """
        if not (self.pages or self.entries["host"]) or (address := page_address(origin)) is None:
            return []
        part, pages = address.fragment, self.pages.get(address.page, ())
        matches: list[tuple[Match, str]] = []
        matches += [("url", request) for stated, request in pages if stated == part or not (stated and part)]
        for host in host_and_parents(address.host):
            matches += [("host", request) for request in self.entries["host"].get(host, ())]
        return matches

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
        # Only the hash is published; whoever made the request can find it by the reference.
        request = sha256_bytes(reference.encode())
        # One request has one date; two would make the evidence ambiguous.
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


def _parse(place: str, line: bytes) -> dict[str, Any]:
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
    """Returns the form in which an entry is compared. Raises ValueError in words."""
    if kind == "content_hash":
        if not re.fullmatch("[0-9a-f]{64}", value.lower()):
            raise ValueError("is no SHA-256 of a text, 64 hex digits")
        return value.lower()
    if kind == "host":
        return listed_host(value)
    if not value.strip():
        raise ValueError("is empty")
    return value


def _page(value: str) -> tuple[str, str]:
    """Returns (page, fragment) of a URL. Raises ValueError in words."""
    if not value.lower().startswith(WEB):
        raise ValueError("does not start with http:// or https://")
    address = parse_url(value)
    return address.page, address.fragment


def digest_of(path: Path) -> str:
    """Returns the digest of a deny-list, `sha256:…`, whose lines were all read. Raises RecipeError."""
    content = _read_bytes(path)
    # Parsed while planning, so that a wrong line is found before any stage runs.
    DenyList(_lines(path, content))
    return f"sha256:{sha256_bytes(content)}"


def read(path: str | None, sha256: str | None) -> DenyList | None:
    """Returns the deny-list that a config names by path and digest, or None without a path.

    Raises RecipeError if it cannot be read, or has another digest, and AtomError for a digest that is not resolved.
    """
    if path is None:
        return None
    if sha256 is None:
        raise AtomError(f"deny-list {path} has no digest; run through the recipe's resolved() form")
    content = _read_bytes(Path(path))
    if sha256 != f"sha256:{sha256_bytes(content)}":
        raise RecipeError(f"deny-list {path} changed after the run was planned; plan and run again")
    return DenyList(_lines(Path(path), content))


def lines(path: Path) -> Iterator[Line]:
    """Yields the lines that are not empty.

    Raises RecipeError if the file cannot be read, or for a line that is too long.
    """
    return _lines(path, _read_bytes(path))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"deny-list {path} cannot be read ({reason}); check curation.deny_list") from None


def _lines(path: Path, content: bytes) -> Iterator[Line]:
    for number, line in enumerate(content.split(b"\n"), 1):
        place = f"deny-list {path}, line {number}"
        if len(line) > MOST_LINE_BYTES:
            raise RecipeError(f"{place}: has {len(line)} bytes; an entry has at most {MOST_LINE_BYTES}")
        if line.strip():
            yield place, line


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of a URL that are equal for equal pages: without the scheme and the port, in one form of quoting.

    Attributes:
        host: In lower case and ASCII.
        path: From the first slash on.
        query: With its question mark, or empty.
        fragment: Unquoted.
    """

    host: str
    path: str
    query: str
    fragment: str

    @property
    def site(self) -> str:
        """The host, without `www.`."""
        return self.host.removeprefix("www.")

    @property
    def page(self) -> str:
        """The site, path and query, without a final slash of the path."""
        return f"{self.site}{self.path.rstrip('/')}{self.query}"


def parse_url(url: str) -> Address:
    """Parses a URL. Raises ValueError, whose text continues a sentence about the URL."""
    try:
        parts = urlsplit(url)
        host = host_name(parts.hostname or "")
    except ValueError:
        raise ValueError("is no URL with a host") from None
    # A user name in a list would be personal data, and is no part of a page.
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a user name; leave it out")
    # Quoting is undone and done again, so that %7E and ~ are equal.
    path = quote(unquote(parts.path), safe="/:@!$&'()*+,;=~")
    query = f"?{quote(unquote(parts.query), safe='/:@!$&()*+,;=?~%')}" if parts.query else ""
    return Address(host, path, query, unquote(parts.fragment))


def page_address(origin: str) -> Address | None:
    """Returns the address of a document by its column `origin`; None if that is no URL of a page."""
    if not origin.startswith(WEB):
        return None
    try:
        return parse_url(origin)
    except ValueError:
        return None


def host_name(text: str) -> str:
    """Returns a host in lower case and in ASCII. Raises ValueError, whose text continues a sentence about the host."""
    name = text.strip().rstrip(".").lower()
    if not name.isascii():
        try:
            name = name.encode("idna").decode()
        except UnicodeError:
            name = ""
    if not (HOST.fullmatch(name) or re.fullmatch(r"[0-9a-f:.]{2,45}", name)):
        raise ValueError("is no host, such as example.org")
    return name


def listed_host(text: str) -> str:
    """Returns the form of a host in a list that `host_and_parents` yields. Raises what `host_name` raises."""
    return host_name(text).removeprefix("www.")


def host_and_parents(host: str) -> Iterator[str]:
    """Yields the names under which a list may have a host: its own, and those of the hosts above it."""
    yield host
    # An IP address has no hosts above it.
    if not IP_ADDRESS.fullmatch(host):
        labels = host.split(".")
        yield from (".".join(labels[start:]) for start in range(1, len(labels)))
