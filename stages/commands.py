"""The command that needs no run of a recipe: `simulate-precision`."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Annotated

import typer

from pipeline.operations.command_options import JsonOption, RecipeArgument, open_store

app = typer.Typer()


@app.command("simulate-precision")
def simulate_precision(
    recipe: RecipeArgument,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp8-tensorwise, fp8-blockwise, mxfp8 or nvfp4; repeatable; default: FP8's three"),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=8, max=1_000_000, help="optimizer steps of each run; the last quarter counts")
    ] = 64,
    seeds: Annotated[
        int, typer.Option(min=2, max=1000, help="initial weights and data orders, each run in every precision")
    ] = 3,
    bound: Annotated[float, typer.Option(min=0, max=1, help="largest relative deviation of the loss")] = 0.0025,
    as_json: JsonOption = False,
) -> None:
    """Measure on any machine what FP8 and FP4 cost.

    The recipe's model, of at most 50 million parameters, is trained on Python's standard library with linear layers
    that round, and without. The runs and the report are kept below $ATOM_HOME/precision-simulations. Exit code 0: every
    precision holds the bound; 1: one fails it, or the runs are inconclusive; 2: a usage error. Ctrl-C stops cleanly;
    the same command continues after the finished runs.

    Example: atom simulate-precision atom-tiny --precision mxfp8
    """
    from pipeline.graph import recipe as recipes
    from stages.train.precision_simulation import simulate, table

    try:
        note = partial(print, file=sys.stderr)
        report, path = simulate(recipes.load(recipe), open_store().home, note, precision or (), steps, seeds, bound)
    except KeyboardInterrupt:
        print("atom: stopped; run the same command to go on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    print(json.dumps(report, indent=1, sort_keys=True) if as_json else f"{table(report)}\n{path}")
    if report["verdict"] != "holds":
        raise typer.Exit(1)
