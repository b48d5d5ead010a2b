"""Checks the Merkle roots of a dataset against its tables."""

from __future__ import annotations

from release.assembly.published_tables import read_json
from release.audit import merkle
from release.checks.check import Subject
from release.checks.findings import Findings
from release.layout import ROOTS


def merkle_roots(subject: Subject) -> Findings:
    stated, computed = read_json(subject.folder / ROOTS), merkle.roots(subject.folder)
    names = [name for name in sorted(stated.keys() | computed.keys()) if stated.get(name) != computed.get(name)]
    problems = [f"{ROOTS}: the root of {name} is not that of its table" for name in names]
    return Findings(problems, compared=bool(computed))
