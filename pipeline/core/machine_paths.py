"""The folders of this machine, which nothing that is published may name."""

from __future__ import annotations

import sys
from pathlib import Path

import pipeline

COMMON_PATHS = frozenset({"/", "/usr", "/usr/local", "/opt", "/tmp", "/var", "/home", "/mnt", "/srv", "/data"})
"""Folders that every machine has: with a Python under /usr, `#!/usr/bin/env` is no secret."""


def code_root() -> Path:
    """A checkout, or the site-packages folder of a wheel."""
    return Path(pipeline.__path__[0]).parent


def machine_paths(home: Path) -> list[Path]:
    """$ATOM_HOME, the code, the user's home and Python, without those that every machine has."""
    return [path for path in (home, code_root(), Path.home(), Path(sys.prefix)) if str(path) not in COMMON_PATHS]
