"""Settings that sources of tasks share."""

from __future__ import annotations

from typing import Annotated

from pipeline.core.bounds import Range

Level = Annotated[int, Range(0, 1000)]
"""A level of difficulty."""
Count = Annotated[int, Range(1, 1e7)]
"""A number of tasks."""
PROVENANCE = {"license": "Apache-2.0", "origin": "procedural"}
"""Fields of a row that this project generates."""
