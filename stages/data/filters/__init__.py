"""Filters: the steps of a source. Each removes or edits one document at a time."""

from __future__ import annotations

FILTERS = {
    "datatrove": "stages.data.filters.block",
    "language": "stages.data.filters.language",
    "by_language": "stages.data.filters.by_language",
    "classifier": "stages.data.filters.classifier",
    "top_n_grams": "stages.data.filters.top_n_grams",
    "code_shape": "stages.data.filters.code_shape",
    "python_syntax": "stages.data.filters.python_syntax",
}
"""{step: module whose FILTER is its class}. Importing one is cheap: no datatrove or numpy."""
