"""Checks the documents of a release that others read by standards.

These are the results of its gates, the in-toto attestations, and the bundle of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.core.errors import installing
from pipeline.core.text import escaped
from release import untrusted
from release.checks import gates
from release.checks.check import Absent, Findings, require_file
from release.checks.gates import Checks
from release.facts.published_tables import read_json
from release.layout import GATES, GATES_STATED, STANDARDS
from release.opened_release import Release
from release.standards import attestations as statements_of
from release.standards import standard_facts, validation
from release.standards.bundle import DOCUMENTS, RECORDED
from release.standards.standard_facts import read_facts


def passed_gates(checks: Callable[[], Checks], release: Release) -> Findings:
    """Checks that no gate failed when the release was built, and that the results of the gates are true.

    All gates which apply must be there and no others. Those which follow from the published files must have the result
    that these give.

    Args:
        checks: Gives all checks of the registry, which names this one.
        release: The release.
    """
    published = untrusted.read_json(release.root / GATES, follow=True)
    failed = [(name, gate["detail"]) for name, gate in sorted(published.items()) if gate["ok"] is False]
    findings = Findings([f"{GATES}: gate {name} failed: {detail}" for name, detail in failed])
    findings.skipped = {
        name: f"gate {name}: {gate['detail']}" for name, gate in sorted(published.items()) if gate["ok"] is None
    }
    findings.problems += _gate_problems(checks(), release, published, findings)
    return findings


def _gate_problems(checks: Checks, release: Release, published: Mapping[str, Any], findings: Findings) -> Iterator[str]:
    """Yields sentences about gates that are invented, missing, or not what the published files give."""
    yield from (
        f"{GATES}: there is no gate {escaped(name)}" for name in sorted(published.keys() - set(gates.names(checks)))
    )
    lacking = gates.required(checks, release) - published.keys()
    yield from (f"{GATES}: gate {name} applies to the release, and is not there" for name in sorted(lacking))
    again = gates.computed_again(checks, release) if release.is_whole else {}
    for name, result in again.items():
        expected = {"ok": result.ok, "detail": result.detail} if result else None
        if published.get(name) != expected and name not in lacking:
            yield f"{GATES}: gate {name} is not what the files of the release give"
    words = sorted(name for name in published.keys() - again.keys() if published[name]["ok"])
    if words:
        findings.skipped["details"] = f"details of the gates {', '.join(map(escaped, words))}: the words of the maker"


def attestations(release: Release) -> Findings:
    """Checks that the statements about evaluations and gates match the tables."""
    folder, nodes = release.root, release.info.nodes
    has_data = (folder / "dataset").is_dir()
    expected = statements_of.evaluations(release) if has_data else {}
    results = {name: gate["ok"] for name, gate in read_json(folder / GATES).items()}
    expected[GATES_STATED] = statements_of.gates(release, results)
    present = {
        path.relative_to(folder).as_posix() for path in (folder / statements_of.FOLDER).rglob("*") if path.is_file()
    }
    problems = [f"{path} is about nothing in the release" for path in sorted(present - expected.keys()) if has_data]
    evaluated = {
        statements_of.evaluation_path(node.partition("-")[2]) for node in nodes if node.startswith("evaluate-")
    }
    problems += [f"{path} is missing" for path in sorted((expected.keys() | evaluated) - present)]
    common = sorted(present & expected.keys())
    problems += [f"{path} is not what the tables give" for path in common if read_json(folder / path) != expected[path]]
    return Findings(problems)


def standard_documents(release: Release) -> Findings:
    """Checks that each document is, byte for byte, what the files of a whole release give."""
    folder, facts = release.root, read_facts(release)
    findings = Findings(summary=f"{len(DOCUMENTS)} documents follow from the release")
    listed = [(package.name, package.version) for package in facts.packages]
    if listed != standard_facts.package_versions(release):
        findings.problems.append(f"{RECORDED} does not list the packages of the statements")
    present = {path.relative_to(folder).as_posix() for path in (folder / STANDARDS).rglob("*") if path.is_file()}
    findings.problems += [f"{path} is no document of the bundle" for path in sorted(present - {*DOCUMENTS, RECORDED})]
    for path, make in DOCUMENTS.items():
        if not (folder / path).is_file():
            findings.problems.append(f"{path} is missing")
        elif (folder / path).read_bytes() != make(facts):
            findings.problems.append(f"{path} is not what the release gives")
    return findings


def valid_standards(release: Release) -> Findings:
    """Checks that the tool or the schema of each standard finds no error."""
    try:
        require_file(release.root, STANDARDS)
        problems = validation.problems(release.root)
    except ImportError as error:
        raise Absent(f"not checked, because it needs {error.name or error}; {installing('report')}") from None
    return Findings(problems, summary=f"{len(validation.VALIDATORS)} valid by their standards")
