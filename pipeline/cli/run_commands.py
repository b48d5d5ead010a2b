"""The commands that take a run: show its status and logs, cancel it, retry it, send its curves to MLflow again."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.core.errors import AtomError
from pipeline.operations.command_options import (
    JsonOption,
    RunArgument,
    confirm,
    console,
    find_run,
    graph_of,
    open_store,
)

if TYPE_CHECKING:
    from pipeline.graph.run import NodeStatus, Run

app = typer.Typer()


@app.command()
def status(
    run: RunArgument = None,
    watch: Annotated[bool, typer.Option("--watch", help="redraw every two seconds until the run ends")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the progress and the resource use of a run.

    The use of time and money includes failed attempts.

    Example: atom status --watch
    """
    if watch and as_json:
        raise AtomError("atom status: --watch and --json are different outputs; give one of them at a time")
    from rich.console import Group
    from rich.live import Live
    from rich.markup import escape

    from pipeline.cli.tables import status_table
    from pipeline.launch import bad_nodes, slurm_client
    from pipeline.tracking import status

    chosen, store = find_run(run)
    # The screen is drawn more often than Slurm is asked.
    answers = slurm_client.Answers(slurm_client.ASK_EVERY)
    current = status.take(chosen, store, answers)
    if as_json:
        body: dict[str, Any] = {"schema": 1, "run": chosen.id, "owner": chosen.owner}
        body |= {"unknown": current.lack, "used": current.used}
        body["stages"] = [stage.status.json() for stage in current.stages]
        if bad := bad_nodes.read(store):
            body["bad_nodes"] = [asdict(entry) for entry in bad]
        print(json.dumps(body, indent=1))
        return
    if current.lack:
        print(f"atom: {current.lack}", file=sys.stderr)
    if not watch:
        console().print(status_table(current))
        for text in (*(entry.sentence for entry in bad_nodes.read(store)), *status.kept_nodes(chosen)):
            print(text)
        return
    with Live(status_table(current), console=console(), auto_refresh=False) as live:
        while not current.over:
            time.sleep(2)
            current = status.take(chosen, store, answers)
            live.update(Group(status_table(current), escape(current.lack or "")), refresh=True)


@app.command()
def logs(
    stage: Annotated[str, typer.Argument(help="name of a stage, as `atom plan` lists it")],
    run: Annotated[
        str | None, typer.Option(help="run id or its beginning; default: the latest run with that stage")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on printing until the stage ends")] = False,
    rank: Annotated[int, typer.Option(help="which of the stage's processes")] = 0,
) -> None:
    """Print the log of a stage's latest job.

    The log contains all starts of the job. If the stage failed, the cause comes first.

    Example: atom logs pretrain --follow
    """
    from pipeline.graph import run as runs
    from pipeline.launch import slurm_client
    from pipeline.operations import run_actions
    from pipeline.tracking import status

    store = open_store()
    answers = slurm_client.Answers(slurm_client.ASK_EVERY)
    candidates = [runs.find(store, run)] if run else list(reversed(runs.runs(store)))

    def read(run: Run) -> NodeStatus:
        return next(s for s in status.status(run, store, answers)[0] if s.name == stage)

    chosen, path = run_actions.find_log(store, candidates, stage, rank)
    if (present := read(chosen)).state in ("failed", "lost", "cancelled"):
        print(f"{stage} {present.state}: {present.message or present.reason or 'the cause is not known'}\n")
    with open(path) as log:
        while True:
            over = not follow or status.over([read(chosen)])
            text = log.read()
            sys.stdout.write(text)
            sys.stdout.flush()
            if over and not (follow and text):  # a stage writes its last lines after it has sealed its product
                return
            time.sleep(0.5)


@app.command()
def nodes(
    action: Annotated[str | None, typer.Argument(metavar="clear", help="let jobs use these nodes again")] = None,
    names: Annotated[list[str] | None, typer.Argument(metavar="NODE", help="which ones; default: all")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the bad nodes that jobs avoid, or clear some.

    A node is avoided for avoid_hours of the cluster profile after a start failed by its fault. The evidence is shown.

    Example: atom nodes clear n7
    """
    from pipeline.launch import bad_nodes

    store = open_store()
    if action is not None and action != "clear":
        raise AtomError(f"atom nodes {action}: there is no such action; write atom nodes, or atom nodes clear NODE")
    if action is not None:
        cleared = bad_nodes.clear(store, names or ())
        print(json.dumps({"cleared": cleared}) if as_json else f"cleared: {', '.join(cleared) or 'none was avoided'}")
        return
    entries = bad_nodes.read(store)
    if as_json:
        print(json.dumps({"bad_nodes": [asdict(entry) for entry in entries]}, indent=1))
        return
    for entry in entries:
        print(entry.sentence)
    if not entries:
        print("no node is avoided")


@app.command()
def cancel(
    run: RunArgument = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask before cancelling jobs of another user")] = False,
) -> None:
    """Stop the running stages of a run.

    Run the recipe again to resume them. Before it cancels jobs of another user, it asks.

    Example: atom cancel
    """
    from pipeline.core import process
    from pipeline.operations import run_actions

    chosen, store = find_run(run)
    # Other users may wait for these jobs, or own the run.
    waiting = run_actions.attached_runs(chosen, store)
    concerned = [f"run {chosen.id} is {chosen.owner}'s"] if chosen.owner != process.current_user() else []
    concerned += [f"run {r.id} of {r.owner} waits for its jobs" for r in waiting if r.owner != process.current_user()]
    if concerned and not yes:
        confirm("; ".join(concerned), "cancel all the same")
    if chosen.on_slurm:
        names = run_actions.cancel_jobs(chosen, store)
        print(f"run {chosen.id}: cancelled {', '.join(names) or 'nothing, Slurm holds no job of it'}")
    else:
        names = run_actions.stop_processes(chosen, store)
        print(f"run {chosen.id}: stopped {', '.join(names) or 'nothing, no stage was running'}")
    for waiter in waiting:
        print(f"run {waiter.id} of {waiter.owner} waited for these jobs; `atom retry {waiter.id}` goes on")


@app.command()
def retry(
    run: RunArgument = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="only this stage and what depends on it")
    ] = None,
) -> None:
    """Resume a run that failed, was stopped, or lost jobs.

    This runs or submits its recipe again, but only if the recipe has not changed since.

    Example: atom retry --from pretrain
    """
    from pipeline.cli import execution
    from pipeline.graph import run as runs
    from pipeline.launch import cluster_profile

    chosen, store = find_run(run)
    cluster, reference = chosen.body["profile"], chosen.body["recipe_path"]
    composed = graph_of(reference)
    runs.require_same_recipe(chosen, composed.recipe)
    selected = [node["name"] for node in chosen.body["nodes"]]
    if start is not None:
        composed.select(None, start)  # raises for an unknown stage
        selected = [name for name in selected if start in composed.upstream({name})]
    if chosen.on_slurm:
        from pipeline.launch import slurm

        submission = slurm.submit(composed, store, selected, cluster_profile.load(cluster), cluster)
        execution.print_submission(submission)
    else:
        execution.run(composed, store, selected, cluster, cluster_profile.load(cluster), reference)


@app.command()
def sync(run: RunArgument = None) -> None:
    """Send a run to MLflow again.

    After an outage of the tracking server, the missing curves are read from the run's files. A run whose stages do not
    go on by themselves is ended there: as finished, failed or killed.

    Example: atom sync
    """
    from pipeline.core.lease import Lease, holder
    from pipeline.tracking import mlflow_sync, status

    chosen, store = find_run(run)
    nodes, lack = status.status(chosen, store)
    driver = holder(chosen.folder / "driver")
    is_over = lack is None and status.over(nodes) and not (driver is not None and driver.alive)
    # One process of a run at a time sends, or rows would arrive twice.
    turn = Lease.take(chosen.folder / "mlflow")
    if turn is None:
        raise AtomError(f"a job of run {chosen.id} is sending it at the moment; its metrics arrive by themselves")
    forwarder = mlflow_sync.Forwarder(chosen, store)
    try:
        forwarder.sync(over=is_over or mlflow_sync.outcome_of(nodes) == "FINISHED")
    except AtomError:
        raise
    except Exception as error:  # MLflow raises errors of many libraries
        problem = mlflow_sync.redacted(str(error).splitlines()[0])
        raise AtomError(f"MLflow at {mlflow_sync.shown_uri(store)} did not answer: {problem}") from error
    finally:
        turn.release()
    print(f"run {chosen.id} is in MLflow at {mlflow_sync.shown_uri(store)}")
