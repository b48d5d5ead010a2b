"""A list that curation takes from a file of lines, and the addresses of web pages as such lists compare them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import sha256_bytes

MOST_LINE_BYTES = 20_000
# (file and number of the line for messages, line).
Line = tuple[str, bytes]
List = TypeVar("List")
HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_-]{1,63})*")
IP_ADDRESS = re.compile(r"[0-9.]+|[0-9a-f]*:[0-9a-f:.]*")
WEB = ("http://", "https://")


class ListFile(Generic[List]):
    """A kind of list that a recipe can name.

    Attributes:
        title: Name of the list in messages.
        setting: The setting of curation that names the file.
        parse: Makes the list of its lines; raises RecipeError for the first one that is no entry.
    """

    def __init__(self, title: str, setting: str, parse: Callable[[Iterable[Line]], List]) -> None:
        self.title, self.setting, self.parse = title, setting, parse

    def lines(self, path: Path) -> Iterator[Line]:
        """Yields the lines that are not empty.

        Raises RecipeError if the file cannot be read, or for a line that is too long.
        """
        return self._lines(path, self._read_bytes(path))

    def digest_of(self, path: Path) -> str:
        """Returns the digest of a file, `sha256:…`, whose lines were all read. Raises RecipeError."""
        content = self._read_bytes(path)
        # Parsed while planning, so that a wrong line is found before any stage runs.
        self.parse(self._lines(path, content))
        return f"sha256:{sha256_bytes(content)}"

    def read(self, path: Path, sha256: str) -> List:
        """Returns the list of a file. Raises RecipeError if it cannot be read, or has another digest than `sha256`."""
        content = self._read_bytes(path)
        if sha256 != f"sha256:{sha256_bytes(content)}":
            raise RecipeError(f"{self.title} {path} changed after the run was planned; plan and run again")
        return self.parse(self._lines(path, content))

    def require(self, path: str | None, sha256: str | None) -> List | None:
        """Returns the list that the config of a filter names by path and digest, or None without a path.

        Raises what `read` raises, and AtomError for a config whose digest is not resolved.
        """
        if path is None:
            return None
        if sha256 is None:
            raise AtomError(f"{self.title} {path} has no digest; run through the recipe's resolved() form")
        return self.read(Path(path), sha256)

    def _read_bytes(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise RecipeError(f"{self.title} {path} cannot be read ({reason}); check curation.{self.setting}") from None

    def _lines(self, path: Path, content: bytes) -> Iterator[Line]:
        for number, line in enumerate(content.split(b"\n"), 1):
            place = f"{self.title} {path}, line {number}"
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
