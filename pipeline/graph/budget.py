"""Compares the use of a recipe's stages by the ledger, including failed attempts, with the recipe's budget."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files, provenance
from pipeline.core.json_files import Damaged
from pipeline.core.store import Store
from pipeline.graph.recipe import Identity
from pipeline.graph.run import Limits as Limits
from pipeline.graph.run import Prices


class Hours(TypedDict):
    """Hours of allotted GPUs and of busy cores."""

    gpu_hours: float
    core_hours: float


class _Counted(Hours):
    """The use at a key by its first statements, which are never changed nor removed."""

    statements: int


_COUNTED: TypeAdapter[Any] = TypeAdapter(dict[str, _Counted])
Resource = Literal["gpu_hours", "core_hours"]
RESOURCES: tuple[Resource, ...] = ("gpu_hours", "core_hours")


def limits_of(recipe: Identity) -> Limits | None:
    """The limits of a recipe; None if it has no budget."""
    if recipe.budget is None:
        return None
    return {"gpu_hours": recipe.budget.gpu_hours, "core_hours": recipe.budget.core_hours}


def used(store: Store, keys: Iterable[str]) -> Hours:
    """The total use of all attempts at these keys."""
    hours: Hours = {"gpu_hours": 0.0, "core_hours": 0.0}
    for key in keys:
        for _, body in provenance.read(store.ledger, key):
            usage = provenance.usage(body)
            hours["gpu_hours"] += usage.get("gpu_seconds", 0.0) / 3600
            hours["core_hours"] += usage.get("cpu_seconds", 0.0) / 3600
    return hours


def _used_since(store: Store, keys: Iterable[str], path: Path) -> Hours:
    """As `used`, reading the statements that are new since the file was written; one that is damaged is made anew."""
    try:
        earlier: dict[str, _Counted] = json_files.read(path, _COUNTED)
    except FileNotFoundError:
        earlier = {}
    except Damaged as error:
        json_files.report(error, "all statements of the run are read again")
        earlier = {}
    present: dict[str, _Counted] = {}
    for key in keys:
        try:
            statements = len(json_files.names(store.ledger / key))
        except Damaged:  # `used` reports it
            statements = 0
        if key in earlier and earlier[key]["statements"] == statements:
            present[key] = earlier[key]
        else:
            present[key] = {"statements": statements, **used(store, [key])}
    if present != earlier:
        with suppress(OSError):  # a full disk: the next job reads them once more
            atomic_files.write(path, json.dumps(present) + "\n")
    return {
        "gpu_hours": sum(each["gpu_hours"] for each in present.values()),
        "core_hours": sum(each["core_hours"] for each in present.values()),
    }


def describe(hours: Hours, prices: Prices | None) -> str:
    """The used hours in words, with their cost by the prices of a profile."""
    text = f"{hours['gpu_hours']:.3g} GPU hours, {hours['core_hours']:.3g} core hours"
    if not prices:
        return text
    cost = hours["gpu_hours"] * prices["gpu_hour"] + hours["core_hours"] * prices["core_hour"]
    return f"{text}, {cost:,.2f} {prices['currency']}"


def foreseen(limits: Limits | None, spent: Hours, coming: Hours) -> list[str]:
    """One sentence for each limit that a plan exceeds, including the earlier use."""
    if limits is None:
        return []
    return [
        f"the plan exceeds budget.{name} = {limit:,.10g} of the recipe: {coming[name]:,.2f} hours to come, "
        f"{spent[name]:,.2f} used already"
        for name in RESOURCES
        if (limit := limits[name]) is not None and spent[name] + coming[name] > limit
    ]


def exceeded(limits: Limits | None, store: Store, keys: Iterable[str], counted: Path | None = None) -> str | None:
    """The reason why no further stage starts, in one sentence; None within the budget. counted: a file that keeps the
    use at each key, so that the jobs of a run together read each statement about once."""
    if limits is None:
        return None
    hours = used(store, keys) if counted is None else _used_since(store, keys, counted)
    for name in RESOURCES:
        limit = limits[name]
        if limit is not None and hours[name] >= limit:
            resource = name.replace("_", " ")
            return (
                f"the budget of {limit:g} {resource} is used up ({hours[name]:.2f}); raise budget.{name} of the recipe"
            )
    return None
