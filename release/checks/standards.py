"""Checks the bundle of standards: that each document follows from the release, and is valid by its standard."""

from __future__ import annotations

from pipeline.core.errors import installing
from release import schema
from release.checks.check import Subject
from release.checks.findings import Absent, Findings, require_file
from release.facts import costs
from release.facts.data_facts import read_data_facts
from release.facts.model_facts import read_model_facts
from release.layout import STANDARDS
from release.repositories import model_folders
from release.standards import standard_facts, validation
from release.standards.bundle import DOCUMENTS, RECORDED
from release.standards.standard_facts import read_facts, statements


def documents(subject: Subject) -> Findings:
    """Checks that each document is, byte for byte, what the files of a whole release give."""
    folder = subject.folder
    models = {name: read_model_facts(folder / name) for name in model_folders(folder)}
    release, data = schema.read_release(folder), read_data_facts(folder / "dataset")
    facts = read_facts(folder, release, data, models, costs.usage_by_stage(folder))
    findings = Findings(summary=f"{len(DOCUMENTS)} documents follow from the release")
    listed = [(package.name, package.version) for package in facts.packages]
    if listed != standard_facts.package_versions(folder, statements(folder)):
        findings.problems.append(f"{RECORDED} does not list the packages of the statements")
    present = {path.relative_to(folder).as_posix() for path in (folder / STANDARDS).rglob("*") if path.is_file()}
    findings.problems += [f"{path} is no document of the bundle" for path in sorted(present - {*DOCUMENTS, RECORDED})]
    for path, make in DOCUMENTS.items():
        if not (folder / path).is_file():
            findings.problems.append(f"{path} is missing")
        elif (folder / path).read_bytes() != make(facts):
            findings.problems.append(f"{path} is not what the release gives")
    return findings


def valid(subject: Subject) -> Findings:
    """Checks that the tool or the schema of each standard finds no error."""
    try:
        require_file(subject.folder, STANDARDS)
        problems = validation.problems(subject.folder)
    except ImportError as error:
        raise Absent(f"not checked, because it needs {error.name or error}; {installing('report')}") from None
    return Findings(problems, summary=f"{len(validation.VALIDATORS)} valid by their standards")
