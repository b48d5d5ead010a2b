"""Writes the page of a release, and compares a published one with what the release gives.

    site/index.html       the page, with its style sheet and its script; opens from a file
    site/search/*.js      the index of the kept documents
    site/outputs/*.js     the outputs of every evaluation item
    site/contamination/*.js, site/lineage/*.js
    site/replays/record.js the record of replays by others, which is empty in a release: its Space has a later one

All of it follows from the other files of the release, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.core.store import sha256_file
from release import scratch
from release.layout import PAGE, SITE
from release.web_page import lineage, outputs, page, search_index
from release.web_page.script_parts import PartWriter, is_part

RECORD = "replays/record"
"""The part with the rows of `release.audit.replay.certificates`."""


def write_index(release: Path, out: Path) -> None:
    """Writes index.html and the parts other than the search into a folder."""
    parts = PartWriter(out)
    facts = page.read_facts(
        release,
        outputs.write(release, parts),
        outputs.write_contamination(release, parts),
        lineage.write_files(release, parts),
    )
    parts.write(RECORD, [])
    lineage.write_products(facts.products, parts)
    (out / "index.html").write_text(page.render(facts), encoding="utf-8")


def write(release: Path, out: Path) -> None:
    """Writes the whole folder `site` of a release."""
    write_index(release, out)
    search_index.write(release, PartWriter(out))


def problems(release: Path, make: Callable[[Path, Path], None], is_search: bool) -> list[str]:
    """The files of the published page that are not what the release gives. make: writes the expected ones into a
    folder; is_search: whether these are the index, or all others."""
    with scratch.folder() as folder:
        make(release, folder / SITE)
        return [
            text for path, text in differences(release / SITE, folder / SITE) if path.startswith("search/") == is_search
        ]


def foreign_scripts(site: Path, folder: str = "") -> Iterator[str]:
    """Sentences about files of a page that could run anything but the script of this atom.

    The page may have this script alone, under a policy that allows no other one in it. A part beside it must be one
    call with JSON.

    Args:
        site: The folder of the page.
        folder: The folder in it whose parts are looked at, without the page; "" for all.
    """
    if not folder and not page.has_own_script((site / "index.html").read_text("utf-8", "replace")):
        yield f"{PAGE} has other scripts, or another policy about them, than the page of this atom"
    for path in sorted((site / folder).rglob("*.js")):
        name = path.relative_to(site).as_posix()
        if not is_part(path.read_bytes(), name.removesuffix(".js")):
            yield f"{SITE}/{name} is no part of a page, but a script of another form"


def differences(published: Path, expected: Path) -> Iterator[tuple[str, str]]:
    """(path, sentence) of each file that differs."""
    paths = {
        path.relative_to(folder).as_posix()
        for folder in (published, expected)
        for path in folder.rglob("*")
        if path.is_file()
    }
    for path in sorted(paths):
        if not (published / path).is_file():
            yield path, f"{SITE}/{path} is missing"
        elif not (expected / path).is_file():
            yield path, f"{SITE}/{path} is no part of the page"
        elif sha256_file(published / path) != sha256_file(expected / path):
            yield path, f"{SITE}/{path} is not what the release gives"
