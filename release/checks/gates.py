"""Results of gates, for a list of checks: that of the registry, which imports the check of published results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from release.checks.check import Absent, BuildCheck, BuildContext, Check, Findings
from release.opened_release import Release
from stages.evaluation.settings import EvaluationSection

Checks = Iterable[Check | BuildCheck]


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


def names(checks: Checks) -> list[str]:
    """Returns the names of all gates, in the order of their checks."""
    return list(dict.fromkeys(check.gate for check in checks if check.gate))


def required(checks: Checks, release: Release) -> set[str]:
    """Returns the gates that apply to a release.

    For an evidence repository, these are the gates of its release, as far as its files show it.
    """
    # The evidence alone is judged as its whole release, as far as its files show it.
    whole = Release(release.root)
    return {
        check.gate
        for check in checks
        if check.gate and (check.private if isinstance(check, BuildCheck) else check.applies_to(whole))
    }


def computed_again(checks: Checks, release: Release) -> dict[str, GateResult | None]:
    """Computes the gates again that follow from the published files alone.

    Returns {gate: its result; None if it does not apply}.

    Args:
        checks: All checks.
        release: A whole release.
    """
    evaluation = EvaluationSection.model_validate(release.recipe["evaluation"]).model_dump()
    build, waived = BuildContext(release, evaluation), evaluation.get("waived_gates", {})
    # Left out are gates with a check that `verify` runs by itself, and those that need what only the build has.
    others = {c.gate for c in checks if not isinstance(c, BuildCheck) or c.private}
    results = {name: run_gate(checks, name, build) for name in names(checks) if name not in others}
    return {name: result and waive(result, waived) for name, result in results.items()}


def run_gate(checks: Checks, name: str, build: BuildContext) -> GateResult | None:
    """Runs all checks of one gate; the first problem counts. None if none of them applies to the release."""
    results = [(check, _findings(check, build)) for check in checks if check.gate == name]
    applied = [(check, findings) for check, findings in results if findings is not None]
    # The first problem refuses the release; the others appear once it is mended.
    for check, findings in applied:
        if findings.problems:
            return GateResult(name, False, "; ".join(filter(None, [findings.problems[0], check.remedy])))
    summaries = [findings.summary for _, findings in applied if findings.summary]
    compared = any(findings.compared for _, findings in applied) or None
    return GateResult(name, compared, "; ".join(summaries)) if applied else None


def _findings(check: Check | BuildCheck, build: BuildContext) -> Findings | None:
    if isinstance(check, BuildCheck):
        return check.function(build)
    if not check.applies_to(build.release):
        return None
    try:
        return check.function(build.release)
    except Absent as error:  # a new release has every part of the present format
        return Findings([str(error)])


def waive(result: GateResult, waived: Mapping[str, str]) -> GateResult:
    if result.name not in waived:
        return result
    return GateResult(result.name, None, f"waived by the recipe ({waived[result.name]}); {result.detail}")
