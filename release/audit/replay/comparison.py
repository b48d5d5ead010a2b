"""Compares a retrained checkpoint, its log and its environment with the published ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import environment
from pipeline.core.source_code import code_digests
from pipeline.core.store import canonical, sha256_bytes
from pipeline.graph import registry
from release.audit.replay.plan import Plan, environment_values

if TYPE_CHECKING:
    import torch

BITWISE, CLOSE, DIFFERS = "bitwise", "within tolerance", "differs"
TOLERANCE = 1e-5
"""The ratio of the largest difference in a tensor to its largest absolute value. Measured in fp32 on atom-smoke, two
ranks against one: 7e-7 to 8e-6 after 30 to 150 steps. If rounding routes a token to another expert, or matrices are
bf16 or FP8, an honest replay can differ by more; the figures then state by how much."""


@dataclass(frozen=True)
class Comparison:
    """The tensors of two checkpoints.

    Attributes:
        tensors: Their number.
        different: {name: relative difference} of those whose bits differ; inf for another shape or type, a tensor
            that one of them lacks, or what is not a number.
    """

    tensors: int
    different: dict[str, float]

    def verdict(self, state: Sequence[str]) -> str:
        """Returns BITWISE, CLOSE or DIFFERS. `state` lists the fields of state.json that differ."""
        if state or max(self.different.values(), default=0.0) > TOLERANCE:
            return DIFFERS
        return CLOSE if self.different else BITWISE


def compare_checkpoints(published: Path, retrained: Path) -> Comparison:
    """Compares weights and optimizer of two folders of safetensors."""
    from stages.train.checkpoint import release_checkpoint

    count, different = 0, {}
    for stem in (release_checkpoint.MODEL, release_checkpoint.OPTIMIZER):
        folders = (published, retrained)  # without an optimizer if no step has moved a weight
        published_tensors, retrained_tensors = (
            release_checkpoint.Tensors(f, stem) if any(f.glob(f"{stem}*.safetensors")) else {} for f in folders
        )
        # A tensor that only one of them has is a difference, too.
        names = sorted({*published_tensors, *retrained_tensors})
        count += len(names)
        for name in names:
            difference: float | None = math.inf
            if name in published_tensors and name in retrained_tensors:
                difference = _relative_difference(published_tensors[name], retrained_tensors[name])
            if difference is not None:
                different[name] = difference
    return Comparison(count, different)


def _relative_difference(published: torch.Tensor, retrained: torch.Tensor) -> float | None:
    """Returns the largest difference of two tensors, divided by the largest absolute value of the published one.

    None if the bits are the same; infinite for another shape or type, and for what is not a number.
    """
    import torch

    if published.dtype != retrained.dtype or published.shape != retrained.shape:
        return math.inf
    flat = [tensor.contiguous().flatten() for tensor in (published, retrained)]
    # Bytes, because two zeros of different sign are equal as numbers, and not a number is not equal to itself.
    if torch.equal(*(tensor.view(torch.uint8) for tensor in flat)):
        return None
    a, b = (tensor.double() for tensor in flat)
    largest, scale = float((a - b).abs().max()), float(a.abs().max())
    difference = largest / scale if scale else math.inf
    return difference if math.isfinite(difference) else math.inf


def changed_fields(plan: Plan, retrained: Path) -> tuple[str, ...]:
    """Returns fields of a retrained checkpoint's state.json that differ from the published one."""
    state = json.loads((retrained / "state.json").read_text())
    compared = sorted({*state, *plan.end_state} - {"config", "rng"})  # the config was compared, `rng` is a sentence
    return tuple(name for name in compared if state.get(name) != plan.end_state.get(name))


def first_divergence(plan: Plan, log: Path) -> int | None:
    """Returns the first step whose lines in a retrained log differ from the published log.

    None if none differ, or if no log is published.
    """
    if not plan.log:
        return None
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    replayed, published = (_lines_by_step(part, plan) for part in (lines, plan.log))
    steps = sorted({*replayed, *published})
    return next((step for step in steps if replayed.get(step) != published.get(step)), None)


def _lines_by_step(log: Iterable[Mapping[str, Any]], plan: Plan) -> dict[int, list[Mapping[str, Any]]]:
    """Returns {step: its lines} of the steps of a plan.

    Lines in which a phase of post-training sampled answers to measure itself are left out.
    """
    lines: dict[int, list[Mapping[str, Any]]] = {}
    for line in log:
        if plan.first < line["step"] <= plan.last and "validation" not in line:
            lines.setdefault(line["step"], []).append(line)
    return lines


def compare_environments(plan: Plan) -> tuple[tuple[str, ...], str]:
    """Compares the environment here with the one in which the phase was trained.

    Returns a line `name: then, now` for each value that differs, and the fingerprint of the environment here in the
    form that statements have.

    Call it after training, as statements are written: training imports setuptools, which adds the packages that it
    carries to the path, so an earlier list lacks them.
    """
    packages: dict[str, str] = environment.packages()
    description = environment.describe() | {"packages": packages}
    fingerprint = sha256_bytes(canonical({name: description[name] for name in ("python", "packages", "device")}))
    code = code_digests(registry.stages()[plan.stage.name])
    then, now = plan.environment, environment_values(plan.stage.version, code, description)
    names = [name for name in [*then, *sorted({*now} - {*then})] if then.get(name) != now.get(name)]
    return tuple(f"{name}: {then.get(name, 'absent')}, {now.get(name, 'absent')}" for name in names), fingerprint
