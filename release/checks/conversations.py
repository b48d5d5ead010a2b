"""Checks the tables of conversations."""

from __future__ import annotations

from itertools import islice

from release.assembly import message_tables
from release.checks.check import Subject
from release.checks.findings import Findings

MOST_PROBLEMS = 20


def messages(subject: Subject) -> Findings:
    """Checks that the messages of every conversation are those of its text."""
    sources = ", ".join(message_tables.published(subject.folder))
    problems = list(islice(message_tables.problems(subject.folder), MOST_PROBLEMS))
    return Findings(problems, summary=f"the messages of every conversation are those of its text: {sources}")
