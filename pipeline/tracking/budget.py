"""What a recipe's stages have used so far, by the ledger, failed attempts included, against what its budget allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.core import provenance
from pipeline.core.store import Store


def used(store: Store, keys: Iterable[str]) -> dict[str, float]:
    """Hours of GPUs that were allotted, and of cores that were busy, by all attempts at these keys."""
    hours = {"gpu_hours": 0.0, "core_hours": 0.0}
    for key in keys:
        for _, body in provenance.read(store.ledger, key):
            usage = provenance.usage(body)
            hours["gpu_hours"] += usage.get("gpu_seconds", 0.0) / 3600
            hours["core_hours"] += usage.get("cpu_seconds", 0.0) / 3600
    return hours


def told(hours: Mapping[str, float], prices: Mapping[str, Any] | None) -> str:
    """Hours that were used in words, with what they cost by a profile's prices."""
    text = f"{hours['gpu_hours']:.3g} GPU hours, {hours['core_hours']:.3g} core hours"
    if not prices:
        return text
    cost = hours["gpu_hours"] * prices["gpu_hour"] + hours["core_hours"] * prices["core_hour"]
    return f"{text}, {cost:,.2f} {prices['currency']}"


def foreseen(
    limits: Mapping[str, float | None] | None, spent: Mapping[str, float], coming: Mapping[str, float]
) -> list[str]:
    """For each limit that a plan exceeds, with what was used already, a sentence that says so."""
    return [
        f"the plan exceeds budget.{name} = {limit:,.10g} of the recipe: {coming[name]:,.2f} hours to come, "
        f"{spent[name]:,.2f} used already"
        for name, limit in (limits or {}).items()
        if limit is not None and spent[name] + coming[name] > limit
    ]


def exceeded(limits: Mapping[str, float | None] | None, store: Store, keys: Iterable[str]) -> str | None:
    """Why nothing further is begun, in one sentence; None within the budget."""
    if not limits:
        return None
    hours = used(store, keys)
    for name, limit in limits.items():
        if limit is not None and hours[name] >= limit:
            resource = name.replace("_", " ")
            return (
                f"the budget of {limit:g} {resource} is used up ({hours[name]:.2f}); raise budget.{name} of the recipe"
            )
    return None
