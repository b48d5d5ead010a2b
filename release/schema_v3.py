"""Format 3: today's names, and how a release of it is replayed by the code that it carries.

Format 3 has the field's words where format 2 had our own, and the folders of code as they are now. What a later format
renames is written here then, as schema_v2 does it for format 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS: dict[str, dict[str, str]] = {}


def phase(name: str) -> str:
    """A phase, as today's code calls it."""
    return name


def model(name: str) -> str:
    """An exported model, as today's code calls it."""
    return name


def node(name: str) -> str:
    """A node, as today's code calls it."""
    return name


def release(body: Mapping[str, Any]) -> dict[str, Any]:
    """The content of evidence/release.json, in today's names."""
    return dict(body)


def fields(file: str, value: Any) -> Any:
    """The content of a JSON file, with today's names of its fields. file: its name."""
    return value


def column(table: str, today: str) -> str:
    """What a table calls a column that today's code calls so. table: the name of its file."""
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
