"""A release that is opened once: its places, its statements and its facts, each read when it is first needed.

`atom build`, `atom verify`, `atom show`, the cards, the page and the checks share one `Release`, so that no function
opens the layout, release.json or a table of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.core.provenance import Statement
from pipeline.core.store import sha256_file
from release import schema
from release.facts.data_facts import DataFacts, canary_of, read_data_facts
from release.facts.model_facts import ModelFacts, read_model_facts
from release.facts.published_tables import Manifest, read_json, read_manifests
from release.facts.run_facts import (
    TRAINING,
    Changes,
    Checkpoint,
    Costs,
    Intervention,
    Rehearsal,
    Trained,
    find_interventions,
    read_changes,
    read_checkpoints,
    read_rehearsals,
    read_sizes,
    usage_by_stage,
)
from release.facts.variant_facts import VariantFacts, read_variants
from release.layout import RECIPE, STATEMENTS
from release.repositories import Repository, files_below, model_folders, repositories, variant_folders
from release.schema import ReleaseInfo


class Release:
    """The published files of a release, or of one of its repositories.

    A property reads its files at the first use and keeps the result. Whoever changes those files opens the folder
    again.

    Attributes:
        root: The folder.
        kind: Kind of the folder, as `checks.listing.kind_of` names it.
        digest: Returns the SHA-256 of a file.
    """

    def __init__(self, root: Path, kind: str = "release", digest: Callable[[Path], str] = sha256_file) -> None:
        self.root = root
        self.kind = kind
        self.digest = digest

    @property
    def is_whole(self) -> bool:
        """True for a release, False for one repository of it."""
        return self.kind == "release"

    @property
    def dataset(self) -> Path:
        """The folder of the dataset repository."""
        return self.root / "dataset" if self.is_whole else self.root

    @cached_property
    def info(self) -> ReleaseInfo:
        """The content of evidence/release.json."""
        return schema.read_release(self.root)

    @cached_property
    def recipe(self) -> Any:
        """The recipe with all defaults."""
        return read_json(self.root / RECIPE)

    @cached_property
    def repositories(self) -> list[Repository]:
        """The repositories of a release, in the order in which they are made public."""
        return repositories(self.root)

    @cached_property
    def files(self) -> list[str]:
        """The paths of all files but signatures and keys, sorted."""
        return files_below(self.root)

    @cached_property
    def model_names(self) -> list[str]:
        """The folders of the models of a release, the final one first."""
        return model_folders(self.root)

    @cached_property
    def variant_names(self) -> list[str]:
        """The folders of the variants of a release."""
        return variant_folders(self.root)

    @property
    def model_folders(self) -> list[Path]:
        """The folders of the models; a model repository is one itself."""
        return [self.root / name for name in self.model_names] if self.is_whole else [self.root]

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """The manifest of each node's artifact, by node."""
        return read_manifests(self.root)

    @cached_property
    def statements(self) -> dict[Path, Statement]:
        """{file: provenance statement} of the evidence, in the order of the paths."""
        return {path: read_json(path) for path in sorted((self.root / STATEMENTS).rglob("*.json"))}

    @cached_property
    def data(self) -> DataFacts:
        """The facts that the dataset repository proves."""
        return read_data_facts(self.dataset)

    @cached_property
    def models(self) -> dict[str, ModelFacts]:
        """{name of a folder: facts of its model}, the final model first."""
        return {folder.name: read_model_facts(folder) for folder in self.model_folders}

    @cached_property
    def variants(self) -> dict[str, VariantFacts]:
        """{end of a repository's name: facts of its variant}."""
        return read_variants(self.root, self.variant_names)

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """The published checkpoints, by phase and step."""
        return read_checkpoints(self.root / "checkpoints")

    @cached_property
    def interventions(self) -> list[Intervention]:
        """The resumptions from checkpoints of earlier runs."""
        return find_interventions(self.checkpoints)

    @cached_property
    def rehearsals(self) -> list[Rehearsal]:
        """The rehearsals of phases, in the order of the phases."""
        return read_rehearsals(self.root, self.statements.values())

    @cached_property
    def costs(self) -> Costs:
        """The cost of each stage."""
        return usage_by_stage(self.statements.values())

    @cached_property
    def sizes(self) -> list[Trained]:
        """The model after pre-training and its smaller ones; none for a release without smaller ones."""
        return read_sizes(self.root)

    @cached_property
    def reward_model(self) -> dict[str, Any] | None:
        """What the training of the reward model measured on held-out pairs; None without one."""
        path = self.root / TRAINING / "reward" / "summary.json"
        return read_json(path) if path.is_file() else None

    @cached_property
    def changes(self) -> Changes | None:
        """The changes since the version before, if the release states them."""
        return read_changes(self.root)

    def license_of(self, folder: str) -> str:
        """Returns the SPDX expression of the license of the repository in a folder of a release."""
        licenses = self.info.license
        if self.is_whole and folder in self.models:
            return self.models[folder].license(licenses.weights)
        if folder == "":
            return licenses.code
        return licenses.data_compilation if folder == "dataset" else licenses.weights

    @property
    def canary(self) -> dict[str, str]:
        """The string that identifies the evaluation problems."""
        return canary_of(self.info.nodes["items"].digest)
