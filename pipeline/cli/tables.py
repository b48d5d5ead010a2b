"""Tables that the command line prints."""

from __future__ import annotations

from rich.table import Table

from pipeline.core.progress import duration, human
from pipeline.core.stage import LongContext, RankSimulation, Traffic
from pipeline.graph.plan import StagePlan, timed
from pipeline.graph.run import NodeStatus
from pipeline.operations.cost_estimate import CostEstimate


def _cell(value: float | None, unit: str = "") -> str:
    return "" if value is None else human(value) + unit


def plan_table(rows: list[StagePlan]) -> Table:
    """One line for each stage. CPU time is shown if every training phase has an estimate of it; GPUs of
    a rank that does not train, if there are any."""
    has_cpu_time, has_gpus = timed(row.estimate for row in rows), any(row.gpus for row in rows)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for column in ("stage", "key", "state"):
        table.add_column(column, no_wrap=True)
    for column in (
        "params/active",
        "tokens",
        "FLOP",
        "memory",
        "disk",
        *(["CPU"] if has_cpu_time else []),
        "ranks",
        *(["GPUs"] if has_gpus else []),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        e = row.estimate
        cpu = "" if e.cpu_seconds is None else duration(e.cpu_seconds)
        table.add_row(
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
    to_run = [r for r in rows if r.state.text == "to run"]
    seconds = sum(r.estimate.cpu_seconds or 0 for r in to_run)
    time = f", about {duration(seconds)} of CPU time (estimate)" if has_cpu_time else ""
    table.caption = f"{len(to_run)} of {len(rows)} stages to run{time}"
    table.caption_justify = "left"
    return table


def phases_table(rows: list[StagePlan]) -> Table | None:
    """The resources that each training phase needs for each rank; None if there is no training phase."""
    phases = [(row, row.estimate.training) for row in rows if row.estimate.training is not None]
    if not phases:
        return None
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("phase", no_wrap=True)
    for column in ("steps", "batch", "row"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("precision", no_wrap=True)
    for column in ("GFLOP/token", "state", "activ.", "both", "host", "checkpoints", "data"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("layout")
    for row, t in phases:
        ramp = f"{human(t.batch_tokens[0])}→" if len(t.batch_tokens) > 1 else ""
        table.add_row(
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
    table.caption = (
        "batch, row: tokens; state, activations, both: bytes of the fullest rank, host: of its copy in host memory; "
        "checkpoints: sealed ones;\ndata: token shards, and the order with one document a row"
    )
    table.caption_justify = "left"
    return table


def long_context_table(cost: LongContext) -> Table:
    """The cache and the FLOPs of a long text, beside those of full attention in all layers."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column(f"{cost.tokens:,} tokens", no_wrap=True)
    for column in ("cache in bf16", "GFLOP/token"):
        table.add_column(column, justify="right", no_wrap=True)
    columns = ((cost.cache_bytes, cost.full_cache_bytes), (cost.flops_per_token, cost.full_flops_per_token))
    (cache, full_cache), (flops, full_flops) = columns
    table.add_row("this model", _binary(cache), f"{flops / 1e9:.4g}")
    table.add_row("with full attention", _binary(full_cache), f"{full_flops / 1e9:.4g}")
    table.add_row("saved", *(f"{1 - part / whole:.1%}" for part, whole in columns))
    return table


def simulation_table(name: str, result: RankSimulation) -> Table:
    """What a simulated rank sends in a step, by operation and group, under its memory beside the estimate."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1), title_justify="left")
    activations = result.peak_bytes - result.state_bytes, result.planned_peak_bytes - result.planned_state_bytes
    table.title = "\n".join([
        f"{name}: rank {result.rank} of {result.ranks:,}, simulated",
        f"parameters: {result.parameters:,}, planned: {result.planned_parameters:,}",
        f"state: {_binary(result.state_bytes)}, planned: {_binary(result.planned_state_bytes)}",
        f"activations: {_binary(activations[0])}, planned: {_binary(activations[1])}",
        f"peak: {_binary(result.peak_bytes)}, planned: {_binary(result.planned_peak_bytes)} "
        f"({result.planned_peak_bytes / result.peak_bytes - 1:+.1%})",
        *([f"copies on the host: {_binary(result.copies_bytes)}, planned: {_binary(result.planned_copies_bytes)}"]
          if result.copies_bytes else []),
    ])  # fmt: skip
    table.add_column("collective", no_wrap=True)
    for column in ("group", "ranks", "calls", "largest", "sum"):
        table.add_column(column, justify="right", no_wrap=True)
    together: dict[tuple[str, str, int], list[Traffic]] = {}
    for row in result.traffic:
        together.setdefault((row.operation, row.group, row.ranks), []).append(row)
    for (operation, group, ranks), rows in sorted(together.items(), key=lambda x: -sum(_volume(r) for r in x[1])):
        calls, largest = sum(row.calls for row in rows), max(row.bytes for row in rows)
        volume = human(sum(map(_volume, rows))) + "B"
        table.add_row(operation, group, str(ranks), f"{calls:,}", human(largest) + "B", volume)
    table.caption = (
        f"calls, sum: of a step of {result.micro_batches} micro-batches; bytes of a collective: of its larger side;\n"
        f"memory and sequence (--json): of a simulated step of {result.simulated_micro_batches} micro-batches"
    )
    table.caption_justify = "left"
    return table


def _volume(row: Traffic) -> int:
    return row.bytes * row.calls


def cost_table(estimate: CostEstimate) -> Table:
    """The expected use of each stage to run on a cluster, without the stages that have no estimate."""
    prices, total = estimate.profile.prices, estimate.total
    hours = {"GPU hours": "gpu_hours", "core hours": "core_hours"}
    if total.server_gpu_hours or total.server_core_hours:
        hours["of servers"] = "server_gpu_hours" if total.server_gpu_hours else "server_core_hours"
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column(f"on {estimate.profile.name}", no_wrap=True)
    for column in ("hours", *hours, *([prices.currency] if prices else []), "energy"):
        table.add_column(column, justify="right", no_wrap=True)
    for use in (*(use for use in estimate.uses if use.why is None), estimate.total):
        table.add_row(
            use.name,
            _hours(use.hours),
            *(_hours(value) if (value := getattr(use, name)) else "" for name in hours.values()),
            *([f"{use.cost:,.2f}"] if prices else []),
            (human(use.energy_wh) if use.energy_wh >= 100 else f"{use.energy_wh:.2g}") + "Wh",
        )
    table.caption = "hours: on the clock; of all: one stage after the other; money and energy: by the profile"
    table.caption_justify = "left"
    return table


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _binary(value: float) -> str:
    """Bytes as memory is counted: 40.1Gi, 7.53Mi."""
    return f"{value / 2**30:.3g}Gi" if value >= 2**30 else f"{value / 2**20:.3g}Mi"


def status_table(run: str, owner: str, stages: list[NodeStatus], used: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, title=f"run {run} of {owner}", title_justify="left")
    slurm = any(s.job for s in stages)
    for column in (
        "stage",
        "state",
        *(("job", "nodes", "restarts") if slurm else ()),
        "progress",
        "time",
        "left",
        "report",
        "",
    ):
        table.add_column(column, no_wrap=column != "")
    for s in stages:
        progress = f"{s.done}/{s.total} {s.unit}" if s.total else ""
        state = s.state if (s.ranks or 1) == 1 else f"{s.state}, {s.ranks} ranks"
        job = f"{s.job} of {s.user}" if s.user else s.job or ""
        where = (job, s.nodes or "", str(s.restarts or "")) if slurm else ()
        table.add_row(s.name, state, *where, progress, *s.times, s.detail)
    sealed = sum(s.state == "sealed" for s in stages)
    table.caption = f"{sealed} of {len(stages)} stages sealed; used so far: {used}"
    table.caption_justify = "left"
    return table
