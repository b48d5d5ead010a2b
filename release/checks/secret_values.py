"""Checks a release for secrets and for names of the machine that made it."""

from __future__ import annotations

from pathlib import Path

from release.assembly import secret_scan
from release.checks.check import BuildContext
from release.checks.findings import Findings
from release.layout import SUMS
from release.repositories import files_below


def no_secrets(build: BuildContext) -> Findings:
    """Checks that no file contains a token, a private key, or a path of this machine. What a model wrote may have the
    form of a key: it is stated."""
    paths = [path for path in files_below(build.folder) if Path(path).name != SUMS]
    found = secret_scan.scan(build.folder, paths, build.machine)
    summary = "; ".join([f"{len(paths)} files searched", *(f"by a model: {text}" for text in found.invented)])
    return Findings(found.secrets, summary=summary)
