"""The definition of a check, and the results of gates.

A check is one function over a release, which returns Findings, and its line of the registry with scope and conditions.
The functions for gates take the list of checks: that of the registry, which imports the check of published results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import CheckFailed
from pipeline.core.text import escaped
from release.cards.card_tables import CardTable
from release.opened_release import Release
from stages.evaluation.gates import waived_detail
from stages.evaluation.settings import EvaluationSection

HOLDS = "holds"
"""The text of the verdict on a check that states no measurement."""


class Absent(Exception):
    """The subject of a check is not there, or this machine lacks what the check needs: it is skipped."""


@dataclass
class Findings:
    """The findings of a check.

    Attributes:
        problems: Sentences, each with the name of the file.
        skipped: {part: a sentence why it was not compared}
        detail: The text of the verdict without problems.
        compared: Whether any part was compared.
        summary: The text of the gate without problems.
    """

    problems: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    detail: str = HOLDS
    compared: bool = True
    summary: str = ""

    @classmethod
    def of_measurement(cls, ok: bool, text: str) -> Findings:
        """Returns the findings for one figure and its threshold.

        The text is the summary if the figure passes, else the problem.
        """
        return cls(summary=text) if ok else cls([text])

    def add(self, other: Findings, prefix: str = "") -> None:
        """Adds the findings of a part, with the name of a file before its sentences."""
        self.problems += [f"{prefix}{text}" for text in other.problems]
        self.compared = self.compared or other.compared
        self.skipped |= {part: reason for part, reason in other.skipped.items() if part not in self.skipped}

    def compare_tables(self, card: str, tables: Sequence[CardTable[Any]], facts: Any) -> None:
        """Adds a problem for each line of the tables that the text of a card lacks."""
        # Escaped on both sides, since a card is untrusted and a problem is printed.
        present = {escaped(line) for line in card.splitlines()}
        lines = (line for table in tables for line in table.lines(facts))
        self.problems += [f"README.md lacks the line {line!r}" for line in lines if escaped(line) not in present]


def require_file(folder: Path, path: str) -> Path:
    """Returns the path of a file that every release has. Raises CheckFailed if it is missing."""
    if not (folder / path).exists():
        raise CheckFailed(f"{path} is missing")
    return folder / path


@dataclass(frozen=True)
class Scope:
    """The folders with the files of a check.

    Attributes:
        kinds: The kinds of these folders.
        place: The folder of the files in a release.
    """

    kinds: tuple[str, ...]
    place: str = ""


@dataclass(frozen=True)
class Reads:
    """The files that a check reads, from whose size the limits on its time and memory follow.

    Attributes:
        places: Prefixes of the paths of JSON and tables.
        weights: Whether it reads weights, too.
    """

    places: tuple[str, ...] = ()
    weights: bool = False

    def below(self, folder: str) -> Reads:
        """Returns the same files, for places within a folder."""
        return Reads(tuple(f"{folder}/{place}" for place in self.places), self.weights) if folder else self


NOTHING_LARGE = Reads()


@dataclass(frozen=True)
class Check:
    """A check of published files: `atom verify` runs it, and `atom build` as well if it is a gate.

    Attributes:
        name: The name in the verdict.
        reads: The files that it reads within the scope.
        deep: True if only `--deep` runs it.
        needs: A path, or a pattern of paths, within the scope. Without such a file there is nothing to check.
        confined: True if it runs within limits. A check that starts a process of its own sets its limits itself.
        gate: The name in evidence/gates.json; "" if it is no gate. Checks of one gate run together.
        remedy: The advice of the gate.
        libraries: Modules that take long to import, beside those of every check.
    """

    name: str
    function: Callable[[Release], Findings]
    scope: Scope
    reads: Reads = NOTHING_LARGE
    deep: bool = False
    needs: str = ""
    confined: bool = True
    gate: str = ""
    remedy: str = ""
    libraries: tuple[str, ...] = ()

    def applies_to(self, release: Release) -> bool:
        """Returns True if a folder has the subject of the check."""
        if release.kind not in self.scope.kinds:
            return False
        return not self.needs or any((release.root / self._place_in(release)).glob(self.needs))

    def reads_of(self, release: Release) -> Reads:
        """Returns the files that it reads, by their paths in the folder."""
        return self.reads.below(self._place_in(release))

    def _place_in(self, release: Release) -> str:
        return self.scope.place if release.is_whole else ""


class LoadProblem(NamedTuple):
    """A problem with loading a model; `part` is MODEL or CHAT_TEMPLATE."""

    part: str
    text: str


@dataclass(frozen=True)
class LoadReport:
    """The result of loading a model.

    Attributes:
        problems: The reasons why it does not load, or not as it should.
        parameters: The number that transformers counts; None if it cannot load the model.
        goldens: {messages, rows} of fixed inputs; empty if there are problems.
    """

    problems: list[LoadProblem]
    parameters: int | None = None
    goldens: dict[str, Any] = field(default_factory=dict)

    def of_part(self, part: str) -> list[str]:
        return [problem.text for problem in self.problems if problem.part == part]


@dataclass(frozen=True)
class BuildContext:
    """A release that is being built, and inputs of gates that it does not publish, or not in this form.

    Attributes:
        release: The release.
        evaluation: The recipe's section, with the thresholds.
        machine: Paths that must not be published.
        load_reports: What plain transformers makes of each model folder.
    """

    release: Release
    evaluation: dict[str, Any]
    machine: list[Path] = field(default_factory=list)
    load_reports: dict[str, LoadReport] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildCheck:
    """A check that only `atom build` runs.

    Attributes:
        gate: The name in evidence/gates.json.
        function: Returns None if it does not apply to the release; then there is no such gate.
        remedy: The advice of the gate.
        private: Whether it needs more than a release publishes; it then applies to every release. `atom verify`
            computes the others again, to compare them with the published result.
    """

    gate: str
    function: Callable[[BuildContext], Findings | None]
    remedy: str = ""
    private: bool = False


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


def names_of_gates(checks: Checks) -> list[str]:
    """Returns the names of all gates, in the order of their checks."""
    return list(dict.fromkeys(check.gate for check in checks if check.gate))


def required_gates(checks: Checks, release: Release) -> set[str]:
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


def gates_computed_again(checks: Checks, release: Release) -> dict[str, GateResult | None]:
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
    results = {name: result_of_gate(checks, name, build) for name in names_of_gates(checks) if name not in others}
    return {name: result and waive(result, waived) for name, result in results.items()}


def result_of_gate(checks: Checks, name: str, build: BuildContext) -> GateResult | None:
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
    return GateResult(result.name, None, waived_detail(waived[result.name], result.detail))
