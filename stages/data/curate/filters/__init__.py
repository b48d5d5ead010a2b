"""Filters: the steps of a source. Each removes or edits one document at a time."""

from __future__ import annotations

FILTERS = {
    "datatrove": "stages.data.curate.filters.block",
    "language": "stages.data.curate.filters.language",
    "by_language": "stages.data.curate.filters.by_language",
    "classifier": "stages.data.curate.filters.classifier",
    "top_n_grams": "stages.data.curate.filters.top_n_grams",
    "code_shape": "stages.data.curate.filters.code_shape",
    "python_syntax": "stages.data.curate.filters.python_syntax",
}
"""{step: module whose FILTER is its class}. Importing one is cheap: no datatrove or numpy."""
