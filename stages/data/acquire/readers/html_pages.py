"""Reader `html`: saved web pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import quote

from pydantic import Field

from pipeline.core.bounds import Line, Range, Words
from stages.data.acquire.readers.base import FileReader, Files, Read
from stages.data.acquire.web.page_opt_outs import AGENTS

Address = Annotated[str, Words(2000, "address: write http:// or https:// and a host", r"https?://[^\s/]+(/\S*)?")]
Agents = Annotated[tuple[Line, ...], Field(max_length=100)]
PageBytes = Annotated[int, Range(1000, 2**30)]


class WebReader(FileReader):
    """Base of the readers of web pages. A document has the license that its page states, or LicenseRef-unknown-web."""

    max_page_bytes: PageBytes = Field(5_000_000, description="bytes of a page; a larger one is removed")
    opt_out_agents: Agents = Field(
        AGENTS, description="crawlers whose rules in robots.txt and in pages are opt-outs; *: rules for every crawler"
    )

    @property
    def gives_licenses(self) -> bool:
        return True

    @property
    def names_files(self) -> bool:
        return True


class Html(WebReader):
    """Saved web pages, one in each file; `path` is a file or a folder of *.html, *.htm and *.xhtml."""

    suffixes: ClassVar = (".html", ".htm", ".xhtml")

    reader: Literal["html"] = Field(description="selects this reader")
    base_url: Address | None = Field(
        None,
        description="address of the folder, such as https://example.org/; null: the canonical address in each page",
    )

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Read]:
        """The text of every page."""
        from stages.data.acquire.web.pages import Page, PageReader

        reader = PageReader(self.opt_out_agents, self.max_page_bytes)
        for relative, path in files:
            url = f"{self.base_url.rstrip('/')}/{quote(relative)}" if self.base_url else ""
            yield reader.read(Page(relative, relative, url, _read_bytes(path, self.max_page_bytes)))


def _read_bytes(path: Path, most: int) -> bytes | None:
    """The content of a file; None if it has more bytes."""
    with open(path, "rb") as file:
        content = file.read(most + 1)
    return content if len(content) <= most else None


READER = Html
