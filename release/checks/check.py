"""The definition of a check: one function over a release, and its line of the registry with its scope and
conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.store import sha256_file
from release.checks.findings import Findings
from release.checks.load_report import LoadReport
from release.facts.data_facts import DataFacts
from release.facts.model_facts import ModelFacts
from release.repositories import model_folders
from release.schema import ReleaseInfo


@dataclass(frozen=True)
class Subject:
    """The published files that a check reads.

    folder: of the check's scope. kind: of the whole checked folder, by `listing.kind_of`. digest: SHA-256 of a file.
    """

    folder: Path
    kind: str = "release"
    digest: Callable[[Path], str] = sha256_file

    @property
    def models(self) -> list[Path]:
        """The model folders of a release; a model repository is one itself."""
        return [self.folder / name for name in model_folders(self.folder)] if self.kind == "release" else [self.folder]


@dataclass(frozen=True)
class Scope:
    """The location of a check's files. kinds: of folders with these files; place: their folder in a release."""

    kinds: tuple[str, ...]
    place: str = ""

    def subject(self, folder: Path, kind: str, digest: Callable[[Path], str] = sha256_file) -> Subject:
        return Subject(folder / self.place if kind == "release" else folder, kind, digest)


@dataclass(frozen=True)
class Reads:
    """The files that a check reads: JSON and tables below these places (path prefixes), and weights if it reads any.
    The limits on time and memory of the check follow from the size of these files."""

    places: tuple[str, ...] = ()
    weights: bool = False

    def below(self, folder: str) -> Reads:
        """The same files, for places within a folder."""
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
    """

    name: str
    function: Callable[[Subject], Findings]
    scope: Scope
    reads: Reads = NOTHING_LARGE
    deep: bool = False
    needs: str = ""
    confined: bool = True
    gate: str = ""
    remedy: str = ""

    def applies_to(self, folder: Path, kind: str) -> bool:
        """Whether a folder of this kind has the subject of the check."""
        if kind not in self.scope.kinds:
            return False
        return not self.needs or any(self.scope.subject(folder, kind).folder.glob(self.needs))

    def reads_of(self, kind: str) -> Reads:
        """The files that it reads, by paths in a folder of this kind."""
        return self.reads.below(self.scope.place if kind == "release" else "")


@dataclass(frozen=True)
class BuildContext:
    """Inputs of gates that are not in the published files, or not in this form.

    folder: of the release that is being built. evaluation: the recipe's section, with the thresholds. data, models:
    facts of the dataset, and of each model folder. machine: paths that must not be published. load_reports: of each
    model folder; without them the models are loaded now.
    """

    folder: Path
    release: ReleaseInfo
    evaluation: dict[str, Any]
    data: DataFacts
    models: dict[str, ModelFacts] = field(default_factory=dict)
    machine: list[Path] = field(default_factory=list)
    load_reports: dict[str, LoadReport] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildCheck:
    """A check that only `atom build` runs. Its function returns None if it does not apply to the release; then there is
    no such gate.

    private: whether it needs more than a release publishes; it then applies to every release. `atom verify` computes
    the others again, to compare them with the published result.
    """

    gate: str
    function: Callable[[BuildContext], Findings | None]
    remedy: str = ""
    private: bool = False
