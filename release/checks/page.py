"""Checks the page of a release: that it is, byte for byte, what the other files of the release give."""

from __future__ import annotations

from pathlib import Path

from release.checks.check import Subject
from release.checks.findings import Findings
from release.layout import SITE
from release.web_page import search_index, site_files
from release.web_page.script_parts import PartWriter

SEARCH = "search"
"""The folder of the index of the documents."""


def page(subject: Subject) -> Findings:
    """Checks index.html and the parts that it loads. Of the search in documents, and of a page whose release is not
    here, only that no script does anything but what the page of this atom does."""
    site = subject.folder / SITE
    if subject.kind != "release":
        reason = (
            "page: what it shows is compared where all files of the release are there; its scripts are those of atom"
        )
        return Findings(list(site_files.foreign_scripts(site)), {"page": reason})
    problems = site_files.problems(subject.folder, site_files.write_index, is_search=False)
    return Findings([*problems, *site_files.foreign_scripts(site, SEARCH)])


def search(subject: Subject) -> Findings:
    """Checks the index of the documents."""
    return Findings(site_files.problems(subject.folder, _write_search, is_search=True))


def _write_search(release: Path, out: Path) -> None:
    search_index.write(release, PartWriter(out))


def scripts(folder: Path) -> Findings:
    """Checks the scripts of the page in a folder whose content is not compared, such as that of a retracted release."""
    return Findings(list(site_files.foreign_scripts(folder / SITE)))
