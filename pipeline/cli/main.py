"""The `atom` command. Heavy imports stand inside the commands, so that `atom --help` answers at once."""

from __future__ import annotations

import importlib
import json
import locale
import os
import signal
import sys
import time
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.core import os_errors
from pipeline.core.errors import AtomError
from pipeline.core.json_files import DamagedFile
from pipeline.operations.command_options import (
    JsonOption,
    OnlyOption,
    ProfileOption,
    RecipeArgument,
    RunArgument,
    UntilOption,
    console,
    graph_of,
    open_store,
)

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.core.store import Store
    from pipeline.graph.dag import Graph
    from pipeline.graph.run import NodeStatus
    from pipeline.launch.slurm import Submission

COMMANDS = ("stages.commands", "release.commands")
"""Modules with further commands."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Train an open LLM from raw text to a signed Hugging Face release that anyone can verify, trace and replay.

A RECIPE is a packaged name (atom-tiny, atom-smoke) or a path to a YAML file. Everything produced lies under one folder,
$ATOM_HOME (default: ./runs). Exit codes: 0 fine, 1 the checked thing is bad, 2 the caller's mistake.

Start with: atom plan atom-tiny, then atom run atom-tiny.""",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"atom {version('atom-release')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None: ...


@app.command()
def plan(
    recipe: RecipeArgument,
    until: UntilOption = None,
    only: OnlyOption = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="cluster profile by which hours, money and energy are estimated")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the stages and costs of a recipe; do nothing.

    Every stage is shown with its key, its state (sealed, stale, to run) and its estimated cost, every training phase
    with what it asks of its ranks. Works without the data, too.
    """
    from pipeline.cli.tables import forecast_table, phases_table, plan_table
    from pipeline.graph import dag, plan
    from pipeline.graph.cost_estimate import forecast
    from pipeline.launch import cluster_profile
    from pipeline.tracking import budget

    composed, store = graph_of(recipe, without_data=True), open_store()
    _warn_of_home(store)
    rows = plan.plan(composed, dag.states(composed, store), composed.select(until, only))
    costs, beyond, identity = None, [], composed.recipe.config
    if cluster is not None:
        costs = forecast(rows, cluster_profile.load(cluster), plan.is_small(composed))
        limits = None if identity.budget is None else identity.budget.model_dump()
        spent = budget.used(store, (node.key for node in composed.nodes.values()))
        coming = {"gpu_hours": costs.total.gpu_hours, "core_hours": costs.total.core_hours}
        beyond = budget.foreseen(limits, spent, coming)
    if as_json:
        body = {
            "recipe": identity.name,
            "version": identity.version,
            "absent": list(composed.absent),
            "stages": [r.json() for r in rows],
        }
        print(json.dumps(body if costs is None else {**body, "cluster": {**costs.json(), "beyond": beyond}}, indent=1))
    else:
        for text in composed.absent:
            print(text)
        console().print(plan_table(rows))
        if phases := phases_table(rows):
            console().print()
            console().print(phases)
        if costs:
            console().print()
            console().print(forecast_table(costs))
            for text in (*costs.assumed, *beyond):
                print(text)
        for row in rows:
            for key in row.external.values() if row.trains else ():
                print(f"{row.state.name} continues from {key.rsplit('-', 1)[0]} (key {key})")
            if row.state.damage:
                print(f"{row.state.name}: {row.state.damage}")
            if row.obstacle:
                print(f"{row.state.name} cannot be run: {row.obstacle}")
            if row.state.changed:
                print(f"{row.state.name} was sealed by other code than today's: {', '.join(row.state.changed)} changed")


@app.command()
def run(
    recipe: RecipeArgument, until: UntilOption = None, only: OnlyOption = None, cluster: ProfileOption = "local"
) -> None:
    """Run a recipe on this machine.

    What is sealed already is not run again. Ctrl-C stops cleanly; the same command goes on from there.
    """
    from pipeline.launch import cluster_profile

    composed, store, settings = graph_of(recipe), open_store(), cluster_profile.load(cluster)
    _warn_of_keys(store)
    _run(composed, store, composed.select(until, only), cluster, settings, recipe)


def _run(composed: Graph, store: Store, selected: list[str], cluster: str, settings: Any, reference: str) -> None:
    from pipeline.core.lease import Lease
    from pipeline.core.progress import Display, stages
    from pipeline.graph import run as runs
    from pipeline.launch.local import LocalLauncher, damage_of, prepare_environment, require_inputs
    from pipeline.tracking import mlflow_sync

    damage = damage_of(composed, store, selected)
    wanted, selected = selected, [name for name in selected if name not in damage]
    if all(store.sealed(composed.nodes[name].key) for name in selected):
        if damage:
            raise AtomError(next(iter(damage.values())))
        print(f"{stages(len(selected))}, all sealed already: nothing to run. Results are under {store.artifacts}.")
        return
    for name, text in damage.items():
        print(f"atom: stage {name} cannot be run: {text}", file=sys.stderr)
    require_inputs(composed, store, selected)
    prepare_environment()
    this = runs.start(composed, store, selected, cluster, prices=settings.costs())
    driver = Lease.take(this.folder / "driver")
    assert driver is not None, "the run was begun just now"
    background = mlflow_sync.Background(this, store)
    outcome = "FAILED"
    print(f"run {this.id}, logs in {this.folder}")
    try:
        with Display(console()) as display:
            LocalLauncher(composed, store, this, selected, settings, display).go()
        outcome = "FINISHED"
    except KeyboardInterrupt:
        outcome = "KILLED"
        print("atom: stopped; run the same command to go on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        problem = background.close(outcome)
        driver.release()
        if problem:
            print(
                f"MLflow at {mlflow_sync.shown_uri(store)} did not take everything ({problem}); nothing is lost: "
                f"`atom sync {this.id}` sends it later"
            )
    if damage:
        raise AtomError(f"{stages(len(selected))} of {len(wanted)} sealed; {next(iter(damage.values()))}")
    after = f"atom build {reference}" if len(selected) == len(composed.nodes) else f"atom run {reference}"
    print(f"all of {stages(len(selected))} sealed under {store.artifacts}; next: {after}")


@app.command()
def submit(
    recipe: RecipeArgument,
    cluster: Annotated[str, typer.Option("--cluster", help="packaged cluster profile, or path to a profile YAML")],
    until: UntilOption = None,
    only: OnlyOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write the jobs' scripts and have Slurm look at each; submit nothing")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Hand a recipe to a Slurm cluster, and return.

    A job for each stage that is not sealed, tied by dependencies; what another run has submitted is waited for, not
    doubled. The jobs run from a copy of today's code, and come back from time limits, preemption and dead nodes.
    """
    from pipeline.launch import cluster_profile, slurm
    from pipeline.launch.local import damage_of

    composed, store, settings = graph_of(recipe), open_store(), cluster_profile.load(cluster)
    _warn_of_keys(store)
    selected = composed.select(until, only)
    if dry_run:
        checked = slurm.dry_run(composed, store, selected, settings)
        if as_json:
            print(json.dumps({"scripts": [row.json() for row in checked]}, indent=1))
        else:
            for row in checked:
                print(f"{row.script}: {row.said}")
        if bad := [row for row in checked if not row.ok]:
            raise AtomError(f"Slurm would refuse stage {bad[0].stage}: {bad[0].said}; fix the cluster profile")
        slurm.Submission(damaged=damage_of(composed, store, selected)).require_undamaged()
        return
    submission = slurm.submit(composed, store, selected, settings, cluster)
    if as_json:
        body = {
            "run": submission.run and submission.run.id,
            "submitted": submission.submitted,
            "attached": submission.attached,
            "sealed": submission.sealed,
            "damaged": submission.damaged,
        }
        print(json.dumps({**body, "unknown": submission.lack}, indent=1))
    else:
        _print_submission(submission)
    submission.require_undamaged()


def _print_submission(submission: Submission) -> None:
    from pipeline.core.progress import stages

    if submission.lack:
        print(f"atom: {submission.lack}", file=sys.stderr)
    for name, text in submission.damaged.items():
        print(f"atom: stage {name} cannot be run: {text}", file=sys.stderr)
    if submission.run is None:
        print(f"{stages(len(submission.sealed))} sealed already: nothing to submit")
        return
    parts = [f"{stages(len(submission.submitted))} submitted"] if submission.submitted else []
    parts += [f"{len(submission.attached)} already queued in Slurm"] if submission.attached else []
    parts += [f"{', '.join(submission.released)} released"] if submission.released else []
    parts += [f"{len(submission.sealed)} sealed already"] if submission.sealed else []
    print(f"run {submission.run.id}: {', '.join(parts)}; watch it: atom status --watch")


@app.command()
def sync(run: RunArgument = None) -> None:
    """Send a run to MLflow again.

    For after an outage of the tracking server: what it missed is read from the run's files.
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


@app.command()
def status(
    run: RunArgument = None,
    watch: Annotated[bool, typer.Option("--watch", help="redraw every two seconds until the run ends")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how far a run is, and what it has used so far, failed attempts counted."""
    from rich.live import Live

    from pipeline.cli.tables import status_table
    from pipeline.graph import run as runs
    from pipeline.operations import status
    from pipeline.tracking import budget

    store = open_store()
    _warn_of_home(store)
    this = runs.find(store, run)

    def now() -> tuple[Table, list[NodeStatus], str | None, dict[str, float]]:
        nodes, lack = status.status(this, store)
        used = budget.used(store, (stage.key for stage in nodes))
        return status_table(this.id, nodes, budget.told(used, this.body.get("prices"))), nodes, lack, used

    table, nodes, lack, used = now()
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
            table, nodes, *_ = now()
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
    """Print the log of a stage's latest job, all its starts; on failure what went wrong comes first."""
    from pipeline.graph import run as runs
    from pipeline.operations import status

    store = open_store()
    candidates = [runs.find(store, run)] if run else list(reversed(runs.runs(store)))
    for this in candidates:
        job_logs = sorted((this.folder / stage / "submitit").glob("*_0_log.out"), key=lambda p: p.stat().st_mtime)
        if job_logs:
            break
    else:
        names = sorted({n["name"] for r in candidates for n in r.body["nodes"]})
        known = f"; stages: {', '.join(names)}" if names and stage not in names else ""
        raise AtomError(f"there is no log of stage {stage} under {store.logs}{known or '; it never ran there'}")
    path = job_logs[-1].with_name(job_logs[-1].name.replace("_0_log.out", f"_{rank}_log.out"))
    if not path.exists():
        number = len(list(path.parent.glob(job_logs[-1].name.replace("_0_log.out", "_*_log.out"))))
        what = "one rank, 0" if number == 1 else f"ranks 0 to {number - 1}"
        raise AtomError(f"stage {stage} has no rank {rank} in run {this.id}; its latest attempt ran as {what}")

    def now() -> NodeStatus:
        return next(s for s in status.status(this, store)[0] if s.name == stage)

    if (present := now()).state in ("failed", "lost", "cancelled"):
        print(f"{stage} {present.state}: {present.message or present.reason or 'no word of why'}\n")
    with open(path) as log:
        while True:
            over = not follow or status.over([now()])
            sys.stdout.write(log.read())
            sys.stdout.flush()
            if over:
                return
            time.sleep(0.5)


@app.command()
def cancel(run: RunArgument = None) -> None:
    """Stop the running stages of a run.

    Run the recipe again to go on from where they were.
    """
    from pipeline.core.lease import holder
    from pipeline.graph import run as runs

    store = open_store()
    this = runs.find(store, run)
    if this.jobs():
        from pipeline.operations import status

        gone = status.cancel(this, store)
        print(f"run {this.id}: cancelled {', '.join(gone) or 'nothing, Slurm holds no job of it'}")
        return
    running = [s for s in runs.status(this, store) if s.state == "running"]
    for stage in running:
        _terminate(store, stage)
    for stage in running:
        deadline = time.monotonic() + 30
        while (present := holder(store.work(stage.key))) and present.alive and time.monotonic() < deadline:
            time.sleep(0.2)
    print(f"run {this.id}: stopped {', '.join(s.name for s in running) or 'nothing, no stage was running'}")


def _terminate(store: Store, stage: NodeStatus) -> None:
    import socket

    from pipeline.core.lease import holder

    present = holder(store.work(stage.key))
    if present is None or not present.alive:
        return
    if present.host != socket.gethostname():
        raise AtomError(f"stage {stage.name} runs on {present.host}; run `atom cancel` there")
    os.kill(present.pid, signal.SIGTERM)


@app.command()
def retry(
    run: RunArgument = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="only this stage and what depends on it")
    ] = None,
) -> None:
    """Go on with a run that failed, was stopped, or lost jobs.

    Like running or submitting its recipe again, but refused if the recipe has changed since.
    """
    from pipeline.graph import run as runs
    from pipeline.launch import cluster_profile

    store = open_store()
    this = runs.find(store, run)
    composed = graph_of(this.body["recipe_path"])
    runs.require_same_recipe(this, composed.recipe)
    selected = [n["name"] for n in this.body["nodes"]]
    if start is not None:
        composed.select(None, start)  # raises for a stage that is none
        selected = [name for name in selected if start in composed.upstream({name})]
    if this.jobs():
        from pipeline.launch import slurm

        submission = slurm.submit(
            composed, store, selected, cluster_profile.load(this.body["profile"]), this.body["profile"]
        )
        _print_submission(submission)
        submission.require_undamaged()
        return
    cluster, reference = this.body["profile"], this.body["recipe_path"]
    _run(composed, store, selected, cluster, cluster_profile.load(cluster), reference)


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="move what is listed to the trash")] = False,
    include: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="this artifact and its work, too, whatever references it")
    ] = None,
    ignore_run: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="what only this run references is not needed any more")
    ] = None,
    restore: Annotated[list[str] | None, typer.Option(metavar="KEY|PATH", help="move this back from the trash")] = None,
    empty_trash: Annotated[bool, typer.Option("--empty-trash", help="delete all that lies in the trash")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what under $ATOM_HOME nothing needs any more, and how much it is.

    Never what any run references, what a release was built from, or what a running job needs; what training made, and
    its checkpoints, only if --include names it. What goes lies in $ATOM_HOME/trash for 14 days; the next --delete after
    that deletes it.
    """
    from pipeline.core.progress import human
    from pipeline.operations import garbage_collection as collector
    from pipeline.operations import trash

    store = open_store()
    if ((restore or empty_trash) and (delete or include or ignore_run)) or (restore and empty_trash):
        raise AtomError("--restore and --empty-trash stand alone; run them one after the other")
    if restore:
        back = [path for name in restore for path in trash.restore(store, name)]
        print(json.dumps({"restored": [str(p) for p in back]}) if as_json else "\n".join(map(str, back)))
        return
    if empty_trash:
        freed = trash.empty(store, everything=True)
        place = store.home / "trash"
        rest = f"what is left in {place} is not of gc" if place.is_dir() and os.listdir(place) else "the trash is empty"
        print(json.dumps({"freed": freed}) if as_json else f"{human(freed)}B freed; {rest}")
        return
    rows, notes = collector.loose(store, include or (), ignore_run or ())
    freed = 0
    if delete:
        rows = collector.move(store, include or (), ignore_run or ())
        freed = trash.empty(store)
    lying = trash.entries(store)
    if as_json:
        body = {"loose": [row.json() for row in rows], "kept": notes, "deleted": delete, "freed": freed}
        print(json.dumps({**body, "trash": [entry.json() for entry in lying]}, indent=1))
        return
    for row in rows:
        print(f"{human(row.bytes):>8}B  {row.path}  ({row.why})")
    for text in notes:
        print(text)
    total = human(sum(row.bytes for row in rows))
    print(f"{total}B {'moved to the trash' if delete else 'can go: atom gc --delete moves it to the trash'}")
    if freed:
        print(f"{human(freed)}B freed of what had lain there for more than {trash.GRACE_DAYS} days")
    if lying:
        size = human(sum(trash.freed(entry.path for entry in lying).values()))
        print(f"{size}B in {store.home / 'trash'}: atom gc --restore KEY moves it back, --empty-trash deletes it")


def _warn_of_home(store: Store) -> None:
    if text := store.misplaced():
        print(f"atom: {text}", file=sys.stderr)
    _warn_of_keys(store)


def _warn_of_keys(store: Store) -> None:
    if text := store.earlier_keys():
        print(f"atom: {text}", file=sys.stderr)


for module in COMMANDS:
    app.add_typer(importlib.import_module(module).app)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Warnings of ours are for whoever typed the command; others are as Python writes them."""
    if issubclass(category, DamagedFile):
        print(f"atom: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def main() -> None:
    """Entry point: our errors become one sentence and an exit code; bugs keep their traceback."""
    if locale.getpreferredencoding(False).lower().replace("-", "") != "utf8":
        # Every text file of ours is UTF-8, whatever the terminal's language: start again in Python's UTF-8 mode.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", "-m", "pipeline.cli", *sys.argv[1:]])
    warnings.showwarning = _show_warning
    try:
        app()
    except AtomError as error:
        print(f"atom: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        values = (word.partition("=")[2] if word.startswith("--") else word for word in sys.argv[1:])
        fault = os_errors.find(error, open_store().home, filter(None, values))
        if fault is None or not fault.text:
            raise
        print(f"atom: {fault.text}", file=sys.stderr)
        sys.exit(2)
