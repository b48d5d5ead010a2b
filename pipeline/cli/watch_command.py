"""The command that watches a run from outside of its jobs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core.errors import AtomError
from pipeline.operations.command_options import RunArgument, open_store

app = typer.Typer()


@app.command()
def watch(
    run: RunArgument = None,
    command: Annotated[
        str | None,
        typer.Option(
            help="shell command for each alert, as JSON on its input and in ATOM_RUN, ATOM_ALERT and ATOM_TEXT"
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="look once, for cron; exit code 1 if an alert stands")] = False,
    every: Annotated[float, typer.Option(min=1, max=86_400, help="seconds between two looks")] = 60.0,
    state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where sent alerts are kept; default: watch.json of the run")
    ] = None,
    stalled_steps: Annotated[
        float, typer.Option(min=2, max=1e6, help="median step times without a report after which a stage has stalled")
    ] = 20.0,
    stalled_seconds: Annotated[
        float, typer.Option(min=1, max=1e6, help="and at least so many seconds; evaluation and checkpoints take time")
    ] = 300.0,
    budget_share: Annotated[float, typer.Option(min=0, max=1, help="share of the budget that is an alert")] = 0.9,
    free_gb: Annotated[float, typer.Option(min=0, max=1e9, help="free GB on the disk of $ATOM_HOME")] = 1.0,
    waiting_hours: Annotated[
        float, typer.Option(min=0, max=1e5, help="hours of waiting for Slurm alone that are an alert")
    ] = 24.0,
    restarts_a_day: Annotated[
        int, typer.Option(min=1, max=1000, help="starts of a stage within a day, above which is an alert")
    ] = 5,
) -> None:
    """Send an alert when something in a run is wrong.

    Run it on any host that sees $ATOM_HOME. Alerts: a stage has failed, stalled or restarts too often; a job does not
    start before a person acts, was cancelled by another user or waits for long; a slow rank, an avoided node, a loss
    spike, dead experts, the budget, the disk. Each is sent once, and again only after it was over. A job that is queued
    again is no failure. The command needs nothing from the jobs: it sees a node that has vanished.

    Example: atom watch --command 'curl -sSf --json @- https://chat.example.org/hook'
    """
    from pipeline.graph import run as runs
    from pipeline.launch import slurm_client
    from pipeline.operations import alerts
    from pipeline.tracking import snapshot

    store = open_store()
    this = runs.find(store, run)
    limits = alerts.Thresholds(stalled_steps, stalled_seconds, budget_share, free_gb, waiting_hours, restarts_a_day)
    watcher = alerts.Watcher(this.id, state or this.folder / "watch.json", command)
    answers, lack = slurm_client.Answers(slurm_client.ASK_EVERY), None
    while True:
        current = snapshot.take(this, store, answers)
        if current.lack and current.lack != lack:
            print(f"atom: {current.lack}", file=sys.stderr, flush=True)
        lack = current.lack
        standing = alerts.alerts(current, store, limits)
        new, problems = watcher.send(standing)
        for alert in standing if once else new:
            print(f"{alert.kind}: {alert.text}", flush=True)
        if once and problems:
            raise AtomError(problems[0])
        for problem in problems:
            print(f"atom: {problem}", file=sys.stderr, flush=True)
        if once or current.over:
            raise typer.Exit(1 if standing else 0)
        time.sleep(every)
