"""The steps of a source: the filters that a data recipe can name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from stages.data.blocks import union_of
from stages.data.curate import filters
from stages.data.curate.filters import FILTERS
from stages.data.curate.filters.base import Filter

# Steps of one source.
MAX_STEPS = 100

if TYPE_CHECKING:
    AnyFilter = Filter
else:
    AnyFilter = union_of(FILTERS, "step")


def code_of(steps: Iterable[Filter]) -> dict[str, list[str]]:
    """Returns {registry of filters: the modules in it that these steps use}, for the digest of a stage's code."""
    return {filters.__name__: sorted({FILTERS[step.step].partition(":")[0] for step in steps})}
