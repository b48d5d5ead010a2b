"""What a gate looks at, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from release.assembly import metrics
from release.assembly.costs import Costs
from stages.evaluation.settings import SURE

BEYOND = f", beyond {SURE} standard errors of the difference"


@dataclass(frozen=True)
class Gate:
    """One named check: `detail` is what was found or, if not ok, what is wrong and what to do."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Context:
    """What the gates look at: the folder in the making, and what the recipe demands of it."""

    folder: Path
    release: dict[str, Any]
    evaluation: dict[str, Any]
    data: metrics.Facts
    models: dict[str, metrics.Facts]
    machine: list[Path]
    interventions: list[metrics.Facts] = field(default_factory=list)
    costs: Costs = field(default_factory=dict)
    canary: dict[str, str] | None = None
    loaded: list[dict[str, Any]] | None = None
