"""Loss spikes: detection of spiking steps, which are skipped, and their records.

The detector decides before the update, only from the log of the accepted steps before it, so that a resumed or repeated
phase decides in the same way. A record is a line of training.jsonl: the reason, the documents of the batch, the experts
of its tokens and the gradient norm by part of the model.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.core.log_summary import spike_limit
from stages.train.config import Spikes
from stages.train.data import Row
from stages.train.engine import StepFigures

Record = dict[str, Any]


class SpikeDetector:
    """Detects spikes by the losses and gradient norms of the last accepted steps."""

    def __init__(self, policy: Spikes | None, lines: Iterable[Record]) -> None:
        """lines: of training.jsonl so far."""
        self.policy = policy
        window = policy.window if policy else 1
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)
        for line in lines:
            if "grad_norm" in line and "skipped" not in line:
                self.accept(line["loss"], line["grad_norm"])

    def accept(self, loss: float, norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def reason(self, loss: float, norm: float | None) -> str | None:
        """The reason why a step is a spike, or None. norm: None before it is known."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if norm is not None and not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if self.policy is None or len(self.losses) < self.policy.window:
            return None
        median, limit = spike_limit(self.losses, self.policy.loss_sigmas)
        if loss > limit:
            return f"the loss is {loss:.4g}, above {limit:.4g} (median {median:.4g} of {len(self.losses)} steps)"
        median_norm = statistics.median(self.norms)
        if norm is not None and norm > self.policy.norm_factor * median_norm:
            return (
                f"the gradient norm is {norm:.4g}, above {self.policy.norm_factor:g} times its median {median_norm:.4g}"
            )
        return None


def spike_record(step: int, action: str, excluded: Sequence[int], rows: Sequence[Row], figures: StepFigures) -> Record:
    """The record of a spike in training.jsonl; excluded: the steps that are skipped because of it."""
    return {
        "reason": figures.refused,
        "action": action,
        "excluded": list(excluded),
        "loss": finite_or_none(figures.loss),
        "grad_norm": finite_or_none(figures.grad_norm),
        "documents": sorted({segment.id for row in rows for segment in row.segments}),
        **({"experts": figures.router.experts.json()} if figures.router else {}),
        "gradient_norms": {part: finite_or_none(norm) for part, norm in (figures.gradients or {}).items()},
    }


def finite_or_none(value: float) -> float | None:
    """The value, or None (JSON's null) if it is not finite."""
    return value if math.isfinite(value) else None
