"""Intervals over seeds, by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""97.5 % quantiles of Student's t by degrees of freedom."""


def interval(gains: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds, and its 95 % interval; of one seed only the mean."""
    mean = statistics.fmean(gains)
    if len(gains) < 2:
        return mean, mean, mean
    half = STUDENT_95[len(gains) - 1] * statistics.stdev(gains) / math.sqrt(len(gains))
    return mean, mean - half, mean + half
