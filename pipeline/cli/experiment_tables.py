"""Tables of the commands that compare recipes and runs."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.cli import tables
from pipeline.cli.tables import cost_table
from pipeline.core.figures import estimates
from pipeline.core.progress import stages
from pipeline.core.text import escaped
from pipeline.operations.recipe_diff import Difference
from pipeline.operations.run_comparison import Measured, differing_settings
from pipeline.operations.run_list import RunRow

table = partial(tables.table, wraps=100)
"""All columns may be wrapped."""
LONGEST_VALUE = 48
"""Characters of a value in a table."""
MOST_REASONS = 4
CURVE_ROWS = 20
"""Steps of a curve in a table; --json has them all."""


def value_text(value: Any) -> str:
    """A setting in one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape(escaped(text, LONGEST_VALUE))


def print_difference(difference: Difference, first: str, second: str, console: Console) -> None:
    if not difference.fields:
        print("no setting differs")
    else:
        settings = table("setting", first, second, "")
        for change in difference.fields:
            mark = "in no key" if change.operational else ""
            settings.add_row(escape(change.field), value_text(change.before), value_text(change.after), mark)
        console.print(settings)
    if difference.stages:
        console.print()
        changed = table("stage", "key", "state", "because")
        for row in difference.stages:
            reasons = row.because.split(", ")
            rest = f" and {len(reasons) - MOST_REASONS} more" if len(reasons) > MOST_REASONS else ""
            key = row.key.rsplit("-", 1)[1]
            changed.add_row(row.name, key, row.state, escape(", ".join(reasons[:MOST_REASONS]) + rest))
        console.print(changed)
    to_run = [row.name for row in difference.stages if row.state == "to run"]
    if to_run:
        console.print()
        console.print(cost_table(difference.costs))
        print(*difference.costs.assumed, sep="\n")
    sealed = len(difference.stages) - len(to_run)
    print(
        f"{stages(difference.unchanged)} unchanged, {len(difference.stages)} changed: {len(to_run)} to run, "
        f"{sealed} sealed already"
    )
    if difference.removed:
        print(f"not in {second}: {', '.join(difference.removed)}")
    if difference.unsealed:
        print(f"unchanged, and not sealed here either: {', '.join(difference.unsealed)}")


def print_comparison(rows: list[Measured], curves: list[str], console: Console) -> None:
    """The settings in which runs differ, the metrics and scores that several runs have for stages with other keys,
    curves, and costs."""
    names = [row.run.id for row in rows]
    if different := differing_settings(rows):
        settings = table("setting", *names)
        for field, values in different.items():
            settings.add_row(escape(field), *map(value_text, values))
        console.print(settings)
        console.print()
    shared = [stage for stage in rows[0].keys if len({row.keys.get(stage) for row in rows}) == 1]
    for title, parts in (
        ("last value", [row.metrics for row in rows]),
        ("score", [{stage: estimates(scores) for stage, scores in row.scores.items()} for row in rows]),
    ):
        figures = table(title, *names, right=len(names))
        for stage in dict.fromkeys(stage for part in parts for stage in part if stage not in shared):
            for name in dict.fromkeys(name for part in parts for name in part.get(stage, {})):
                values = [part.get(stage, {}).get(name) for part in parts]
                if len(rows) == 1 or sum(value is not None for value in values) > 1:
                    texts = ("" if value is None else f"{value:.5g}" for value in values)
                    figures.add_row(escape(f"{stage}.{name}"), *texts)
        if figures.row_count:
            console.print(figures)
            console.print()
    for curve in curves:
        console.print(_curve_table(curve, rows, names))
        console.print()
    console.print(_cost_table(rows, names))
    if shared and len(rows) > 1:
        print(f"{stages(len(shared))} with equal keys in all runs: {', '.join(shared)}")


def _curve_table(curve: str, rows: list[Measured], names: list[str]) -> Table:
    steps = sorted({step for row in rows for step in row.curves[curve]})
    stride = -(-len(steps) // CURVE_ROWS) or 1
    result = table(f"{curve} at step", *names, right=len(names))
    for step in dict.fromkeys([*steps[::stride], *steps[-1:]]):
        values = [row.curves[curve].get(step) for row in rows]
        result.add_row(str(step), *("" if value is None else f"{value:.5g}" for value in values))
    return result


def _cost_table(rows: list[Measured], names: list[str]) -> Table:
    result = table("cost", *names, right=len(names))
    result.add_row("stages sealed", *(f"{row.sealed} of {len(row.keys)}" for row in rows))
    for title, kind in (("", "cost"), (", this run alone", "spent")):
        costs = [getattr(row, kind) for row in rows]
        result.add_row(f"attempts{title}", *(str(cost.attempts) for cost in costs))
        for name, unit in (("wall_hours", "h"), ("core_hours", "h"), ("gpu_hours", "h"), ("energy_wh", "Wh")):
            if any(getattr(cost, name) for cost in costs):
                label = name.rpartition("_")[0].replace("gpu", "GPU")
                result.add_row(f"{label} {unit}{title}", *(f"{getattr(cost, name):.3g}" for cost in costs))
        if any(cost.money is not None for cost in costs):
            money = (f"{cost.money:,.2f} {escape(cost.currency)}" if cost.money is not None else "" for cost in costs)
            result.add_row(f"money{title}", *money)
    result.caption = "cost: of all attempts at the stages of a run, failed ones and those of other runs included"
    result.caption_justify = "left"
    return result


def run_table(rows: list[RunRow]) -> Table:
    result = table("run", "owner", "recipe", "state", "stages", "hours", "last event (UTC)", "stage", "")
    for row in rows:
        result.add_row(
            row.id, escape(row.owner), escape(f"{row.recipe} {row.version}"), row.state,
            f"{row.sealed}/{row.stages}", f"{row.hours:.2f}", row.json()["last_event"].replace("T", " ").rstrip("Z"),
            row.stage or "", escape(escaped(row.message or "", LONGEST_VALUE)),
        )  # fmt: skip
    return result
