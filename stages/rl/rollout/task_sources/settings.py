"""Settings that sources of tasks share."""

from __future__ import annotations

from typing import Annotated

from pipeline.core.bounds import Range, Words

Level = Annotated[int, Range(0, 1000)]
"""A level of difficulty."""
Count = Annotated[int, Range(1, 1e7)]
"""A number of tasks."""
Kind = Annotated[str, Words(64, "name of lower-case letters, digits, '_' and '-'", r"[a-z][a-z0-9_-]*")]
"""A kind of tasks."""
PROVENANCE = {"license": "Apache-2.0", "origin": "procedural"}
"""Fields of a row that this project generates."""
