"""Filter `classifier`: the score of a quality classifier of the data recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import PrivateAttr

from pipeline.core.bounds import Share, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.stage import Inputs
from stages.data.curate.filters.base import Document, Filter, FilterFunction, Removal
from stages.formats.table import SCORE


class Classifier(Filter):
    """Keeps documents to which a classifier of the recipe gives a score above the minimum."""

    step: Literal["classifier"]
    """selects this step"""
    classifier: SourceName
    """name of a classifier of the data recipe"""
    min_score: Share = 0.5
    """score that a document must exceed"""
    _model: Path | None = PrivateAttr(None)

    @property
    def classifiers(self) -> tuple[str, ...]:
        return (self.classifier,)

    def with_inputs(self, inputs: Inputs) -> Self:
        copy = self.model_copy()
        copy._model = inputs[f"classifier-{self.classifier}"] / "model.bin"
        return copy

    @property
    def measures(self) -> dict[str, str]:
        return {f"{SCORE}{self.classifier}": "float"}

    def function(self) -> FilterFunction:
        """Raises AtomError without the inputs of the stage, which hold the model."""
        from stages.data.curate.classifier_stage import scorer

        if self._model is None:
            raise AtomError(f"step classifier: {self.classifier} is not among the inputs; filter with with_inputs")
        score, record, (measure,) = scorer(self._model), self._record, self.measures

        def function(document: Document) -> str | Removal:
            value = score(document.text)
            record(measure, value)
            if value > self.min_score:
                return document.text
            return Removal(f"{self.classifier}/score", value, self.min_score)

        return function
