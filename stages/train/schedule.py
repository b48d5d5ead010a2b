"""The learning rate of a step: linear warmup, then the recipe's schedule."""

from __future__ import annotations

import math

from stages.train.config import Optimizer


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """step: 1 .. steps. The rate is at its peak at the end of warmup, and at the final rate at the last step.

    `Optimizer` describes the two decay schedules.
    """
    warmup = optimizer.warmup_steps
    if step <= warmup:
        return optimizer.lr * step / warmup
    if optimizer.decay_steps is not None:
        progress = max(0, step - (steps - optimizer.decay_steps)) / optimizer.decay_steps
        return optimizer.final_lr + (optimizer.lr - optimizer.final_lr) * (1 - math.sqrt(progress))
    progress = (step - warmup) / (steps - warmup)
    return optimizer.final_lr + 0.5 * (optimizer.lr - optimizer.final_lr) * (1 + math.cos(math.pi * progress))
