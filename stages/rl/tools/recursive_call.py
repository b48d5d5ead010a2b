"""Tool `recurse`: the policy asks itself the same question about a part of the text.

A task has a text in parts, `parts`, of which a prompt shows a few at most; a question about more of them names only
their numbers. The model calls the tool with the first and the last number of a piece, and is given its own answer to
the question about that piece, which it may answer in the same way. So it answers questions about texts that are longer
than its context (Recursive Language Models, Zhang et al., 2025, arXiv:2512.24601).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.core.bounds import Range
from pipeline.core.errors import AtomError
from pipeline.core.stage import Inputs
from stages.rl.protocols import Row, to_row
from stages.rl.tools.base import Call, Result, Subtask, Tool

PARTS_FIELD = "parts"
"""The field of a task with its text, as a list of texts. `about` is the question, without a text; `shown_parts` the
parts that a prompt may have; `first` the number of the first part in the whole text; `depth` the calls that led to
it."""


def make_row(
    id: str, about: str, parts: Sequence[str], shown_parts: int, verifier: str, kind: str, level: int,
    *, first: int = 1, depth: int = 0, **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """A task about a text in parts. Its prompt shows the parts if they are at most `shown_parts`, else their numbers.
    fields: the verifier's own."""
    last = first + len(parts) - 1
    text = "\n".join(parts) if len(parts) <= shown_parts else f"parts {first} to {last}"
    return to_row(
        id, f"{about}\n{text}", verifier, kind, level,
        parts=list(parts), about=about, shown_parts=shown_parts, first=first, depth=depth, **fields,
    )  # fmt: skip


class RecursiveTool(Tool):
    """Recursive calls: the policy's own answers to the same question about a part of the text of a task."""

    description: ClassVar = "Answers the same question about some parts of the text."
    parameters: ClassVar = {"first": "number of the first part", "last": "number of the last part"}

    tool: Literal["recurse"] = Field(description="selects this tool")
    max_depth: Annotated[int, Range(1, 20)] = Field(4, description="maximum nesting of calls")

    def functions(self, row: Row) -> list[dict[str, Any]]:
        """None for a task without parts, or whose text is all in its prompt. Raises AtomError for a task with parts and
        without one of the other fields."""
        if PARTS_FIELD not in row:
            return []
        if missing := [name for name in ("about", "shown_parts", "first", "depth") if name not in row]:
            raise AtomError(
                f"task {row.get('id')} has {PARTS_FIELD} and no {missing[0]}; add it, or leave the tool out"
            )
        return super().functions(row) if len(row[PARTS_FIELD]) > row["shown_parts"] else []

    def open(self, inputs: Inputs, folder: Path) -> Recursion:
        return Recursion(self.max_depth)


class Recursion:
    """The running tool."""

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth

    def run(self, calls: Sequence[Call]) -> list[Result | Subtask]:
        return [self._subtask(call.row, call.arguments) for call in calls]

    def _subtask(self, row: Row, arguments: Mapping[str, Any]) -> Result | Subtask:
        if row["depth"] >= self.max_depth:
            return Result("error", f"error: calls are {self.max_depth} deep at most; answer without one")
        start, count = row["first"], len(row[PARTS_FIELD])
        try:
            first, last = int(arguments["first"]), int(arguments["last"])
        except ValueError:
            return Result("arguments", "error: first and last are numbers of parts")
        if not start <= first <= last < start + count or last - first + 1 == count:
            return Result("arguments", f"error: name some of the parts {start} to {start + count - 1}, not all")
        return Subtask(make_row(
            f"{row['id']}/{first}-{last}", row["about"], row[PARTS_FIELD][first - start : last - start + 1],
            row["shown_parts"], row["verifier"], row["kind"], row["level"], first=first, depth=row["depth"] + 1,
        ))  # fmt: skip

    def close(self) -> None: ...


TOOL = RecursiveTool
