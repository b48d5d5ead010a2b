"""Checks the tables of conversations."""

from __future__ import annotations

from itertools import islice

from release.assembly import message_tables
from release.checks.check import Subject
from release.checks.findings import Findings

MOST_PROBLEMS = 20


def messages(subject: Subject) -> Findings:
    """Checks that the messages of every conversation are those of its text."""
    published = list(message_tables.published(subject.folder))
    problems = list(islice(message_tables.problems(subject.folder), MOST_PROBLEMS))
    summary = f"the messages of every conversation are those of its text: {', '.join(published)}"
    return Findings(problems, compared=bool(published), summary=summary)
