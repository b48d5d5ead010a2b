"""The URL blocklist: hosts and addresses of which no page is used.

A text file with one entry a line. Text from a `#` at the start of a line or after a space is a comment:

    example.org                    # the host, and all hosts below it
    https://example.net/wiki/User: # the pages of the host whose addresses begin so

Entries come from public lists, or from the operator; a request of an author belongs into the deny-list, which also
reaches copies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipeline.core.errors import RecipeError
from pipeline.core.text import escaped
from stages.data.curate.list_file import WEB, Line, ListFile, host_and_parents, listed_host, page_address, parse_url

# The rule of the dispositions, of which `match` is the entry.
BLOCKED_RULE = "url_blocklist"
# The maximum number of entries: in every task a host takes some 120 bytes of memory, and a prefix 280.
MOST_ENTRIES = 10_000_000


class UrlBlocklist:
    """The entries of a URL blocklist.

    Attributes:
        hosts: Hosts, as `listed_host` has them.
        prefixes: Beginnings of addresses, without their schemes.
        lengths: The lengths of the prefixes of each host.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        """Raises RecipeError for the first line that is no entry."""
        self.hosts: set[str] = set()
        self.prefixes: set[str] = set()
        self.lengths: dict[str, tuple[int, ...]] = {}
        for place, line in lines:
            try:
                self._add(line)
            except ValueError as error:
                raise RecipeError(f"{place}: {escaped(_entry(line), 80)} {error}") from None
            if len(self.hosts) + len(self.prefixes) > MOST_ENTRIES:
                raise RecipeError(f"{place}: more than {MOST_ENTRIES} entries; name hosts instead of their pages")

    def find(self, origin: str) -> str | None:
        """Returns the entry that blocks a document, or None.

        `origin` is the URL of the document; an origin that is no URL is not blocked.
        """
        address = page_address(origin)
        if address is None:
            return None
        for host in host_and_parents(address.host):
            if host in self.hosts:
                return host
        page = f"{address.site}{address.path or '/'}{address.query}"
        # A set of prefixes by their lengths: one look-up for each length that the host has.
        for length in self.lengths.get(address.site, ()):
            if page[:length] in self.prefixes:
                return page[:length]
        return None

    def _add(self, line: bytes) -> None:
        """Adds the entry of a line. Raises ValueError in words."""
        entry = _entry(line)
        if "\N{REPLACEMENT CHARACTER}" in entry:
            raise ValueError("is not UTF-8")
        if not entry:
            return
        if len(entry.split()) > 1:
            raise ValueError("has a space; an entry is one host, or the beginning of one URL")
        if "/" not in entry:
            self.hosts.add(listed_host(entry))
            return
        url = entry if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", entry) else f"http://{entry}"
        if not url.lower().startswith(WEB):
            raise ValueError("does not start with http:// or https://")
        address = parse_url(url)
        if address.fragment:
            raise ValueError("has a fragment; leave it out, or put a space before the # of a comment")
        prefix = f"{address.site}{address.path or '/'}{address.query}"
        self.prefixes.add(prefix)
        lengths = self.lengths.get(address.site, ())
        if len(prefix) not in lengths:
            self.lengths[address.site] = tuple(sorted([*lengths, len(prefix)]))


def _entry(line: bytes) -> str:
    """Returns the entry of a line, without its comment; empty if it has none."""
    return re.split(r"(?:^|\s)#", line.decode("utf-8", "replace"), maxsplit=1)[0].strip()


URL_BLOCKLIST = ListFile("URL blocklist", "url_blocklist", UrlBlocklist)
