"""The documentation names files, headings, commands and options that exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from typer.main import get_command

from docs.examples import FENCE, NOTE
from pipeline.cli.main import app
from tests.fixtures import ROOT

ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ROOT_PAGES), *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
URL = re.compile(r"https?://[^\s`)|,;'\"]+")
SPAN = re.compile(r"`([^`\n]+)`")
FOLDERS = ("containers/", "pipeline/", "stages/", "release/", "data_recipes/", "tests/", "docs/", "bench/")
FILE = re.compile(r"[\w./-]+\.(?:py|md|yaml|toml|jinja|txt)")
LINE_WIDTH, CELL_WIDTH = 100, 120
GENERATED = {"cli.md", "configuration.md"}
RECORDS = {page.name for page in (DOCS / "lab-log").glob("*.md")}
"""Pages that name what there was on the day of an entry."""
PROSE = [page for page in PAGES if page.name not in GENERATED | RECORDS]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
present = pytest.mark.parametrize("page", [p for p in PAGES if p.name not in RECORDS], ids=lambda p: p.name)


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    slugs: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in slugs:
            number += 1
        slugs.add(name)
    return slugs


def commands(text: str) -> set[str]:
    """Every `atom …` that a page shows: code spans, and lines of code blocks with or without a prompt."""
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*bin/)?(atom [a-z-][^#\n]*)", blocks, re.MULTILINE)
    return {command.strip() for command in [*lines, *SPAN.findall(FENCE.sub("", text))] if command.startswith("atom ")}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not fragment or fragment in anchors(file), f"{page.name}: {target}"
        assert DOCS not in page.parents or DOCS in file.parents, f"{page.name}: {target} is not part of the site"


def test_the_navigation_has_every_page_once() -> None:
    def listed(entries: list[dict[str, Any]]) -> list[str]:
        contents = [content for entry in entries for content in entry.values()]
        return [page for each in contents for page in ([each] if isinstance(each, str) else listed(each))]

    navigation = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(listed(navigation)) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pages
def test_urls_are_well_formed(page: Path) -> None:
    for url in URL.findall(page.read_text()):
        host = urlsplit(url).hostname or ""
        assert re.fullmatch(r"[a-z0-9.-]+", host) and ("." in host or host == "localhost"), f"{page.name}: {url}"


@present
def test_files_in_backticks_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    examples = {span for span in SPAN.findall(text) if page.name == "extending.md" and f"`{span}`:\n" in text}
    for span in SPAN.findall(text):
        if span.startswith(FOLDERS) and FILE.fullmatch(span) and span not in examples:
            assert (ROOT / span).exists(), f"{page.name}: {span}"


@present
def test_commands_exist_with_their_options(page: Path) -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    for command in commands(page.read_text()):
        command = re.split(r" \|\|? ", command)[0]
        words = shlex.split(re.sub(r"[\[\]<>…|()]", " ", command))[1:]
        if words[0] in ("--help", "--version"):
            continue
        assert words[0] in known, f"{page.name}: {command}"
        options = {name for parameter in known[words[0]].params for name in parameter.opts}
        flags = {word.split("=")[0] for word in words[1:] if word.startswith("-")}
        assert flags <= options | {"--help"}, f"{page.name}: {command}"


@pytest.mark.parametrize("page", PROSE, ids=lambda p: p.name)
def test_prose_is_narrow(page: Path) -> None:
    """Lines have at most LINE_WIDTH characters outside tables, code blocks and comments, link targets and URLs not
    counted. Table cells have at most CELL_WIDTH characters."""
    for line in NOTE.sub("", FENCE.sub("", page.read_text())).splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            assert all(len(cell.strip()) <= CELL_WIDTH for cell in cells), f"{page.name}: {line}"
        elif not line.startswith("<!--"):
            text = URL.sub("", re.sub(r"\]\([^)\s]+\)", "]", line))
            assert len(text) <= LINE_WIDTH, f"{page.name}: {line}"


@pages
def test_a_list_is_no_part_of_a_paragraph(page: Path) -> None:
    """The site wants a blank line before a list, which GitHub does not."""
    for paragraph in re.split(r"\n\s*\n", FENCE.sub("", page.read_text())):
        if item := re.search(r"^- .*", paragraph, re.MULTILINE):
            assert paragraph.lstrip("\n").startswith("- "), f"{page.name}: put a blank line before {item[0]!r}"


def test_something_was_looked_at() -> None:
    assert {"README.md", "architecture.md", "formats.md", "lab-log.md", "2026-11.md"} <= {page.name for page in PAGES}
    assert len({c.split()[1] for page in PAGES for c in commands(page.read_text())}) >= 10
