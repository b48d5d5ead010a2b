"""Shared parts of the commands: options, the home folder, the terminal. Heavy imports are inside the functions."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.core.store import Store
    from pipeline.graph.dag import Graph
    from pipeline.graph.run import Run

# The panels of `atom --help`: the `rich_help_panel` of a command.
PLAN_AND_RUN, RELEASE, CHECK, DATA = "Plan and run", "Release", "Check", "Data"
RecipeArgument = Annotated[str, typer.Argument(help="name of a packaged recipe, or path to its YAML file")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document instead of text")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="print the result alone, without progress")]
RunArgument = Annotated[str | None, typer.Argument(help="run id or its beginning; default: the latest run")]
UntilOption = Annotated[str | None, typer.Option(help="stop after this stage and what it needs")]
OnlyOption = Annotated[str | None, typer.Option(help="just this stage; what it needs must be sealed already")]
ProfileOption = Annotated[str, typer.Option("--cluster", help="name of a cluster profile, or path to its YAML file")]


def open_store() -> Store:
    from pipeline.core import process
    from pipeline.core.store import Store, home_folder

    home = home_folder()
    process.share_home(home)
    return Store(home)


def find_run(reference: str | None) -> tuple[Run, Store]:
    """Returns the run whose id begins with `reference`, or the latest, and the home. Warns of the home's problems."""
    from pipeline.graph import run as runs

    store = open_store()
    warn_of_home(store)
    return runs.find(store, reference), store


def console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def confirm(statement: str, action: str) -> None:
    """Asks a person at a terminal whether to go on.

    Raises:
        AtomError: Nobody can be asked, or the answer is no.
    """
    from pipeline.core.errors import AtomError

    if not sys.stdin.isatty():
        raise AtomError(f"{statement}; add --yes to {action}")
    if not typer.confirm(f"{statement}. {action[0].upper()}{action[1:]}?"):
        raise AtomError(f"{statement}; nothing was done")


def graph_of(recipe: str, without_data: bool = False) -> Graph:
    """Returns the graph of a recipe, by its name or the path of its file. See `dag.compose` for `without_data`."""
    from pipeline.graph import dag
    from pipeline.graph import recipe as recipes

    return dag.compose(recipes.load(recipe), open_store(), without_data)


def warn_of_home(store: Store) -> None:
    """Warns on standard error of a full disk, which causes further errors."""
    from pipeline.core import os_errors

    if text := os_errors.full_disk(store.home):
        print(f"atom: {text}", file=sys.stderr)
