"""The kept release of format 2, and later versions of our own code that must still read it.

`tests/data/atom-kept-0.1.0.tar.xz` was built at commit f71c494 by a recipe of its own (`code/as-run/` in it): every
phase and every kind of repository on next to no work. It is never made anew.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ARCHIVE = ROOT / "tests/data/atom-kept-0.1.0.tar.xz"
PACKAGES = ("pipeline", "stages", "release", "data_recipes")
RUN = """
import sys
from pathlib import Path
import release
assert Path(release.__file__).is_relative_to(sys.argv.pop(1)), release.__file__
from pipeline.cli.main import app
app()
"""


def unpack(folder: Path) -> Path:
    """The kept release."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "atom-kept-0.1.0"


class Tree:
    """A copy of our source in which something is changed, as a later version of it would be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))

    def replace(self, file: str, old: str, new: str) -> None:
        """Changes a text that must stand in the file."""
        path = self.folder / file
        text = path.read_text()
        assert old in text, f"{file} has no {old!r} any more; change the test"
        path.write_text(text.replace(old, new))

    def replace_all(self, pattern: str, new: str, *packages: str, without: Sequence[str] = ()) -> None:
        """Changes what a pattern finds in all Python files of packages, except for some files; it must find some."""
        count = 0
        for path in (path for package in packages for path in (self.folder / package).rglob("*.py")):
            if path.relative_to(self.folder).as_posix() not in without:
                text, hits = re.subn(pattern, new, path.read_text())
                path.write_text(text)
                count += hits
        assert count, pattern

    def atom(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the changed source."""
        line = [sys.executable, "-s", "-P", "-c", RUN, str(self.folder), *arguments]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(self.folder), "LANG": "C.UTF-8"}
        return subprocess.run(
            line, capture_output=True, text=True, env=environment, cwd=self.folder, timeout=600, check=False
        )

    def verify(self, release: Path, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
        """(exit code, {check: what came of it})."""
        process = self.atom("verify", str(release), "--json", *options)
        assert process.stdout.startswith("{"), process.stderr[-2000:]
        return process.returncode, {check["name"]: check for check in json.loads(process.stdout)["checks"]}
