"""Addresses of web pages, as the lists of curation compare them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_-]{1,63})*")
IP_ADDRESS = re.compile(r"[0-9.]+|[0-9a-f]*:[0-9a-f:.]*")
WEB = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of a URL in which equal pages are equal: without the scheme and the port, and in one form of quoting.

    query: with its question mark, or empty; fragment: unquoted.
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
        """The page without a final slash."""
        return f"{self.site}{self.path.rstrip('/')}{self.query}"


def parse_url(url: str) -> Address:
    """Raises ValueError in words."""
    try:
        parts = urlsplit(url)
        host = host_name(parts.hostname or "")
    except ValueError:
        raise ValueError("is no URL with a host") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a user name; leave it out")
    path = quote(unquote(parts.path), safe="/:@!$&'()*+,;=~")
    query = f"?{quote(unquote(parts.query), safe='/:@!$&()*+,;=?~%')}" if parts.query else ""
    return Address(host, path, query, unquote(parts.fragment))


def page_address(origin: str) -> Address | None:
    """The address of a document by its column `origin`; None if that is no URL of a page."""
    try:
        return parse_url(origin) if origin.startswith(WEB) else None
    except ValueError:
        return None


def host_name(text: str) -> str:
    """A host in lower case and in ASCII. Raises ValueError in words."""
    name = text.strip().rstrip(".").lower()
    try:
        name = name.encode("idna").decode() if not name.isascii() else name
    except UnicodeError:
        name = ""
    if not (HOST.fullmatch(name) or re.fullmatch(r"[0-9a-f:.]{2,45}", name)):
        raise ValueError("is no host, such as example.org")
    return name


def listed_host(text: str) -> str:
    """The form of a host that a list names, for `host_and_parents`. Raises ValueError in words."""
    return host_name(text).removeprefix("www.")


def host_and_parents(host: str) -> Iterator[str]:
    """The names under which a list may have a host: its own, and those of the hosts above it."""
    yield host
    if not IP_ADDRESS.fullmatch(host):
        labels = host.split(".")
        yield from (".".join(labels[start:]) for start in range(1, len(labels)))
