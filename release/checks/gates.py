"""The gates of a release: the checks that it must pass before it is built. Results are published in
evidence/gates.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from release.assembly import attest
from release.assembly.assemble import to_json
from release.checks import registry
from release.checks.check import BuildCheck, BuildContext, Check
from release.checks.findings import Absent, Findings
from release.layout import GATES, GATES_STATED
from release.schema import NodeArtifact


@dataclass(frozen=True)
class GateResult:
    """The result of a gate.

    Attributes:
        name: The gate.
        ok: Whether it was passed; None if there was nothing to judge, or if the recipe waives it.
        detail: The measurement; of a failed gate the problem and the remedy; else the reason why it was not judged.
    """

    name: str
    ok: bool | None
    detail: str


def names() -> list[str]:
    """The names of all gates, in the order of the registry."""
    return list(dict.fromkeys(check.gate for check in registry.CHECKS if check.gate))


def run_gate(name: str, build: BuildContext) -> GateResult | None:
    """Runs all checks of one gate; the first problem counts. None if none of them applies to the release."""
    results = [(check, _findings(check, build)) for check in registry.CHECKS if check.gate == name]
    applied = [(check, findings) for check, findings in results if findings is not None]
    for check, findings in applied:
        if findings.problems:
            return GateResult(name, False, "; ".join(filter(None, [findings.problems[0], check.remedy])))
    summaries = [findings.summary for _, findings in applied if findings.summary]
    compared = any(findings.compared for _, findings in applied) or None
    return GateResult(name, compared, "; ".join(summaries)) if applied else None


def _findings(check: Check | BuildCheck, build: BuildContext) -> Findings | None:
    if isinstance(check, BuildCheck):
        return check.function(build)
    if not check.applies_to(build.folder, "release"):
        return None
    try:
        return check.function(check.scope.subject(build.folder, "release"))
    except Absent as error:  # a new release has every part of the present format
        return Findings([str(error)])


def run_all(build: BuildContext) -> list[GateResult]:
    """The results of all gates that apply to the release."""
    results = [result for name in names() if (result := run_gate(name, build)) is not None]
    return [_waive(result, build.evaluation.get("waived_gates", {})) for result in results]


def _waive(result: GateResult, waived: Mapping[str, str]) -> GateResult:
    if result.name not in waived:
        return result
    return GateResult(result.name, None, f"waived by the recipe ({waived[result.name]}); {result.detail}")


def write(folder: Path, nodes: Mapping[str, NodeArtifact], results: list[GateResult]) -> None:
    """The results as a table, and as a statement about all artifacts."""
    rows = {result.name: {"ok": result.ok, "detail": result.detail} for result in results}
    (folder / GATES).write_text(json.dumps(rows, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    stated = attest.gates(folder, nodes, {result.name: result.ok for result in results})
    (folder / GATES_STATED).write_bytes(to_json(stated))
