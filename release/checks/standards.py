"""Checks the bundle of standards: that each document follows from the release, and is valid by its standard."""

from __future__ import annotations

from pipeline.core.errors import installing
from release.checks.findings import Absent, Findings, require_file
from release.layout import STANDARDS
from release.opened_release import Release
from release.standards import package_list, validation
from release.standards.bundle import DOCUMENTS, RECORDED
from release.standards.standard_facts import read_facts


def documents(release: Release) -> Findings:
    """Checks that each document is, byte for byte, what the files of a whole release give."""
    folder, facts = release.root, read_facts(release)
    findings = Findings(summary=f"{len(DOCUMENTS)} documents follow from the release")
    listed = [(package.name, package.version) for package in facts.packages]
    if listed != package_list.versions(release):
        findings.problems.append(f"{RECORDED} does not list the packages of the statements")
    present = {path.relative_to(folder).as_posix() for path in (folder / STANDARDS).rglob("*") if path.is_file()}
    findings.problems += [f"{path} is no document of the bundle" for path in sorted(present - {*DOCUMENTS, RECORDED})]
    for path, make in DOCUMENTS.items():
        if not (folder / path).is_file():
            findings.problems.append(f"{path} is missing")
        elif (folder / path).read_bytes() != make(facts):
            findings.problems.append(f"{path} is not what the release gives")
    return findings


def valid(release: Release) -> Findings:
    """Checks that the tool or the schema of each standard finds no error."""
    try:
        require_file(release.root, STANDARDS)
        problems = validation.problems(release.root)
    except ImportError as error:
        raise Absent(f"not checked, because it needs {error.name or error}; {installing('report')}") from None
    return Findings(problems, summary=f"{len(validation.VALIDATORS)} valid by their standards")
