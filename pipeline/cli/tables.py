"""Tables that the command line prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.core.progress import duration, human, stages
from pipeline.core.stage import RankSimulation, Traffic
from pipeline.core.text import escaped
from pipeline.graph import budget
from pipeline.graph.flat_fields import estimates
from pipeline.graph.plan import PlannedGate, StagePlan, timed
from pipeline.graph.supply import SourceSupply
from pipeline.operations.comparison import Difference, Measured, differing_settings
from pipeline.operations.fit import CostEstimate
from pipeline.operations.layout_search import Search
from pipeline.operations.run_actions import RunRow
from pipeline.tracking.status import Snapshot

# Characters of a value in a table.
LONGEST_VALUE = 48
MOST_REASONS = 4
# More than the columns of any table: all of them may be wrapped.
ALL = 100


def table(*columns: str, right: int = 0, wraps: int = 0, caption: str | None = None, title: str | None = None) -> Table:
    """Returns an empty table without lines.

    Args:
        columns: The heads.
        right: The number of last columns that hold numbers.
        wraps: The number of last columns that may be wrapped.
        caption: The text below.
        title: The text above.
    """
    # Without lines, so that a table can be copied, and cut by column.
    result = Table(
        box=None,
        header_style="bold",
        pad_edge=False,
        padding=(0, 1),
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    for number, column in enumerate(columns, start=1):
        is_number, may_wrap = number > len(columns) - right, number > len(columns) - wraps
        overflow: Any = "fold" if may_wrap else "ellipsis"
        result.add_column(
            escape(column), justify="right" if is_number else "left", overflow=overflow, no_wrap=not may_wrap
        )
    return result


def _cell(value: float | None, unit: str = "") -> str:
    return "" if value is None else human(value) + unit


def plan_table(rows: list[StagePlan]) -> Table:
    """Returns one line for each stage.

    CPU time is shown if every training phase has an estimate of it; GPUs of a rank that does not train, if there are
    any.
    """
    has_cpu_time, has_gpus = timed(row.estimate for row in rows), any(row.gpus for row in rows)
    to_run = [r for r in rows if r.state.text == "to run"]
    seconds = sum(r.estimate.cpu_seconds or 0 for r in to_run)
    time = f", about {duration(seconds)} of CPU time (estimate)" if has_cpu_time else ""
    figures = ("params/active", "tokens", "FLOP", "memory", "disk", *(["CPU"] if has_cpu_time else []), "ranks")
    figures += ("GPUs",) if has_gpus else ()
    caption = f"{len(to_run)} of {len(rows)} stages to run{time}"
    result = table("stage", "key", "state", *figures, right=len(figures), caption=caption)
    for row in rows:
        e = row.estimate
        cpu = "" if e.cpu_seconds is None else duration(e.cpu_seconds)
        result.add_row(
            row.state.name,
            row.state.key.rsplit("-", 1)[1],
            row.state.text,
            f"{human(e.parameters['total'])}/{human(e.parameters['active'])}" if e.parameters else "",
            _cell(e.tokens),
            _cell(e.flops),
            _cell(e.memory_bytes, "B"),
            _cell(e.disk_bytes, "B"),
            *([cpu] if has_cpu_time else []),
            str(row.ranks),
            *([str(row.gpus or "")] if has_gpus else []),
        )
    return result


def phases_table(rows: list[StagePlan]) -> Table | None:
    """Returns the resources that each training phase needs for each rank; None if there is no training phase."""
    phases = [(row, row.estimate.training) for row in rows if row.estimate.training is not None]
    if not phases:
        return None
    figures = ("GFLOP/token", "state", "activ.", "both", "host", "checkpoints", "data")
    result = table("phase", "steps", "batch", "row", "precision", *figures, "layout", wraps=1)
    # The numbers among the columns; the precision stands between them.
    for number in (1, 2, 3, *range(5, 5 + len(figures))):
        result.columns[number].justify = "right"
    for row, t in phases:
        ramp = f"{human(t.batch_tokens[0])}→" if len(t.batch_tokens) > 1 else ""
        result.add_row(
            row.state.name,
            f"{t.steps:,}",
            ramp + human(t.batch_tokens[-1]),
            str(t.sequence_length),
            t.precision,
            f"{t.gflop_per_token:.4g}",
            _binary(t.state_bytes),
            _binary(t.activation_bytes),
            _binary(row.estimate.memory_bytes or 0),
            _binary(row.estimate.host_bytes),
            f"{t.release_checkpoints} x {human(t.checkpoint_bytes)}B",
            human(t.data_bytes) + "B",
            t.layout,
        )
    result.caption = (
        "batch, row: tokens; state, activations, both: bytes of the fullest rank, host: of its copy in host memory; "
        "checkpoints: sealed ones;\ndata: token shards, and the order with one document a row"
    )
    return result


def supply_table(rows: Sequence[SourceSupply]) -> Table:
    """Returns the tokens of each source, and those that each phase asks of it, with the epochs that these are."""
    phases = list(dict.fromkeys(phase for row in rows for phase in row.asked))
    figures = ("supply", "basis", *phases, "epochs", "allowed")
    result = table(
        "source", *figures, right=len(figures), caption="supply: tokens after curation; of a phase: tokens and epochs"
    )
    for row in rows:
        cells = []
        for phase in phases:
            asked = row.asked.get(phase)
            epochs = None if asked is None else row.epochs_of(asked)
            cells.append(_cell(asked) + ("" if epochs is None else f" {epochs:.2f}"))
        total = "" if row.epochs is None else f"{row.epochs:.2f}"
        result.add_row(
            row.source, _cell(row.tokens), row.basis, *cells, total, f"{row.most_epochs:g}".replace("inf", "any")
        )
    return result


def gates_table(gates: Sequence[PlannedGate]) -> Table | None:
    """Returns the gates on the effect of training, and where each is judged; None if there are none."""
    if not gates:
        return None
    caption = "atom build judges all gates once more, and those that docs/formats.md lists beside these"
    result = table("after", "gate", "judged by", "compares", wraps=1, caption=caption)
    for gate in gates:
        judged_by = gate.judged_by if gate.waived is None else "nothing: waived"
        result.add_row(gate.phase, gate.name, judged_by, gate.compares)
    return result


def simulation_table(name: str, result: RankSimulation) -> Table:
    """Returns the traffic of a simulated rank in a step, by operation and group.

    The title has the simulated memory of the rank, and the planned memory for comparison.
    """
    activations = result.peak_bytes - result.state_bytes, result.planned_peak_bytes - result.planned_state_bytes
    excess = result.planned_peak_bytes / result.peak_bytes - 1
    lines = [
        f"{name}: rank {result.rank} of {result.ranks:,}, simulated",
        f"parameters: {result.parameters:,}, planned: {result.planned_parameters:,}",
        f"state: {_binary(result.state_bytes)}, planned: {_binary(result.planned_state_bytes)}",
        f"activations: {_binary(activations[0])}, planned: {_binary(activations[1])}",
        f"peak: {_binary(result.peak_bytes)}, planned: {_binary(result.planned_peak_bytes)} ({excess:+.1%})",
    ]
    if result.copies_bytes:
        copies = f"{_binary(result.copies_bytes)}, planned: {_binary(result.planned_copies_bytes)}"
        lines.append(f"copies on the host: {copies}")
    title = "\n".join(lines)
    caption = (
        f"calls, sum: of a step of {result.micro_batches} micro-batches; bytes of a collective: of its larger side;\n"
        f"memory and sequence (--json): of a simulated step of {result.simulated_micro_batches} micro-batches"
    )
    traffic = table("collective", "group", "ranks", "calls", "largest", "sum", right=5, caption=caption, title=title)
    # Collectives of different sizes in one group are one row.
    together: dict[tuple[str, str, int], list[Traffic]] = {}
    for row in result.traffic:
        together.setdefault((row.operation, row.group, row.ranks), []).append(row)
    for (operation, group, ranks), rows in sorted(together.items(), key=lambda x: -sum(_volume(r) for r in x[1])):
        calls, largest = sum(row.calls for row in rows), max(row.bytes for row in rows)
        volume = human(sum(map(_volume, rows))) + "B"
        traffic.add_row(operation, group, str(ranks), f"{calls:,}", human(largest) + "B", volume)
    return traffic


def _volume(row: Traffic) -> int:
    return row.bytes * row.calls


def cost_table(estimate: CostEstimate) -> Table:
    """Returns the expected use of each stage to run on a cluster, without the stages that have no estimate."""
    prices, total = estimate.profile.prices, estimate.total
    hours = {"GPU hours": "gpu_hours", "core hours": "core_hours"}
    if total.server_gpu_hours or total.server_core_hours:
        hours["of servers"] = "server_gpu_hours" if total.server_gpu_hours else "server_core_hours"
    figures = ("hours", *hours, *([prices.currency] if prices else []), "energy")
    caption = "hours: on the clock; of all: one stage after the other; money and energy: by the profile"
    result = table(f"on {estimate.profile.name}", *figures, right=len(figures), caption=caption)
    for use in (*(use for use in estimate.uses if use.why is None), estimate.total):
        result.add_row(
            use.name,
            _hours(use.hours),
            *(_hours(value) if (value := getattr(use, name)) else "" for name in hours.values()),
            *([f"{use.cost:,.2f}"] if prices else []),
            (human(use.energy_wh) if use.energy_wh >= 100 else f"{use.energy_wh:.2g}") + "Wh",
        )
    return result


def search_table(result: Search) -> Table:
    """Returns the layouts of a search: that of the recipe, and the fastest that fit."""
    prices = result.profile.prices
    figures = ("micro-batch", "memory", "tokens/s", "hours", "GPU hours", *([prices.currency] if prices else []))
    caption = "micro-batch: tokens; memory: of the fullest GPU; tokens/s: of one GPU; hours: on the clock"
    columns = (f"{result.phase} on {result.profile.name}", *figures, "layout")
    shown = table(*columns, wraps=1, caption=caption)
    for column in shown.columns[1 : 1 + len(figures)]:
        column.justify = "right"
    ranked = enumerate(result.found, 1)
    for name, layout in (("as written", result.written), *((str(number), layout) for number, layout in ranked)):
        shown.add_row(
            name,
            human(layout.settings["batch.micro_tokens"]),
            _binary(layout.memory_bytes),
            f"{layout.tokens_per_second:,.0f}",
            _hours(layout.hours),
            _hours(layout.gpu_hours),
            *([f"{layout.cost:,.2f}"] if prices else []),
            layout.label + (f" (needs {layout.package})" if layout.package else ""),
        )
    return shown


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _binary(value: float) -> str:
    """Returns bytes as memory is counted: 40.1Gi, 7.53Mi."""
    return f"{value / 2**30:.3g}Gi" if value >= 2**30 else f"{value / 2**20:.3g}Mi"


def status_table(snapshot: Snapshot) -> Table:
    run, stages = snapshot.run, [stage.status for stage in snapshot.stages]
    used = budget.describe(snapshot.used, run.body.get("prices"))
    # The columns of jobs stand only where there are some.
    slurm = any(s.job for s in stages)
    sealed = sum(s.state == "sealed" for s in stages)
    columns = ("stage", "state", *(("job", "nodes", "restarts") if slurm else ()), "progress", "time", "left", "report")
    caption = f"{sealed} of {len(stages)} stages sealed; used so far: {used}"
    result = table(*columns, "", wraps=1, caption=caption, title=f"run {run.id} of {run.owner}")
    for s in stages:
        progress = f"{s.done}/{s.total} {s.unit}" if s.total else ""
        state = s.state if (s.ranks or 1) == 1 else f"{s.state}, {s.ranks} ranks"
        job = f"{s.job} of {s.user}" if s.user else s.job or ""
        where = (job, s.nodes or "", str(s.restarts or "")) if slurm else ()
        result.add_row(s.name, state, *where, progress, *s.times, s.detail)
    return result


def value_text(value: Any) -> str:
    """Returns a setting in one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape(escaped(text, LONGEST_VALUE))


def print_difference(difference: Difference, first: str, second: str, console: Console) -> None:
    if not difference.fields:
        print("no setting differs")
    else:
        settings = table("setting", first, second, "", wraps=ALL)
        for change in difference.fields:
            mark = "in no key" if change.operational else ""
            settings.add_row(escape(change.field), value_text(change.before), value_text(change.after), mark)
        console.print(settings)
    if difference.stages:
        console.print()
        changed = table("stage", "key", "state", "because", wraps=ALL)
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


def print_comparison(rows: list[Measured], console: Console) -> None:
    """Prints a comparison of runs: different settings, metrics, scores and costs.

    A metric or score has a row if several runs have it, and only for stages whose keys differ between the runs.
    """
    names = [row.run.id for row in rows]
    if different := differing_settings(rows):
        settings = table("setting", *names, wraps=ALL)
        for field, values in different.items():
            settings.add_row(escape(field), *map(value_text, values))
        console.print(settings)
        console.print()
    # Stages with equal keys in all runs have equal results.
    shared = [stage for stage in rows[0].keys if len({row.keys.get(stage) for row in rows}) == 1]
    for title, parts in (
        ("last value", [row.metrics for row in rows]),
        ("score", [{stage: estimates(scores) for stage, scores in row.scores.items()} for row in rows]),
    ):
        figures = table(title, *names, right=len(names), wraps=ALL)
        for stage in dict.fromkeys(stage for part in parts for stage in part if stage not in shared):
            for name in dict.fromkeys(name for part in parts for name in part.get(stage, {})):
                values = [part.get(stage, {}).get(name) for part in parts]
                if len(rows) == 1 or sum(value is not None for value in values) > 1:
                    texts = ("" if value is None else f"{value:.5g}" for value in values)
                    figures.add_row(escape(f"{stage}.{name}"), *texts)
        if figures.row_count:
            console.print(figures)
            console.print()
    console.print(_measured_costs(rows, names))
    if shared and len(rows) > 1:
        print(f"{stages(len(shared))} with equal keys in all runs: {', '.join(shared)}")


def _measured_costs(rows: list[Measured], names: list[str]) -> Table:
    caption = "cost: of all attempts at the stages of a run, failed ones and those of other runs included"
    result, costs = table("cost", *names, right=len(names), wraps=ALL, caption=caption), [row.cost for row in rows]
    result.add_row("stages sealed", *(f"{row.sealed} of {len(row.keys)}" for row in rows))
    result.add_row("attempts", *(str(cost.attempts) for cost in costs))
    labels = {"wall_hours": "wall h", "core_hours": "core h", "gpu_hours": "GPU h", "energy_wh": "energy Wh"}
    for name, label in labels.items():
        if any(getattr(cost, name) for cost in costs):
            result.add_row(label, *(f"{getattr(cost, name):.3g}" for cost in costs))
    if any(cost.money is not None for cost in costs):
        money = (f"{cost.money:,.2f} {escape(str(cost.currency))}" if cost.money is not None else "" for cost in costs)
        result.add_row("money", *money)
    return result


def run_table(rows: list[RunRow]) -> Table:
    result = table("run", "owner", "recipe", "state", "stages", "hours", "last event (UTC)", "stage", "", wraps=ALL)
    for row in rows:
        release, sealed = escape(f"{row.recipe} {row.version}"), f"{row.sealed}/{row.stages}"
        last = row.json()["last_event"].replace("T", " ").rstrip("Z")
        message = escape(escaped(row.message or "", LONGEST_VALUE))
        times = (f"{row.hours:.2f}", last)
        result.add_row(row.id, escape(row.owner), release, row.state, sealed, *times, row.stage or "", message)
    return result
