"""Filters: the steps of a source. Each removes or edits one document at a time."""

from __future__ import annotations

from pipeline.core.extensions import extend

# {step: its class}. Importing one is cheap: no datatrove or numpy.
FILTERS = {
    "datatrove": "stages.data.curate.filters.block:BlockStep",
    "language": "stages.data.curate.filters.own:Language",
    "classifier": "stages.data.curate.filters.own:Classifier",
    "top_n_grams": "stages.data.curate.filters.own:TopNGrams",
    "scan": "stages.data.curate.filters.scan:Scan",
    "repeated_lines": "stages.data.curate.filters.own:RepeatedLines",
    "personal_numbers": "stages.data.curate.filters.personal:PersonalNumbers",
    "code_shape": "stages.data.curate.filters.own:CodeShape",
    "python_syntax": "stages.data.curate.filters.own:PythonSyntax",
}
extend("filters", FILTERS)
