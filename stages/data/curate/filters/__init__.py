"""Filters: the steps of a source. Each removes or edits one document at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Field

if TYPE_CHECKING:
    from stages.data.curate.filters.base import Filter

# {step: its class}. Importing one is cheap: no datatrove or numpy.
FILTERS = {
    "datatrove": "stages.data.curate.filters.block:BlockStep",
    "language": "stages.data.curate.filters.own:Language",
    "top_n_grams": "stages.data.curate.filters.own:TopNGrams",
    "code_shape": "stages.data.curate.filters.own:CodeShape",
    "python_syntax": "stages.data.curate.filters.own:PythonSyntax",
}
# Steps of one source.
MAX_STEPS = 100


def _state_datatrove(value: Any) -> Any:
    """Returns the settings of a step; those with a `block` need not state that it is a class of datatrove."""
    is_block = isinstance(value, dict) and "block" in value and "step" not in value
    return {"step": "datatrove", **value} if is_block else value


if TYPE_CHECKING:
    AnyFilter = Filter
else:
    AnyFilter = Annotated[
        Union[tuple(map(resolve_name, FILTERS.values()))],  # noqa: UP007
        Field(discriminator="step"),
        BeforeValidator(_state_datatrove),
    ]


def code_of(steps: Iterable[Filter]) -> dict[str, list[str]]:
    """Returns {registry of filters: the modules in it that these steps use}, for the digest of a stage's code."""
    return {__name__: sorted({FILTERS[step.step].partition(":")[0] for step in steps})}
