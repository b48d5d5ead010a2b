"""The findings of a check: its problems, and the parts that were not compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from pipeline.core.text import escaped
from release import schema
from release.cards import versions
from release.cards.card_tables import CardTable

HOLDS = "holds"
"""The text of the verdict on a check that states no measurement."""


class Absent(Exception):
    """A release of an older version does not have the subject of the check."""


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

    def compare_tables(self, card: str, tables: Sequence[CardTable[Any]], facts: Any, stated: schema.Stated) -> None:
        """Compares the lines of the tables that a card of its version has, word for word. card: its text; old cards
        have unescaped model output, which is escaped now."""
        present = {escaped(line) for line in card.splitlines()}
        for table in tables:
            if table.added > stated.cards or 0 < table.until <= stated.cards:
                continue
            if reason := versions.skip_reason(table.changed, stated.cards):
                self.skipped[f"table {table.name}"] = f"table {table.name}: {reason}"
                continue
            self.compared = True
            missing = [line for line in table.lines(facts) if escaped(line) not in present]
            self.problems += [f"README.md lacks the line {line!r}" for line in missing]

    def compare_part(self, name: str, stated: schema.Stated, problems: Callable[[], list[str]]) -> None:
        """Compares a part that is not a table and depends on the version of the cards."""
        if reason := versions.skip_reason(versions.PARTS[name], stated.cards):
            self.skipped[name] = f"{name.replace('_', ' ')}: {reason}"
        else:
            self.compared = True
            self.problems += problems()


def require_file(folder: Path, path: str, since_format: int = 2) -> Path:
    """Raises CheckFailed for a missing file, but Absent if the release is, or may be, of a format before
    `since_format`."""
    if not (folder / path).exists():
        release = next(filter(None, map(schema.of_release, (folder, folder.parent))), None)
        if release is not None and release.format >= since_format:
            raise CheckFailed(f"{path} is missing")
        raise Absent(f"{path} is not there: this release was made before there was one")
    return folder / path


def require_comparable(folder: Path, part: str) -> None:
    """Raises Absent if the present code renders a part differently from the version that the release states."""
    if reason := versions.skip_reason(versions.PARTS[part], schema.stated(folder).cards):
        raise Absent(f"skipped: {reason}")
