"""A web page as a document: its text, with the license that it states, or the reason why it is not used.

Nothing depends on the time that a page takes, so that the same pages are used everywhere: pages are bounded by their
bytes and elements instead. Segments that occur on several pages stay, because a page does not depend on others.

Honored as opt-outs are `noai` in X-Robots-Tag and in <meta name="robots">, the TDM Reservation Protocol
(https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240510/), robots.txt (RFC 9309) for crawlers that collect
training data, and `ai-train=no` of Content-Signal in robots.txt.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from stages.data.acquire.licenses.expressions import UNKNOWN_WEB
from stages.data.acquire.readers.base import Document, Refused, Unmapped
from stages.data.acquire.web import claims

# Crawlers and products under whose names robots.txt files state what may be used for training; `*` is every crawler.
# The names were read from https://github.com/ai-robots-txt/ai.robots.txt, robots.txt at
# 000552c2df1fa3359f8d1a745069194dcbf86605.
_AGENTS = """
* AI2Bot anthropic-ai Applebot-Extended Bytespider CCBot ClaudeBot Google-Extended GPTBot Meta-ExternalAgent
cohere-training-data-crawler
"""
AGENTS = tuple(_AGENTS.split())
# Directives with a value after a colon, which are no names of crawlers.
VALUED = frozenset(("max-image-preview", "max-snippet", "max-video-preview", "unavailable_after"))
# RFC 9309, section 2.5: what a crawler must read of a file.
ROBOTS_BYTES = 500 * 1024

# (name, value) of the headers of an HTTP response.
Headers = Sequence[tuple[str, str]]


def stated_in_headers(headers: Headers, agents: Iterable[str]) -> str:
    """Returns the opt-out in the headers of a response, in words; empty if there is none."""
    for name, value in headers:
        if name.lower() == "x-robots-tag" and _refuses("robots", value, agents):
            return f"X-Robots-Tag: {value[:200]}"
        if name.lower() == "tdm-reservation" and value.strip() == "1":
            return "tdm-reservation: 1"
    return ""


def stated_in_page(tree: Any, agents: Iterable[str]) -> str:
    """Returns the opt-out in the <meta> elements of an lxml tree, in words; empty if there is none."""
    for element in tree.iter("meta"):
        name = (element.get("name") or element.get("http-equiv") or "").strip().lower()
        content = element.get("content") or ""
        if _refuses("robots" if name == "x-robots-tag" else name, content, agents):
            return f'<meta name="{name[:60]}" content="{content[:200]}">'
        if name == "tdm-reservation" and content.strip() == "1":
            return '<meta name="tdm-reservation" content="1">'
    return ""


def _refuses(name: str, value: str, agents: Iterable[str]) -> bool:
    """Returns True if directives keep a page from training: `noai` for crawlers, or `noindex` for one of the agents.

    Args:
        name: The crawler that the directives are for, unless one is named before a directive.
        value: The directives.
        agents: The crawlers whose opt-outs are honored.
    """
    crawlers = {agent.lower() for agent in agents if agent != "*"}
    for part in value.lower().split(","):
        crawler, colon, directive = (text.strip() for text in part.partition(":"))
        if colon and crawler in VALUED:
            continue
        # A crawler holds for the directives after it as well, until another one is named.
        name, directive = (crawler, directive) if colon else (name, crawler)
        if directive == "noai" and (name == "robots" or name.endswith("bot") or name in crawlers):
            return True
        if directive in ("noindex", "none") and name in crawlers:
            return True
    return False


@dataclass
class _Group:
    """Rules of robots.txt for some crawlers: (pattern of a path, whether it is allowed), and ai-train=no."""

    agents: set[str] = field(default_factory=set)
    rules: list[tuple[str, bool]] = field(default_factory=list)
    refuses_training: bool = False


class Robots:
    """The robots.txt files of hosts.

    Memory holds the rules for `agents` of every host that has some.
    """

    def __init__(self, agents: Iterable[str]) -> None:
        self._agents = {agent.lower() for agent in agents}
        self._groups: dict[str, list[_Group]] = {}

    def add(self, url: str, content: bytes) -> None:
        """Adds a robots.txt file, by its URL; only that of the root of a host holds."""
        host, path = _split(url)
        if path != "/robots.txt":
            return
        # Rules before the first user agent go to a group that names no crawler, and so have no effect.
        groups, is_open = [_Group()], False
        for line in content[:ROBOTS_BYTES].decode("utf-8", "replace").splitlines():
            key, _, value = line.partition("#")[0].partition(":")
            key, value = key.strip().lower(), value.strip()
            # Consecutive lines of user agents open one group (RFC 9309, section 2.2.1).
            if key == "user-agent":
                if not is_open:
                    groups.append(_Group())
                groups[-1].agents.add(value.lower())
            # An empty Disallow allows everything, just as no rule does.
            elif key in ("allow", "disallow") and value:
                groups[-1].rules.append((value, key == "allow"))
            elif key == "content-signal" and re.search(r"\bai-train\s*=\s*no\b", value, re.IGNORECASE):
                groups[-1].refuses_training = True
            # A blank line or a comment does not end a list of user agents.
            if key:
                is_open = key == "user-agent"
        relevant = [
            group for group in groups if (group.rules or group.refuses_training) and group.agents & self._agents
        ]
        if relevant:
            self._groups[host] = relevant

    def opt_out(self, url: str) -> str:
        """Returns the reason why robots.txt keeps a page from one of the agents; empty if it does not."""
        host, path = _split(url)
        groups = self._groups.get(host, [])
        for agent in sorted(self._agents & {name for group in groups for name in group.agents}):
            agent_groups = [group for group in groups if agent in group.agents]
            if any(group.refuses_training for group in agent_groups):
                return f"robots.txt says ai-train=no for {agent}"
            rules = [rule for group in agent_groups for rule in group.rules]
            matches = [(len(pattern), allowed) for pattern, allowed in rules if _matches(pattern, path)]
            # The longest pattern wins, and of equal ones Allow (RFC 9309, section 2.2.2).
            if matches and not max(matches)[1]:
                return f"robots.txt disallows {path[:200]} for {agent}"
        return ""


def _split(url: str) -> tuple[str, str]:
    """Returns the host, with a port, and the path, with a query, of an address."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "", ""
    return parts.netloc.lower(), (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _matches(pattern: str, path: str) -> bool:
    """Returns True if a pattern of robots.txt matches a path, by RFC 9309, section 2.2.3.

    `*` stands for any text, and `$` for the end. Regular expressions are not used, since their time has no bound.
    """
    ends, pattern = pattern.endswith("$"), pattern.removesuffix("$")
    first, *rest = pattern.split("*")
    if not path.startswith(first):
        return False
    position = len(first)
    for number, piece in enumerate(rest):
        if ends and number == len(rest) - 1:
            return path.endswith(piece) and len(path) - len(piece) >= position
        position = path.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return not ends or position == len(path)


# Elements of a page; an article has a few thousand. The time of the extraction grows with their square: for 200,000
# paragraphs it takes five minutes.
MAX_ELEMENTS = 50_000
# Share of characters that cannot be decoded.
MOST_REPLACED = 0.01
_ENCODINGS = """
ascii big5 big5hkscs cp1250 cp1251 cp1252 cp1253 cp1254 cp1255 cp1256 cp1257 cp1258 cp866 cp874 cp932 cp949 euc_jp
euc_kr gb18030 gb2312 gbk iso2022_jp iso8859-1 iso8859-10 iso8859-13 iso8859-14 iso8859-15 iso8859-16 iso8859-2
iso8859-3 iso8859-4 iso8859-5 iso8859-6 iso8859-7 iso8859-8 koi8-r koi8-u mac-cyrillic mac-roman shift_jis tis-620
utf-16 utf-16-be utf-16-le utf-8
"""
# Of the web (https://encoding.spec.whatwg.org/), by Python's names: others of Python's codecs are none of pages, and
# some of them take a time that grows with the square of a text.
ENCODINGS = frozenset(_ENCODINGS.split())
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\"';\s]{1,40})", re.IGNORECASE)
_DECLARED = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([a-zA-Z0-9_:.-]{1,40})", re.IGNORECASE)


@dataclass(frozen=True)
class Page:
    """A page as it was fetched.

    Attributes:
        name: The name of its document.
        location: The file that has it.
        url: Its address.
        body: The bytes; None if there are more than allowed.
        headers: The headers of the HTTP response.
    """

    name: str
    location: str
    url: str
    body: bytes | None
    headers: Headers = ()


class PageReader:
    """Reads pages.

    `agents` are the crawlers whose opt-outs are honored; `max_bytes` is the limit for a page, named in messages.
    """

    def __init__(self, agents: Sequence[str], max_bytes: int) -> None:
        self.agents, self.max_bytes = agents, max_bytes
        for name in ("trafilatura", "warcio"):  # which log a line for each odd page
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def read(self, page: Page) -> Document | Unmapped | Refused:
        """Returns the document of a page. Never raises for its content."""
        if reason := stated_in_headers(page.headers, self.agents):
            return Refused(page.name, "opt_out", reason)
        if page.body is None:
            return Refused(page.name, "page", f"larger than {self.max_bytes} bytes")
        html = decode(page.body, _charset(page.headers))
        if html is None:
            return Refused(page.name, "page", "its encoding is unknown")
        try:
            return self._read_html(page, html)
        # Troubles of the machine must not remove documents.
        except (MemoryError, OSError):
            raise
        except Exception as error:  # of a parser, on a page that is no page
            return Refused(page.name, "page", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _read_html(self, page: Page, html: str) -> Document | Unmapped | Refused:
        import trafilatura
        from lxml.html import HTMLParser, document_fromstring

        content = html.replace("\0", "").encode()
        if not content.strip():
            return Refused(page.name, "page", "it has no text")
        tree = document_fromstring(content, parser=HTMLParser(encoding="utf-8", remove_pis=True))
        if reason := stated_in_page(tree, self.agents):
            return Refused(page.name, "opt_out", reason)
        # Opt-outs are read first: an opt-out is the more important reason.
        if sum(1 for _ in tree.iter()) > MAX_ELEMENTS:
            return Refused(page.name, "page", f"more than {MAX_ELEMENTS} elements")
        license = claims.license_of(tree, page.url)
        # Precision: a lost paragraph costs less than navigation and advertisements in the text.
        text = trafilatura.extract(tree, include_comments=False, favor_precision=True, deduplicate=False)
        if not text or not text.strip():
            return Refused(page.name, "page", "it has no text")
        if license.expression is not None:
            return Document(page.name, text, page.location, 0, license.expression, page.url, "page")
        if license.stated:
            return Unmapped(page.name, text, license.stated, "page")
        return Document(page.name, text, page.location, 0, UNKNOWN_WEB, page.url, "none")


def decode(body: bytes, charset: str) -> str | None:
    """Returns the text of a page: in UTF-8, else as its header or element says, else as its bytes look.

    None if it is none.
    """
    # A byte order mark goes before all that a page states.
    for mark, unicode in _MARKS:
        if body.startswith(mark):
            return _decoded(body, unicode)
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        pass
    declared = _DECLARED.search(body[:4096])
    # In the order of browsers: the header, the element, then the look of the bytes.
    for label in (charset, declared[1].decode("ascii") if declared else "", _detected(body)):
        name = _encoding(label)
        text = _decoded(body, name) if name else None
        if text is not None:
            return text
    return None


def _decoded(body: bytes, name: str) -> str | None:
    text = body.decode(name, "replace")
    return text if text.count("\ufffd") <= MOST_REPLACED * len(text) else None


def _detected(body: bytes) -> str:
    import cchardet

    # A megabyte shows the encoding; the rest would only take longer.
    return cchardet.detect(body[: 2**20])["encoding"] or ""


def _encoding(label: str) -> str | None:
    """Returns Python's name of an encoding of the web; None for an unknown one.

    As in browsers, Latin-1 stands for the Windows encoding that contains it.
    """
    try:
        name = codecs.lookup(label).name
    except (LookupError, ValueError):
        return None
    return ("cp1252" if name in ("iso8859-1", "ascii") else name) if name in ENCODINGS else None


def _charset(headers: Headers) -> str:
    for name, value in headers:
        if name.lower() == "content-type" and (match := _CHARSET.search(value)):
            return match[1]
    return ""
