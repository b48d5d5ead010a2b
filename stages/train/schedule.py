"""The learning rate of a step: linear warm-up, then cosine decay to the final rate (Loshchilov and Hutter, 2017)."""

from __future__ import annotations

import math

from stages.train.config import Optimizer


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """step: 1 .. steps. The peak is reached at the end of warm-up, the final rate at the last step."""
    warmup = optimizer.warmup_steps
    if step <= warmup:
        return optimizer.lr * step / warmup
    done = (step - warmup) / (steps - warmup)
    return optimizer.final_lr + 0.5 * (optimizer.lr - optimizer.final_lr) * (1 + math.cos(math.pi * done))
