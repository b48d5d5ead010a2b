"""The commands that list runs and compare them."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from pipeline.core.errors import AtomError
from pipeline.core.text import escaped
from pipeline.operations.command_options import JsonOption, console, open_store, warn_of_home

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
    from pipeline.cli.experiment_tables import run_table
    from pipeline.graph import run as runs
    from pipeline.operations import run_list

    if last < 0:
        raise AtomError(f"--last {last} is no number of runs; use 0 for all, or more")
    store = open_store()
    warn_of_home(store)
    every = [run for run in runs.runs(store) if recipe in (None, run.body["recipe"])]
    rows, lack = run_list.rows(every[-last:], store)
    if as_json:
        print(json.dumps({"runs": [row.json() for row in rows], "earlier": len(every) - len(rows), "unknown": lack},
                         indent=1))  # fmt: skip
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
    curve: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE.METRIC", help="show this metric of a stage by step; repeatable"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs by metrics, scores and cost.

    The settings in which they differ, the last value of each metric, the scores of evaluations, and the time, energy
    and money that their stages took. A run may still be running. The tables leave out stages with equal keys in all
    runs, and figures that one run alone has; --json has them.

    Example: atom compare atom-tiny-20261128-083109 atom-tiny-20261128-102030 --curve pretrain.loss
    """
    from pipeline.cli.experiment_tables import print_comparison
    from pipeline.graph import run as runs
    from pipeline.operations import run_comparison

    store = open_store()
    warn_of_home(store)
    chosen = {each.id: each for each in (runs.find(store, reference) for reference in run)}
    rows = [run_comparison.measure(each, store, curve or ()) for each in chosen.values()]
    if as_json:
        body = {"different": run_comparison.differing_settings(rows), "runs": [row.json() for row in rows]}
        print(json.dumps(body, indent=1))
    else:
        print_comparison(rows, curve or [], console())
