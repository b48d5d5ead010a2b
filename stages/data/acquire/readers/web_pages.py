"""Reader `warc`: web pages in WARC files, as Common Crawl has them.

WARC files (ISO 28500) are plain or gzip. warcio reads the records, as in datatrove's reader; that one reads bodies of
any size, and drops the headers of HTTP. A file that is cut short ends there: what stands before it is used, and the
place has a disposition of its own.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.core.bounds import Line, Range
from stages.data.acquire.readers.base import FileReader, Files, Read, Refused
from stages.data.acquire.web.pages import AGENTS, ROBOTS_BYTES, Page, PageReader, Robots

Agents = Annotated[tuple[Line, ...], Field(max_length=100)]
PageBytes = Annotated[int, Range(1000, 2**30)]
# The maximum number of bytes that are read for the headers of a record, and to find its beginning.
MAX_HEADER_BYTES = 2**22
# The bytes of a body that are read at once.
PIECE = 2**16
# The errors of reading and decompressing a damaged file.
_ERRORS = (EOFError, OSError, ValueError, zlib.error)
# The types of content that are pages.
PAGE_TYPES = ("text/html", "application/xhtml+xml")


class Warc(FileReader):
    """Web pages of WARC files, plain or gzip; `path` is a file or a folder of *.warc and *.warc.gz.

    A document has the license that its page states, or LicenseRef-unknown-web. Pages that are not 200 or not HTML are
    no documents. robots.txt files in a WARC file apply to its pages.
    """

    suffixes: ClassVar = (".warc", ".warc.gz")

    reader: Literal["warc"]
    """selects this reader"""
    max_page_bytes: PageBytes = 5_000_000
    """bytes of a page; a larger one is removed"""
    opt_out_agents: Agents = AGENTS
    """crawlers whose rules in robots.txt and in pages are opt-outs; *: rules for every crawler"""

    @property
    def gives_licenses(self) -> bool:
        return True

    @property
    def names_files(self) -> bool:
        return True

    @property
    def work(self) -> str:
        """The host of the page."""
        return r" https?://([^/:]+)"

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Read]:
        """Yields the text of every page, named by the file and the number of its record."""
        reader = PageReader(self.opt_out_agents, self.max_page_bytes)
        for relative, path in files:
            # robots.txt may stand after the pages, so the WARC file is read twice.
            robots = self._robots(path)
            try:
                for number, record in _records(path):
                    page = _page(record, number, relative, self.max_page_bytes)
                    if isinstance(page, Page):
                        reason = robots.opt_out(page.url)
                        yield Refused(page.name, "opt_out", reason) if reason else reader.read(page)
                    elif page is not None:
                        yield page
            except _Damaged as error:
                yield Refused(f"{relative}:{error.number}", "page", f"the file cannot be read from here on ({error})")

    def _robots(self, path: Path) -> Robots:
        """Returns the rules of the robots.txt files in a WARC file, up to where it is damaged."""
        robots = Robots(self.opt_out_agents)
        try:
            for _, record in _records(path):
                is_robots = record.rec_type == "response" and _url(record).endswith("/robots.txt")
                if is_robots and _status(record) == "200":
                    robots.add(_url(record), _read_start(record))
        except _Damaged:  # `documents` reports it
            pass
        return robots


class _Damaged(Exception):
    """A file that cannot be read from the record `number` on."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (number from 1, record) of every record. Raises _Damaged where the file is cut short or is no WARC.

    The rest of a record is skipped before the next one is yielded.
    """
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    number = 0
    try:
        with _open(path) as file:
            source = _BoundedHeaders(file)
            iterator = iter(ArchiveIterator(source))
            while (record := next(iterator, None)) is not None:
                number += 1
                # The body may be of any size; only headers are bounded.
                source.budget = None
                yield number, record
                # warcio would skip the rest itself, but would not say that the file ends in it.
                _skip_rest(record)
                source.budget = MAX_HEADER_BYTES
    except (ArchiveLoadFailed, AttributeError, *_ERRORS) as error:
        raise _Damaged(number + 1, _in_words(error)) from None


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


def _skip_rest(record: Any) -> None:
    """Reads a record to its end. Raises one of _ERRORS: EOFError if the file ends before, or the length is unknown."""
    while record.raw_stream.read(PIECE):
        pass
    # The bytes of the record that were not in the file; None for a record without a length.
    missing = getattr(record.raw_stream, "limit", None)
    if missing is None:
        raise EOFError("the record has no length")
    if missing != 0:
        raise EOFError(f"the record lacks its last {missing} bytes")


class _BoundedHeaders:
    """A file that raises ValueError when more bytes are read for headers than allowed.

    `budget` is the number of bytes that may still be read; None: any.
    """

    def __init__(self, file: gzip.GzipFile | BufferedReader) -> None:
        self._file = file
        self.budget: int | None = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read1(size)  # `read` would lose what stands before an error
        except EOFError as error:
            raise OSError(str(error)) from None  # warcio takes EOFError for the end of the file
        if self.budget is not None:
            self.budget -= len(data)
            if self.budget < 0:
                raise ValueError(f"the headers of a record have more than {MAX_HEADER_BYTES} bytes")
        return data

    def tell(self) -> int:
        return self._file.tell()


def _page(record: Any, number: int, location: str, max_bytes: int) -> Page | Refused | None:
    """Returns the page of a record, the reason why it cannot be read, or None for a record that is no page.

    Raises _Damaged if the file ends in the record.
    """
    name = f"{location}:{number}"
    headers = _http_headers(record)
    if record.rec_type != "response" or _status(record) != "200":
        return None
    # The crawler's own finding goes before the server's claim.
    kind = record.rec_headers.get_header("WARC-Identified-Payload-Type") or _header(headers, "content-type")
    if (kind or record.content_type or "").partition(";")[0].strip().lower() not in PAGE_TYPES:
        return None
    encoding = _header(headers, "content-encoding").strip().lower()
    # These are decoded on every machine; warcio decodes br only where another package is installed.
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        return Refused(name, "page", f"its body is encoded as {encoding[:60]}")
    try:
        body = _read_body(record, max_bytes)
    except _ERRORS as error:
        _require_whole(record, number)
        return Refused(name, "page", f"its body cannot be decoded ({_in_words(error)})")
    # A body that is too large is left unread, and is skipped with the rest of its record.
    if body is not None:
        _require_whole(record, number)
    return Page(name, location, _url(record), body, headers)


def _require_whole(record: Any, number: int) -> None:
    """Raises _Damaged if the file ends in a record, so that no part of a body is taken for a whole one."""
    try:
        _skip_rest(record)
    except _ERRORS as error:
        raise _Damaged(number, _in_words(error)) from None


def _read_body(record: Any, max_bytes: int) -> bytes | None:
    """Returns the body of a record, decompressed and without the transfer encoding; None for more than `max_bytes`."""
    stream, pieces, size = record.content_stream(), [], 0
    while piece := stream.read(PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            return None
    return b"".join(pieces)


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _read_start(record: Any) -> bytes:
    """Returns the first bytes of a robots.txt file; none if it cannot be decoded."""
    try:
        start: bytes = record.content_stream().read(ROBOTS_BYTES)
        return start
    except _ERRORS:
        return b""


def _url(record: Any) -> str:
    return record.rec_headers.get_header("WARC-Target-URI") or ""


def _status(record: Any) -> str:
    return record.http_headers.get_statuscode() if record.http_headers else ""


def _http_headers(record: Any) -> list[tuple[str, str]]:
    return list(record.http_headers.headers) if record.http_headers else []


def _header(headers: list[tuple[str, str]], name: str) -> str:
    return next((value for key, value in headers if key.lower() == name), "")
