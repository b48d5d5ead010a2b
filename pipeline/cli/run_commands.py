"""The commands that take a run: show its status and logs, cancel it, retry it, send its curves to MLflow again."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.errors import AtomError
from pipeline.operations.command_options import JsonOption, RunArgument, console, graph_of, open_store, warn_of_home

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.graph.run import NodeStatus
    from pipeline.tracking.budget import Hours

app = typer.Typer()


@app.command()
def status(
    run: RunArgument = None,
    watch: Annotated[bool, typer.Option("--watch", help="redraw every two seconds until the run ends")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the progress and the resource use of a run.

    The use of time, energy and money includes failed attempts.

    Example: atom status --watch
    """
    from rich.live import Live

    from pipeline.cli.tables import status_table
    from pipeline.graph import run as runs
    from pipeline.operations import status
    from pipeline.tracking import budget

    store = open_store()
    warn_of_home(store)
    this = runs.find(store, run)

    def read() -> tuple[Table, list[NodeStatus], str | None, Hours]:
        nodes, lack = status.status(this, store)
        used = budget.used(store, (stage.key for stage in nodes))
        return status_table(this.id, nodes, budget.describe(used, this.body.get("prices"))), nodes, lack, used

    table, nodes, lack, used = read()
    if as_json:
        body = {"run": this.id, "unknown": lack, "used": used, "stages": [s.json() for s in nodes]}
        print(json.dumps(body, indent=1))
        return
    if lack:
        print(f"atom: {lack}", file=sys.stderr)
    if not watch:
        console().print(table)
        return
    with Live(table, console=console(), auto_refresh=False) as live:
        while not status.over(nodes):
            time.sleep(2)
            table, nodes, *_ = read()
            live.update(table, refresh=True)


@app.command()
def logs(
    stage: Annotated[str, typer.Argument(help="stage name, for example pretrain")],
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
    from pipeline.operations import stage_logs, status

    store = open_store()
    candidates = [runs.find(store, run)] if run else list(reversed(runs.runs(store)))
    this, path = stage_logs.find_log(store, candidates, stage, rank)

    def read() -> NodeStatus:
        return next(s for s in status.status(this, store)[0] if s.name == stage)

    if (present := read()).state in ("failed", "lost", "cancelled"):
        print(f"{stage} {present.state}: {present.message or present.reason or 'the cause is not known'}\n")
    with open(path) as log:
        while True:
            over = not follow or status.over([read()])
            sys.stdout.write(log.read())
            sys.stdout.flush()
            if over:
                return
            time.sleep(0.5)


@app.command()
def cancel(run: RunArgument = None) -> None:
    """Stop the running stages of a run.

    Run the recipe again to resume them.

    Example: atom cancel
    """
    from pipeline.graph import run as runs
    from pipeline.operations import cancellation

    store = open_store()
    this = runs.find(store, run)
    if this.jobs():
        names = cancellation.cancel_jobs(this, store)
        print(f"run {this.id}: cancelled {', '.join(names) or 'nothing, Slurm holds no job of it'}")
    else:
        names = cancellation.stop_processes(this, store)
        print(f"run {this.id}: stopped {', '.join(names) or 'nothing, no stage was running'}")


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

    store = open_store()
    this = runs.find(store, run)
    cluster, reference = this.body["profile"], this.body["recipe_path"]
    composed = graph_of(reference)
    runs.require_same_recipe(this, composed.recipe)
    selected = [node["name"] for node in this.body["nodes"]]
    if start is not None:
        composed.select(None, start)  # raises for an unknown stage
        selected = [name for name in selected if start in composed.upstream({name})]
    if this.jobs():
        from pipeline.launch import slurm

        submission = slurm.submit(composed, store, selected, cluster_profile.load(cluster), cluster)
        execution.print_submission(submission)
        submission.require_undamaged()
    else:
        execution.run(composed, store, selected, cluster, cluster_profile.load(cluster), reference)


@app.command()
def sync(run: RunArgument = None) -> None:
    """Send a run to MLflow again.

    After an outage of the tracking server, the missing curves are read from the run's files.

    Example: atom sync
    """
    from pipeline.core.lease import Lease
    from pipeline.graph import run as runs
    from pipeline.tracking import mlflow_sync

    store = open_store()
    this = runs.find(store, run)
    done = all(s.state == "sealed" for s in runs.status(this, store))
    turn = Lease.take(this.folder / "mlflow")
    if turn is None:
        raise AtomError(f"a job of run {this.id} is sending it at the moment; its metrics arrive by themselves")
    forwarder = mlflow_sync.Forwarder(this, store)
    try:
        if done:
            forwarder.finish("FINISHED")
        else:
            forwarder.sync()
    except AtomError:
        raise
    except Exception as error:
        problem = mlflow_sync.redacted(str(error).splitlines()[0])
        raise AtomError(f"MLflow at {mlflow_sync.shown_uri(store)} did not answer: {problem}") from error
    finally:
        turn.release()
    print(f"run {this.id} is in MLflow at {mlflow_sync.shown_uri(store)}")
