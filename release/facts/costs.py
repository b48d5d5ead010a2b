"""The cost of a release by stage, including failed attempts, from its published statements."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.core import provenance

Costs = dict[str, dict[str, float]]
JOULES_PER_WH = 3600.0
COLUMNS = ("attempts", "failed", "core_hours", "gpu_hours", "energy_wh")


def usage_by_stage(statements: Iterable[provenance.Statement]) -> Costs:
    """{stage: {attempts, failed, core_hours (busy), gpu_hours (allotted), energy_wh (an estimate)}} in alphabetical
    order. A release checkpoint is part of the attempt that wrote it and is not counted again."""
    costs_by_stage: Costs = {}
    for body in statements:
        if provenance.phase_of(body) is not None:
            continue
        usage, stage = provenance.usage(body), str(provenance.parameters_of(body)["stage"])
        row = costs_by_stage.setdefault(stage, dict.fromkeys(COLUMNS, 0.0))
        row["attempts"] += 1
        row["failed"] += provenance.outcome(body) != "sealed"
        row["core_hours"] += usage.get("cpu_seconds", 0.0) / 3600
        row["gpu_hours"] += usage.get("gpu_seconds", 0.0) / 3600
        row["energy_wh"] += usage.get("energy_joules_estimate", 0.0) / JOULES_PER_WH
    return dict(sorted(costs_by_stage.items()))


def total(costs: Costs) -> dict[str, float]:
    return {column: sum(row[column] for row in costs.values()) for column in COLUMNS}


def rows(costs: Costs) -> list[list[Any]]:
    """Cells of a table: one row for each stage, and one for the total."""
    all_rows = {**costs, "all": total(costs)}
    return [
        [name, f"{row['attempts']:.0f}", f"{row['failed']:.0f}", *(f"{row[c]:.3g}" for c in COLUMNS[2:])]
        for name, row in all_rows.items()
    ]
