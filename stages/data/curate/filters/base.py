"""The interface of a filter: its settings, and a function that keeps, edits or removes one document.

A filter is a class in a module of this folder, which is named in FILTERS. The module is imported when a recipe is
planned, so heavy imports are inside `function`. Most filters are blocks of datatrove (`block.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, Self

from pydantic import PrivateAttr

from pipeline.core.bounds import Range
from pipeline.core.stage import Config, Inputs
from stages.data.estimates import STEP_SECONDS

# A number of words, lines or other units in a document.
Amount = Annotated[int, Range(0, 1e9)]
Positive = Annotated[int, Range(1, 1e9)]
Length = Annotated[float, Range(0, 1e6)]


@dataclass(frozen=True, slots=True)
class Removal:
    """The reason for removing a document, with the value that the rule compared and its threshold.

    A block of datatrove states neither, and some not even a reason, which is then empty.
    """

    reason: str
    value: float | None = None
    threshold: float | None = None


class Document(Protocol):
    """A document as a reader yields it.

    Attributes:
        name: Unique in the source.
        text: The text.
        location: The place in the origin, such as a file.
        prompt_chars: Leading characters that carry no loss in training.
        license: The document's SPDX license; None for that of the source.
        url: The address of a web document.
        license_found: The way in which the license was found.
        derived_from: Ids or URLs of the documents that it was made from, for a reader that `states_parents`.
        title: As stated, for a reader that `states_credits`.
        author: As stated, for a reader that `states_credits`.
    """

    text: str
    id: str
    metadata: dict[str, Any]


# Takes a document and returns the kept text, edited or not, or a removal.
FilterFunction = Callable[[Document], str | Removal]
# Takes the name of a measure and its value for the document that is filtered.
Record = Callable[[str, str | float], None]


def _discard(name: str, value: str | float) -> None:
    pass


class Filter(Config):
    """Base of the settings of a filter."""

    step: str
    """name of the step"""
    _record: Record = PrivateAttr(default_factory=lambda: _discard)

    @property
    def name(self) -> str:
        """The name of the step in dispositions and counts."""
        return self.step

    @property
    def seconds_per_mb(self) -> float:
        """Core seconds to filter a MB of text, for `atom plan` alone."""
        return STEP_SECONDS.get(self.name, 0.0)

    @property
    def classifiers(self) -> tuple[str, ...]:
        """The classifiers of the data recipe that this filter uses."""
        return ()

    def with_inputs(self, inputs: Inputs) -> Self:
        """Returns this filter with what it takes from the inputs of stage `filter`, such as a model."""
        return self

    @property
    def measures(self) -> dict[str, str]:
        """{name: Arrow type} of what the function records of documents by `self._record`."""
        return {}

    def recorded(self, record: Record) -> Self:
        """Returns this filter with a function that gives its measures to `record`."""
        copy = self.model_copy()
        copy._record = record
        return copy

    @property
    def held(self) -> tuple[Filter, ...]:
        """The filters that this one chooses from for each document."""
        return ()

    def changed(self, change: Callable[[Filter], Filter]) -> Filter:
        """Returns this filter after a change of its settings; those that it holds are changed as well."""
        return change(self)

    def inspect(self) -> str | None:
        """Imports what the filter needs, and returns a note on it for `atom validate`.

        Raises:
            RecipeError: The filter cannot run with these settings.
        """
        return None

    @abstractmethod
    def function(self) -> FilterFunction:
        """Returns the function that filters one document. It depends on that document alone, not on others."""


def all_steps(steps: Iterable[Filter]) -> Iterator[Filter]:
    """Yields the steps, and those that they hold."""
    for step in steps:
        yield step
        yield from all_steps(step.held)
