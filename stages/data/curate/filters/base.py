"""The interface of a filter: its settings, and a function that keeps, edits or removes one document.

A filter is a class in a module of this folder, which is named in FILTERS. The module is imported when a recipe is
planned, so heavy imports are inside `function`. Most filters are blocks of datatrove (`block.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

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
    """A document of datatrove.

    Attributes:
        text: The text.
        id: The id.
        metadata: Its source and license, and its URL and language where they are known.
    """

    text: str
    id: str
    metadata: dict[str, Any]


# Takes a document and returns the kept text, edited or not, or a removal.
FilterFunction = Callable[[Document], str | Removal]


class Filter(Config):
    """Base of the settings of a filter."""

    step: str
    """name of the step"""

    @property
    def name(self) -> str:
        """The name of the step in dispositions and counts."""
        return self.step

    @property
    def seconds_per_mb(self) -> float:
        """Core seconds to filter a MB of text, for `atom plan` alone."""
        return STEP_SECONDS.get(self.name, 0.0)

    @property
    def measures(self) -> dict[str, str]:
        """{name: Arrow type} of what the function writes into the metadata of a document."""
        return {}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The nodes whose artifacts the function reads, such as the model of a classifier."""
        return ()

    def prepared(self, inputs: Inputs, documents: Path) -> Self:
        """Returns the filter for one part of a source, such as with a model or with counts of lines.

        Args:
            inputs: The artifacts of the stage, with those of `inputs`.
            documents: The table of the acquired documents of the part. What is read there may depend on the parts of
                the recipe, and not on the number of tasks.
        """
        return self

    def inspect(self) -> str | None:
        """Imports what the filter needs, and returns a note on it for `atom validate`.

        Raises:
            RecipeError: The filter cannot run with these settings.
        """
        return None

    @abstractmethod
    def function(self) -> FilterFunction:
        """Returns the function that filters one document. It depends on that document alone, not on others."""
