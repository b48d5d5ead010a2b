"""The gates of a release: the checks that it must pass before it is built. Results are published in
evidence/gates.json."""

from __future__ import annotations

import json

from release.checks import gate_results, registry
from release.checks.check import BuildContext
from release.checks.gate_results import GateResult
from release.facts.published_tables import to_json
from release.layout import GATES, GATES_STATED
from release.opened_release import Release
from release.standards import attestations


def names() -> list[str]:
    """The names of all gates, in the order of the registry."""
    return gate_results.names(registry.CHECKS)


def run_gate(name: str, build: BuildContext) -> GateResult | None:
    """Runs all checks of one gate; the first problem counts. None if none of them applies to the release."""
    return gate_results.run_gate(registry.CHECKS, name, build)


def run_all(build: BuildContext) -> list[GateResult]:
    """The results of all gates that apply to the release."""
    results = [result for name in names() if (result := run_gate(name, build)) is not None]
    return [gate_results.waive(result, build.evaluation.get("waived_gates", {})) for result in results]


def write(release: Release, results: list[GateResult]) -> None:
    """Writes the results as a table, and as a statement about all artifacts."""
    rows = {result.name: {"ok": result.ok, "detail": result.detail} for result in results}
    (release.root / GATES).write_text(json.dumps(rows, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    stated = attestations.gates(release, {result.name: result.ok for result in results})
    (release.root / GATES_STATED).write_bytes(to_json(stated))
