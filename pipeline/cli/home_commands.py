"""The commands about all that lies under $ATOM_HOME: list and compare runs, watch one, free space."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer

from pipeline.core.errors import AtomError
from pipeline.core.text import escaped
from pipeline.operations.command_options import (
    JsonOption,
    RunArgument,
    confirm,
    console,
    find_run,
    open_store,
    warn_of_home,
)

app = typer.Typer()


@app.command("runs")
def list_runs(
    recipe: Annotated[str | None, typer.Option(help="only runs of the recipe with this name")] = None,
    last: Annotated[int, typer.Option(help="only so many runs, the latest; 0: all")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List the runs of $ATOM_HOME, the latest last.

    Each has its recipe, its state, the number of its sealed stages, the hours from its start to its last event, and the
    stage of that event or of the failure.

    Example: atom runs --recipe atom-tiny --last 5
    """
    from pipeline.cli.tables import run_table
    from pipeline.graph import run as runs
    from pipeline.operations import run_actions

    if last < 0:
        raise AtomError(f"--last {last} is no number of runs; use 0 for all, or more")
    store = open_store()
    warn_of_home(store)
    every = [run for run in runs.runs(store) if recipe in (None, run.body["recipe"])]
    rows, lack = run_actions.list_rows(every[-last:], store)
    if as_json:
        body = {"runs": [row.json() for row in rows], "earlier": len(every) - len(rows), "unknown": lack}
        print(json.dumps(body, indent=1))
        return
    if lack:
        print(f"atom: {lack}", file=sys.stderr)
    if not every:
        print(f"there is no run under {store.logs}" + (f" of recipe {escaped(recipe, 80)}" if recipe else ""))
        return
    console().print(run_table(rows))
    if len(rows) < len(every):
        print(f"and {len(every) - len(rows)} earlier runs: atom runs --last 0")


@app.command()
def compare(
    run: Annotated[list[str], typer.Argument(metavar="RUN...", help="ids of runs, or their beginnings")],
    as_json: JsonOption = False,
) -> None:
    """Compare runs by metrics, scores and cost.

    The settings in which they differ, the last value of each metric, the scores of evaluations, and the time, energy
    and money that their stages took. A run may still be running. The tables leave out stages with equal keys in all
    runs, and figures that one run alone has; --json has them.

    Example: atom compare atom-tiny-20261128-083109 atom-tiny-20261128-102030
    """
    from pipeline.cli.tables import print_comparison
    from pipeline.graph import run as runs
    from pipeline.operations import comparison

    store = open_store()
    warn_of_home(store)
    chosen = {each.id: each for each in (runs.find(store, reference) for reference in run)}
    rows = [comparison.measure(each, store) for each in chosen.values()]
    if as_json:
        body = {"different": comparison.differing_settings(rows), "runs": [row.json() for row in rows]}
        print(json.dumps(body, indent=1))
    else:
        print_comparison(rows, console())


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
    stalled_seconds: Annotated[
        float, typer.Option(min=1, max=1e6, help="seconds without a report after which a stage has stalled")
    ] = 300.0,
    free_gb: Annotated[float, typer.Option(min=0, max=1e9, help="free GB on the disk of $ATOM_HOME")] = 1.0,
) -> None:
    """Send an alert when something in a run is wrong.

    Run it on any host that sees $ATOM_HOME. Alerts: a stage has failed or stalled; a job does not start before a person
    acts, or was cancelled by another user; a slow rank, an avoided node, a loss spike, dead experts, the budget, the
    disk. Each is sent once, and again only after it was over. A job that is queued again is no failure. The command
    needs nothing from the jobs: it sees a node that has vanished.

    Example: atom watch --command 'curl -sSf --json @- https://chat.example.org/hook'
    """
    from pipeline.launch import slurm_client
    from pipeline.operations import alerts
    from pipeline.tracking import status

    chosen_run, store = find_run(run)
    limits = alerts.Thresholds(stalled_seconds, free_gb)
    watcher = alerts.Watcher(chosen_run.id, chosen_run.folder / "watch.json", command)
    # A lack of answers is printed when it begins, not at each look.
    answers, lack = slurm_client.Answers(slurm_client.ASK_EVERY), None
    while True:
        current = status.take(chosen_run, store, answers)
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


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="delete what is listed, after a question")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask before deleting")] = False,
    include: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="this artifact and its work, too, whatever references it")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List unused data, or delete it.

    Data that a run references, that a release was built from or that a running job needs is never listed. Products and
    checkpoints of training are listed only if --include names them. What is deleted is gone.

    Example: atom gc --delete
    """
    from pipeline.core.progress import human
    from pipeline.operations import garbage_collection as collector

    if as_json and delete and not yes:
        raise AtomError("atom gc --delete --json asks no question; add --yes")
    store, named = open_store(), include or ()
    rows, notes = collector.loose(store, named)
    size = human(sum(row.bytes for row in rows))
    if not as_json:
        for row in rows:
            print(f"{human(row.bytes):>8}B  {row.path}  ({row.why})")
        print(*notes, f"{size}B can be deleted", sep="\n")
    if delete:
        if rows and not yes:
            confirm(f"{size}B are to be deleted for good", "delete them")
        # Only what was shown is deleted, though more may be loose by now.
        rows = collector.delete(store, {row.path for row in rows}, named)
    if as_json:
        print(json.dumps({"loose": [row.json() for row in rows], "kept": notes, "deleted": delete}, indent=1))
    elif delete:
        print(f"{human(sum(row.bytes for row in rows))}B freed")
