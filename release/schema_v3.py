"""Formats 3 and 4: the present names, and the replay of such a release by the code that it carries.

Format 3 has the field's names in place of the project's own names of format 2, and the present folders of code. The
renamings of a later format are to be added here, as in schema_v2 for format 2. Format 4 has the same names; its tables
may be in parts (`release.data_layout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS: dict[str, dict[str, str]] = {}


def phase(name: str) -> str:
    """The present name of a phase."""
    return name


def model(name: str) -> str:
    """The present name of an exported model."""
    return name


def node(name: str) -> str:
    """The present name of a node."""
    return name


def release(body: Mapping[str, Any]) -> dict[str, Any]:
    """The content of evidence/release.json, with present names."""
    return dict(body)


def fields(file: str, value: Any) -> Any:
    """The content of a JSON file, with the present names of its fields. file: its name."""
    return value


def column(table: str, today: str) -> str:
    """The name in a table of the column with this present name. table: the name of its file."""
    return today


def scorer(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The scorer of a row of `items.parquet` that does not name one: none, since every row of format 3 does."""
    return None


REPLAY = """
import os, sys
from pathlib import Path

release, phase, first, last, folder = sys.argv[1:]
import release as carried
code = os.path.realpath(os.environ["PYTHONPATH"])
if not os.path.realpath(carried.__file__).startswith(code + os.sep):
    sys.exit("the code that ran is not the one that the release carries")

from release.audit import replay

replay.replay_into(Path(release), phase, int(first), int(last), Path(folder))
"""
"""Replays steps by the code that a release of format 3 carries: `release.audit.replay` has this function."""
