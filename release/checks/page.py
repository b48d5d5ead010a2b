"""Checks the page of a release: that it is, byte for byte, what the other files of the release give."""

from __future__ import annotations

from release.checks.findings import Findings
from release.opened_release import Release
from release.web_page import site_files


def page(release: Release) -> Findings:
    """Checks the page; of one whose release is not here, only that it runs nothing."""
    if release.kind != "release":
        reason = "page: what it shows is compared where all files of the release are there; it runs nothing"
        return Findings(site_files.foreign_scripts(release), {"page": reason})
    return Findings(site_files.problems(release))
