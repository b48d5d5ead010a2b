"""The steps of a source: the filters that a data recipe can name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.data.filters import FILTERS
from stages.data.filters.base import Filter
from stages.data.registry import union

MAX_STEPS = 100
"""Steps of one source."""

if TYPE_CHECKING:
    AnyFilter = Filter
else:
    AnyFilter = union(FILTERS, "FILTER", "step")
