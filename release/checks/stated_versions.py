"""Checks that all files of a folder state the same versions of the formats."""

from __future__ import annotations

from release import schema
from release.checks.check import Subject
from release.checks.findings import Findings
from release.repositories import files_below, repositories


def same_versions(subject: Subject) -> Findings:
    """Checks that all files of a release or repository state the same versions."""
    folder, folders = subject.folder, [""]
    if subject.kind == "release":
        folders = [repository.folder for repository in repositories(folder) if repository.branch == "main"]
    problems = list(schema.disagreements(folder, folders, files_below(folder)))
    stated = schema.stated(folder)
    return Findings(problems, detail=f"format {stated.format}, card schema {stated.cards}")
