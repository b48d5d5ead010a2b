"""The smaller models of the recipe that a release publishes: their settings, their figures and their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from release.facts.published_tables import read_json
from release.layout import RECIPE, SIZE, sizes_of

TRAINING = "evidence/training"
PRETRAIN = "pretrain"
"""The phase with which they are compared: it reads the same rows."""


@dataclass(frozen=True)
class Trained:
    """A model after pre-training. name: of the phase. settings: those of the model that differ from the recipe's; none
    of the recipe's model itself. tokens: targets that it read; loss: on held-out rows at the end."""

    name: str
    settings: Mapping[str, Any]
    steps: int
    tokens: int
    total: int
    active: int
    loss: float

    @property
    def checkpoint(self) -> str:
        """The folder of its last checkpoint, of the size of the release."""
        return f"checkpoints/{self.name}-step-{self.steps}"


def names(release: Path) -> list[str]:
    """The smaller models with a record of training, in order."""
    return sizes_of(path.parent.name for path in (release / TRAINING).glob("*/summary.json"))


def read_sizes(release: Path) -> list[Trained]:
    """The recipe's model after pre-training, and its smaller ones; none of a release without smaller ones."""
    phases = names(release)
    stated = read_json(release / RECIPE).get("sizes", []) if phases else []
    settings = {f"{SIZE}-{number}": section["model"] for number, section in enumerate(stated, 1)}
    return [_read(release, name, settings.get(name, {})) for name in (PRETRAIN, *phases)] if phases else []


def _read(release: Path, name: str, settings: Mapping[str, Any]) -> Trained:
    body = read_json(release / TRAINING / name / "summary.json")
    counts, loss = body["parameters"], float(body["heldout_loss"]["last"])
    return Trained(name, settings, body["steps"], body["tokens"], counts["total"], counts["active"], loss)
