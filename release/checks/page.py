"""Checks the page of a release: that it is, byte for byte, what the other files of the release give."""

from __future__ import annotations

from pathlib import Path

from release.checks.check import Subject
from release.checks.findings import Findings
from release.web_page import page as web_page


def page(subject: Subject) -> Findings:
    """Checks the page; of one whose release is not here, only that it runs nothing."""
    if subject.kind != "release":
        reason = "page: what it shows is compared where all files of the release are there; it runs nothing"
        return Findings(web_page.foreign_scripts(subject.folder), {"page": reason})
    return Findings(web_page.problems(subject.folder))


def scripts(folder: Path) -> Findings:
    """Checks that the page runs nothing in a folder whose content is not compared, such as that of a retracted
    release."""
    return Findings(web_page.foreign_scripts(folder))
