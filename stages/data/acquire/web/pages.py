"""A web page as a document: its text, with the license that it states, or the reason why it is not used.

Nothing depends on the time that a page takes, so that the same pages are used everywhere: pages are bounded by their
bytes and elements instead. Segments that occur on several pages stay, because a page does not depend on others.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.data.acquire.licenses.maps import UNKNOWN_WEB
from stages.data.acquire.readers.base import Document, Refused, Unmapped
from stages.data.acquire.web import claims, page_opt_outs
from stages.data.acquire.web.page_opt_outs import Headers

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
        url: Its address; "" if it is unknown.
        body: The bytes; None if there are more than allowed.
        headers: The headers of the HTTP response.
        is_text: True for extracted text in place of HTML.
    """

    name: str
    location: str
    url: str
    body: bytes | None
    headers: Headers = ()
    is_text: bool = False


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
        if reason := page_opt_outs.stated_in_headers(page.headers, self.agents):
            return Refused(page.name, "opt_out", reason)
        if page.body is None:
            return Refused(page.name, "page", f"larger than {self.max_bytes} bytes")
        html = decode(page.body, _charset(page.headers))
        if html is None:
            return Refused(page.name, "page", "its encoding is unknown")
        try:
            return self._read_text(page, html) if page.is_text else self._read_html(page, html)
        # Troubles of the machine must not remove documents.
        except (MemoryError, OSError):
            raise
        except Exception as error:  # of a parser, on a page that is no page
            return Refused(page.name, "page", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _read_text(self, page: Page, text: str) -> Document | Refused:
        if not text.strip():
            return Refused(page.name, "page", "it has no text")
        return Document(page.name, text, page.location, 0, UNKNOWN_WEB, page.url, "none")

    def _read_html(self, page: Page, html: str) -> Document | Unmapped | Refused:
        import trafilatura
        from lxml.html import HTMLParser, document_fromstring

        content = html.replace("\0", "").encode()
        if not content.strip():
            return Refused(page.name, "page", "it has no text")
        tree = document_fromstring(content, parser=HTMLParser(encoding="utf-8", remove_pis=True))
        if reason := page_opt_outs.stated_in_page(tree, self.agents):
            return Refused(page.name, "opt_out", reason)
        # Opt-outs are read first: an opt-out is the more important reason.
        if sum(1 for _ in tree.iter()) > MAX_ELEMENTS:
            return Refused(page.name, "page", f"more than {MAX_ELEMENTS} elements")
        url = page.url or _address(tree)
        license = claims.license_of(tree, url, page.headers)
        # Precision: a lost paragraph costs less than navigation and advertisements in the text.
        text = trafilatura.extract(tree, include_comments=False, favor_precision=True, deduplicate=False)
        if not text or not text.strip():
            return Refused(page.name, "page", "it has no text")
        if license.expression is not None:
            return Document(page.name, text, page.location, 0, license.expression, url, "page")
        if license.stated:
            return Unmapped(page.name, text, license.stated, "page")
        return Document(page.name, text, page.location, 0, UNKNOWN_WEB, url, "none")


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


def _address(tree: Any) -> str:
    """Returns the address that a saved page has of itself."""
    for element in tree.iter("link"):
        if (element.get("rel") or "").strip().lower() == "canonical":
            address: str = (element.get("href") or "").strip()
            if address.startswith(("http://", "https://")):
                return address
    return ""
