"""What a check is: one function over a release, and the line of the registry that says when and on what it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.store import sha256_file
from release.assembly.checkpoint_facts import Intervention
from release.assembly.costs import Costs
from release.assembly.data_facts import DataFacts
from release.assembly.model_facts import ModelFacts
from release.checks.findings import Findings
from release.checks.load_report import LoadReport
from release.repositories import model_folders
from release.schema import ReleaseInfo


@dataclass(frozen=True)
class Subject:
    """The published files that a check reads.

    folder: of the check's scope. kind: of the whole folder that is checked, as `listing.kind_of` names it. digest:
    SHA-256 of a file.
    """

    folder: Path
    kind: str = "release"
    digest: Callable[[Path], str] = sha256_file

    @property
    def models(self) -> list[Path]:
        """The folders of models in a release; a model repository is one itself."""
        return [self.folder / name for name in model_folders(self.folder)] if self.kind == "release" else [self.folder]


@dataclass(frozen=True)
class Scope:
    """Where a check finds its files. kinds: of folders that hold them; place: their folder in a release."""

    kinds: tuple[str, ...]
    place: str = ""

    def subject(self, folder: Path, kind: str, digest: Callable[[Path], str] = sha256_file) -> Subject:
        return Subject(folder / self.place if kind == "release" else folder, kind, digest)


@dataclass(frozen=True)
class Reads:
    """What a check reads: JSON and tables below these places (paths begin with them), and weights if it reads any.
    Time and memory of the check follow from the size of these files."""

    places: tuple[str, ...] = ()
    weights: bool = False

    def below(self, folder: str) -> Reads:
        """The same, of places within a folder."""
        return Reads(tuple(f"{folder}/{place}" for place in self.places), self.weights) if folder else self


NOTHING_LARGE = Reads()


@dataclass(frozen=True)
class Check:
    """A check of published files: `atom verify` asks it, and `atom build` too if it is a gate.

    name: in the verdict. reads: within the scope. deep: only asked with `--deep`. needs: a path within the scope;
    since_format: the format since which every release has it, None if a release may lack it and then is not asked.
    confined: whether it runs within limits; what starts a process of its own sets them itself. gate: its name in
    evidence/gates.json, "" if it is none; checks of one gate are asked together. remedy: what the gate advises.
    """

    name: str
    function: Callable[[Subject], Findings]
    scope: Scope
    reads: Reads = NOTHING_LARGE
    deep: bool = False
    needs: str = ""
    since_format: int | None = None
    confined: bool = True
    gate: str = ""
    remedy: str = ""

    def applies_to(self, folder: Path, kind: str) -> bool:
        """Whether a folder of this kind holds what the check is about."""
        if kind not in self.scope.kinds:
            return False
        optional = self.needs and self.since_format is None
        return not optional or (self.scope.subject(folder, kind).folder / self.needs).exists()

    def reads_of(self, kind: str) -> Reads:
        """What it reads, by paths in a folder of this kind."""
        return self.reads.below(self.scope.place if kind == "release" else "")


@dataclass(frozen=True)
class BuildContext:
    """What gates look at that is not, or not in this form, in the published files.

    folder: of the release in the making. evaluation: the recipe's section, with the
    thresholds. data, models: facts of the dataset, and of each model folder. machine: paths that must not be published.
    load_reports: of each model folder, what loading it gave; loaded now if there are none.
    """

    folder: Path
    release: ReleaseInfo
    evaluation: dict[str, Any]
    data: DataFacts
    models: dict[str, ModelFacts] = field(default_factory=dict)
    machine: list[Path] = field(default_factory=list)
    interventions: list[Intervention] = field(default_factory=list)
    costs: Costs = field(default_factory=dict)
    canary: dict[str, str] | None = None
    load_reports: dict[str, LoadReport] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildCheck:
    """A check that takes more than published files, so that only `atom build` asks it. Its function returns None where
    the release has nothing of the kind; then there is no such gate."""

    gate: str
    function: Callable[[BuildContext], Findings | None]
    remedy: str = ""
