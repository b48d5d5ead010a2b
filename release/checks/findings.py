"""The findings of a check: its problems, and the parts that were not compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from pipeline.core.text import escaped
from release.cards.card_tables import CardTable

HOLDS = "holds"
"""The text of the verdict on a check that states no measurement."""


class Absent(Exception):
    """The subject of a check is not there, or this machine lacks what the check needs: it is skipped."""


@dataclass
class Findings:
    """The findings of a check.

    problems: sentences, each with the name of the file. skipped: {part: a sentence why it was not compared}. detail:
    the text of the verdict without problems. compared: whether any part was. summary: the text of the gate without
    problems.
    """

    problems: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    detail: str = HOLDS
    compared: bool = True
    summary: str = ""

    @classmethod
    def of_measurement(cls, ok: bool, text: str) -> Findings:
        """The findings for one figure and its threshold: the text is the summary if it passes, else the problem."""
        return cls(summary=text) if ok else cls([text])

    def add(self, other: Findings, prefix: str = "") -> None:
        """Adds the findings of a part, with the name of a file before its sentences."""
        self.problems += [f"{prefix}{text}" for text in other.problems]
        self.compared = self.compared or other.compared
        self.skipped |= {part: reason for part, reason in other.skipped.items() if part not in self.skipped}

    def compare_tables(self, card: str, tables: Sequence[CardTable[Any]], facts: Any) -> None:
        """Adds a problem for each line of the tables that the text of a card lacks."""
        present = {escaped(line) for line in card.splitlines()}
        lines = (line for table in tables for line in table.lines(facts))
        self.problems += [f"README.md lacks the line {line!r}" for line in lines if escaped(line) not in present]


def require_file(folder: Path, path: str) -> Path:
    """Returns the path of a file that every release has. Raises CheckFailed if it is missing."""
    if not (folder / path).exists():
        raise CheckFailed(f"{path} is missing")
    return folder / path
