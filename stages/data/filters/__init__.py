"""Filters: the steps of a source. Each removes or edits one document at a time."""

from __future__ import annotations

FILTERS = {
    "language": "stages.data.filters.language",
    "by_language": "stages.data.filters.by_language",
    "classifier": "stages.data.filters.classifier",
    "gopher_repetition": "stages.data.filters.gopher_repetition",
    "gopher_quality": "stages.data.filters.gopher_quality",
    "c4": "stages.data.filters.c4",
    "fineweb": "stages.data.filters.fineweb",
    "code_shape": "stages.data.filters.code_shape",
    "python_syntax": "stages.data.filters.python_syntax",
    "pii": "stages.data.filters.pii",
}
"""{step: module whose FILTER is its class}. Importing one is cheap: no datatrove or numpy."""
