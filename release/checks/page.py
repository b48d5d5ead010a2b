"""Checks the page of a release: that it is, byte for byte, what the other files of the release give."""

from __future__ import annotations

from pathlib import Path

from release.checks.check import Subject
from release.checks.findings import Findings, require_comparable
from release.web_page import search_index, site_files
from release.web_page.script_parts import PartWriter


def page(subject: Subject) -> Findings:
    """Checks index.html and the parts that it loads, without the search in documents."""
    require_comparable(subject.folder, "page")
    return Findings(site_files.problems(subject.folder, site_files.write_index, is_search=False))


def search(subject: Subject) -> Findings:
    """Checks the index of the documents."""
    require_comparable(subject.folder, "page")
    return Findings(site_files.problems(subject.folder, _write_search, is_search=True))


def _write_search(release: Path, out: Path) -> None:
    search_index.write(release, PartWriter(out))
