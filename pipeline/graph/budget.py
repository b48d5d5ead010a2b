"""Compares the use of a recipe's stages by the ledger, including failed attempts, with the recipe's budget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from typing_extensions import TypedDict

from pipeline.core import provenance
from pipeline.core.store import Store
from pipeline.graph.recipe import Identity
from pipeline.graph.run import Limits as Limits
from pipeline.graph.run import Prices


class Hours(TypedDict):
    """Hours of allotted GPUs and of busy cores."""

    gpu_hours: float
    core_hours: float


Resource = Literal["gpu_hours", "core_hours"]
RESOURCES: tuple[Resource, ...] = ("gpu_hours", "core_hours")


def limits_of(recipe: Identity) -> Limits | None:
    """Returns the limits of a recipe; None if it has no budget."""
    if recipe.budget is None:
        return None
    return {"gpu_hours": recipe.budget.gpu_hours, "core_hours": recipe.budget.core_hours}


def used(store: Store, keys: Iterable[str]) -> Hours:
    """Returns the total use of all attempts at these keys."""
    total: Hours = {"gpu_hours": 0.0, "core_hours": 0.0}
    for key in keys:
        for _, body in provenance.read(store.ledger, key):
            usage = provenance.usage(body)
            total["gpu_hours"] += usage.get("gpu_seconds", 0.0) / 3600
            total["core_hours"] += usage.get("cpu_seconds", 0.0) / 3600
    return total


def describe(amount: Hours, prices: Prices | None) -> str:
    """Returns the used hours in words, with their cost by the prices of a profile."""
    text = f"{amount['gpu_hours']:.3g} GPU hours, {amount['core_hours']:.3g} core hours"
    if not prices:
        return text
    cost = amount["gpu_hours"] * prices["gpu_hour"] + amount["core_hours"] * prices["core_hour"]
    return f"{text}, {cost:,.2f} {prices['currency']}"


def foreseen(limits: Limits | None, spent: Hours, coming: Hours) -> list[str]:
    """Returns one sentence for each limit that a plan exceeds, including the earlier use."""
    if limits is None:
        return []
    return [
        f"the plan exceeds budget.{name} = {limit:,.10g} of the recipe: {coming[name]:,.2f} hours to come, "
        f"{spent[name]:,.2f} used already"
        for name in RESOURCES
        if (limit := limits[name]) is not None and spent[name] + coming[name] > limit
    ]


def exceeded(limits: Limits | None, store: Store, keys: Iterable[str]) -> str | None:
    """Returns the reason that no further stage starts, in one sentence; None within the budget."""
    if limits is None:
        return None
    spent = used(store, keys)
    for name in RESOURCES:
        limit, resource = limits[name], name.replace("_", " ")
        if limit is not None and spent[name] >= limit:
            share = f"the budget of {limit:g} {resource} is used up ({spent[name]:.2f})"
            return f"{share}; raise budget.{name} of the recipe"
    return None
