"""Checks that the gates passed, and that the attestations of gates and evaluations match the tables."""

from __future__ import annotations

from release import schema, untrusted
from release.assembly import attest
from release.assembly.published_tables import read_json
from release.checks.check import Subject
from release.checks.findings import Findings, require_comparable
from release.layout import GATES, GATES_STATED


def passed_gates(subject: Subject) -> Findings:
    """Checks that no gate failed when the release was built."""
    gates = untrusted.read_json(subject.folder / GATES, follow=True)
    failed = [(name, gate["detail"]) for name, gate in sorted(gates.items()) if gate["ok"] is False]
    return Findings([f"{GATES}: gate {name} failed: {detail}" for name, detail in failed])


def attestations(subject: Subject) -> Findings:
    """Checks that the statements about evaluations and gates match the tables."""
    folder = subject.folder
    require_comparable(folder, "attestations")
    nodes = schema.read_nodes(folder)
    is_release = (folder / "dataset").is_dir()
    expected = attest.evaluations(folder, nodes) if is_release else {}
    judged = {name: gate["ok"] for name, gate in read_json(folder / GATES).items() if gate["ok"] is not None}
    expected[GATES_STATED] = attest.gates(nodes, judged)
    present = {path.relative_to(folder).as_posix() for path in (folder / attest.FOLDER).rglob("*") if path.is_file()}
    problems = [f"{path} is about nothing in the release" for path in sorted(present - expected.keys()) if is_release]
    problems += [f"{path} is missing" for path in sorted(expected.keys() - present)]
    common = sorted(present & expected.keys())
    problems += [f"{path} is not what the tables give" for path in common if read_json(folder / path) != expected[path]]
    return Findings(problems)
