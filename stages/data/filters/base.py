"""The interface of a filter: its settings, and a function that keeps, edits or removes one document.

A filter is a class in a module of its own in this folder, with the module named in FILTERS. Its module is imported when
a recipe is planned, so heavy imports are inside `function`.

Settings have the names of the datatrove block with the same rule, so that datatrove's documentation applies; defaults
are the published ones (Gopher, C4, FineWeb), and a recipe lists its changes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, PrivateAttr

from pipeline.core.bounds import Range
from pipeline.core.stage import Config, Inputs

Amount = Annotated[int, Range(0, 1e9)]
"""A number of words, lines or other units in a document."""
Positive = Annotated[int, Range(1, 1e9)]
Length = Annotated[float, Range(0, 1e6)]


@dataclass(frozen=True, slots=True)
class Removal:
    """The reason for removing a document: the rule, the value that it compared, and its threshold."""

    reason: str
    value: float
    threshold: float


FilterFunction = Callable[[str], str | Removal]
"""From the text of a document to the kept text, edited or not, or to a removal."""
Record = Callable[[str, str | float], None]
"""Takes the name of a measure and its value for the document that is filtered."""


def _discard(name: str, value: str | float) -> None:
    pass


class Filter(Config):
    """Base of the settings of a filter."""

    step: str = Field(description="name of the step")
    _record: Record = PrivateAttr(default_factory=lambda: _discard)

    @property
    def classifiers(self) -> tuple[str, ...]:
        """The classifiers of the data recipe that this filter uses."""
        return ()

    def with_inputs(self, inputs: Inputs) -> Self:
        """This filter with what it takes from the inputs of stage `filter`, such as a model."""
        return self

    @property
    def measures(self) -> dict[str, str]:
        """{name: Arrow type} of what the function records of documents by `self._record`."""
        return {}

    def recorded(self, record: Record) -> Self:
        """This filter with a function that gives its measures to `record`."""
        copy = self.model_copy()
        copy._record = record
        return copy

    @abstractmethod
    def function(self) -> FilterFunction:
        """The function that filters one document. It depends on the text alone, not on other documents."""

    def parameters(self) -> dict[str, Any]:
        """The settings without the name of the step, as arguments of a datatrove block."""
        return self.model_dump(exclude={"step"})

    def _require_order(self, *names: str) -> None:
        """Raises ValueError if a minimum is above its maximum: nothing would be kept."""
        for name in names:
            minimum, maximum = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if minimum > maximum:
                raise ValueError(f"min_{name} = {minimum} is above max_{name} = {maximum}; nothing would be kept")
