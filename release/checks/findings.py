"""What came of a check: problems, and which parts of what it is about were not compared."""

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


class Absent(Exception):
    """What a check is about is not in a release of an older version."""


@dataclass
class Findings:
    """What came of a check.

    problems: sentences on what is bad, each naming the file. skipped: {part: a sentence why it was not compared}.
    detail: what the verdict prints if all holds. compared: whether any part was. summary: what the gate prints if all
    holds.
    """

    problems: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    detail: str = "holds"
    compared: bool = True
    summary: str = ""

    @classmethod
    def of_measurement(cls, ok: bool, text: str) -> Findings:
        """Of a figure that is good enough or not: the text is its summary or its problem."""
        return cls(summary=text) if ok else cls([text])

    def add(self, other: Findings, prefix: str = "") -> None:
        """Takes over what came of a part, whose sentences begin with the name of a file."""
        self.problems += [f"{prefix}{text}" for text in other.problems]
        self.compared = self.compared or other.compared
        self.skipped |= {part: reason for part, reason in other.skipped.items() if part not in self.skipped}

    def compare_tables(self, card: str, tables: Sequence[CardTable[Any]], facts: Any, stated: schema.Stated) -> None:
        """The lines of tables, word for word, as far as a card of its version has them. card: its text; old ones hold
        what models wrote as they wrote it, which is escaped today."""
        present = {escaped(line) for line in card.splitlines()}
        for table in tables:
            if table.added > stated.cards:
                continue
            if reason := versions.skip_reason(table.changed, stated.cards):
                self.skipped[f"table {table.name}"] = f"table {table.name}: {reason}"
                continue
            self.compared = True
            missing = [line for line in table.lines(facts) if escaped(line) not in present]
            self.problems += [f"README.md lacks the line {line!r}" for line in missing]

    def compare_part(self, name: str, stated: schema.Stated, problems: Callable[[], list[str]]) -> None:
        """A part that depends on the version of the cards and is no table."""
        if reason := versions.skip_reason(versions.PARTS[name], stated.cards):
            self.skipped[name] = f"{name.replace('_', ' ')}: {reason}"
        else:
            self.compared = True
            self.problems += problems()


def require_file(folder: Path, path: str, since_format: int = 2) -> Path:
    """Raises CheckFailed if a file is missing, Absent if the release is, or may be, of a format before
    `since_format`."""
    if not (folder / path).exists():
        release = next(filter(None, map(schema.of_release, (folder, folder.parent))), None)
        if release is not None and release.format >= since_format:
            raise CheckFailed(f"{path} is missing")
        raise Absent(f"{path} is not there: this release was made before there was one")
    return folder / path


def require_comparable(folder: Path, part: str) -> None:
    """Raises Absent if today's code renders a part otherwise than the version that the release states."""
    if reason := versions.skip_reason(versions.PARTS[part], schema.stated(folder).cards):
        raise Absent(f"skipped: {reason}")
