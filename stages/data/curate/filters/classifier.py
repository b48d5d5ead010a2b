"""Filter `classifier`: the score of a classifier of the data recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import PrivateAttr

from pipeline.core.bounds import SourceName
from pipeline.core.stage import Inputs
from stages.data.curate.filters.base import Document, Filter, FilterFunction, Removal


class Classifier(Filter):
    """Keeps documents that score above the threshold of a classifier, which follows from its setting `keep`."""

    step: Literal["classifier"]
    """selects this step"""
    classifier: SourceName
    """name of a classifier of the data recipe"""
    _folder: Path = PrivateAttr(Path())

    @property
    def inputs(self) -> tuple[str, ...]:
        return (f"classifier-{self.classifier}",)

    def prepared(self, inputs: Inputs, documents: Path) -> Self:
        step = self.model_copy()
        step._folder = inputs[self.inputs[0]].path
        return step

    def function(self) -> FilterFunction:
        from stages.data.curate.classifier_stage import META, MODEL, scorer

        score, reason = scorer(self._folder / MODEL), f"{self.classifier}_score"
        threshold = json.loads((self._folder / META).read_bytes())["threshold"]

        def function(document: Document) -> str | Removal:
            value = score(document.text)
            return document.text if value > threshold else Removal(reason, value, threshold)

        return function
