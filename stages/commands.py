"""Commands that need no run: `simulate-precision` and `pin`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.graph.recipe import lock_of
from pipeline.operations.command_options import DATA, JsonOption, RecipeArgument, console, open_store

app = typer.Typer()


@app.command("simulate-precision")
def simulate_precision(
    recipe: RecipeArgument,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp8-tensorwise, fp8-blockwise, mxfp8, nvfp4 or mxfp4; repeatable; default: FP8's three"),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=8, max=1_000_000, help="optimizer steps of each run; the last quarter counts")
    ] = 64,
    seeds: Annotated[
        int, typer.Option(min=2, max=1000, help="initial weights and data orders, each run in every precision")
    ] = 3,
    bound: Annotated[float, typer.Option(min=0, max=1, help="largest relative deviation of the loss")] = 0.0025,
    layers: Annotated[int | None, typer.Option(max=1000, help="layers of the proxy; default: 2")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder of the result; default: one under $ATOM_HOME/precision-simulations"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure on any machine what FP8 and FP4 cost.

    A small proxy of the recipe's model is trained on Python's standard library with linear layers that round, and
    without. Exit code 0: every precision holds the bound; 1: one fails it, or the runs are inconclusive; 2: a usage
    error. Ctrl-C stops cleanly; the same command continues after the finished runs.

    Example: atom simulate-precision atom-tiny --precision mxfp8
    """
    from rich.console import Console

    from pipeline.core.progress import Display
    from pipeline.graph import recipe as recipes
    from stages.train.precision_simulation.simulation import simulate

    screen = Console(stderr=True) if as_json else console()
    try:
        display, home = Display(screen), open_store().home
        report, folder = simulate(
            recipes.load(recipe), home, display, precision or (), steps, seeds, bound, layers, out
        )
    except KeyboardInterrupt:
        print("atom: stopped; run the same command to go on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    print(json.dumps(report, indent=1, sort_keys=True) if as_json else _report_text(report, folder))
    if report["verdict"] != "holds":
        raise typer.Exit(1)


@app.command(rich_help_panel=DATA)
def pin(
    recipe: Annotated[
        str, typer.Argument(help="name of a packaged recipe or data recipe, or path to the YAML file of either")
    ],
    as_json: JsonOption = False,
) -> None:
    """Pin a data recipe's sources on the Hub.

    The Hub at HF_ENDPOINT is asked for the commit of each source's revision, and for the size and digest of each file
    that matches its pattern. They are written to NAME.lock.yaml beside the data recipe NAME.yaml. No file is pulled.
    HF_TOKEN, or the token of `hf auth login`, is used for private and gated datasets.

    Example: atom pin open
    """
    from stages.data import pinning

    pins = []
    path = pinning.data_recipe(recipe)
    for row in pinning.pin(path):
        pins.append(row.json())
        if not as_json:
            print(row)
    lock = lock_of(path)
    print(json.dumps({"lock": str(lock), "sources": pins}, indent=1) if as_json else f"written to {lock}")


def _report_text(report: dict[str, Any], folder: Path) -> str:
    """Returns the verdicts of a precision simulation, one line each, and the place of its table."""
    lines = [f"{row['precision']}: {row['verdict']}, {row['reason']}" for row in report["precisions"]]
    return "\n".join([*lines, f"{report['recipe']}: {report['verdict']}; the table is in {folder}"])
