"""The loss above which a step is a spike, for training itself and for whoever watches it from outside."""

from __future__ import annotations

import statistics
from collections.abc import Collection

SIGMA = 1.4826
"""Standard deviation of a normal distribution by its median absolute deviation."""
MIN_SIGMA = 0.01
"""Lower bound of the standard deviation, as a share of the median: small changes of a flat loss are no spikes."""


def spike_limit(losses: Collection[float], sigmas: float) -> tuple[float, float]:
    """(the median, the limit) of the latest losses."""
    median = statistics.median(losses)
    spread = SIGMA * statistics.median(abs(x - median) for x in losses)
    return median, median + sigmas * max(spread, MIN_SIGMA * median)
