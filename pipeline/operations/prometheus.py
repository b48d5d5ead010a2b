"""Metrics of a run in the text format of Prometheus, version 0.0.4, as node_exporter's textfile collector reads it.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.tracking.budget import RESOURCES
from pipeline.tracking.snapshot import Snapshot, StageView

Labels = tuple[tuple[str, str], ...]
Sample = tuple[str, Labels, float]
HELP = {
    "atom_snapshot_timestamp_seconds": "When these metrics were read, in seconds since 1970.",
    "atom_stage_info": "State of a stage; the value is 1.",
    "atom_stage_done": "Units of work that a stage has finished.",
    "atom_stage_total": "Units of work of a stage.",
    "atom_stage_remaining_seconds": "Seconds that a running stage still needs at its pace.",
    "atom_stage_restarts": "Restarts of a stage's job.",
    "atom_stage_spikes": "Loss spikes whose update was skipped.",
    "atom_stage_last_event_timestamp_seconds": "When a stage last reported anything, in seconds since 1970.",
    "atom_stage_step_seconds": "Median time of a stage's latest steps.",
    "atom_stage_metric": "Latest value of a curve of a stage, such as loss or grad_norm.",
    "atom_run_used_hours": "Hours used by a run, with those of running attempts.",
    "atom_run_expected_hours": "Hours used when the running stages end.",
    "atom_run_budget_hours": "Budget of the recipe.",
}
"""The metrics, all of them gauges, in the order of their output."""


def exposition(snapshot: Snapshot) -> str:
    """The metrics of a run, sorted by name."""
    by_name: dict[str, list[Sample]] = {name: [] for name in HELP}
    for sample in _samples(snapshot):
        by_name[sample[0]].append(sample)
    lines = []
    for name, samples in by_name.items():
        if samples:
            lines += [f"# HELP {name} {HELP[name]}", f"# TYPE {name} gauge"]
        for _, labels, value in samples:
            shown = ",".join(f'{label}="{_escape(text)}"' for label, text in labels)
            lines.append(f"{name}{{{shown}}} {float(value)!r}")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _samples(snapshot: Snapshot) -> Iterator[Sample]:
    run = (("run", snapshot.run.id), ("recipe", snapshot.run.body["recipe"]))
    yield "atom_snapshot_timestamp_seconds", run, snapshot.time
    for stage in snapshot.stages:
        yield from _of_stage(stage, (*run, ("stage", stage.status.name)))
    for resource in RESOURCES:
        labels = (*run, ("resource", resource))
        yield "atom_run_used_hours", labels, snapshot.spending.now(resource)
        yield "atom_run_expected_hours", labels, snapshot.spending.expected(resource)
        if snapshot.spending.limits and (limit := snapshot.spending.limits.get(resource)) is not None:
            yield "atom_run_budget_hours", labels, limit


def _of_stage(stage: StageView, labels: Labels) -> Iterator[Sample]:
    status, last = stage.status, stage.events.state["last"]
    yield "atom_stage_info", (*labels, ("state", status.state)), 1
    if status.total:
        yield "atom_stage_done", labels, status.done
        yield "atom_stage_total", labels, status.total
    if status.state == "running" and status.eta is not None:
        yield "atom_stage_remaining_seconds", labels, status.eta
    yield "atom_stage_restarts", labels, status.restarts or 0
    if last is not None:
        yield "atom_stage_last_event_timestamp_seconds", labels, last["time"]
    if (step := stage.events.step_seconds()) is not None:
        yield "atom_stage_step_seconds", labels, step
    if stage.curves is not None:
        yield "atom_stage_spikes", labels, stage.curves.count("spike")
        for name in stage.names():
            if (value := stage.curves.last(name)) is not None:
                yield "atom_stage_metric", (*labels, ("name", name)), value
