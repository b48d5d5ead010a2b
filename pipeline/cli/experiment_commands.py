"""The commands that begin, check and compare recipes. They run nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.operations.command_options import (
    JsonOption,
    ProfileOption,
    RecipeArgument,
    console,
    graph_of,
    open_store,
    warn_of_home,
)

app = typer.Typer()


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="name of the release, and of its file")],
    source: Annotated[str, typer.Option("--from", metavar="RECIPE", help="packaged recipe to copy")] = "atom-tiny",
    start_from: Annotated[
        str | None,
        typer.Option("--start-from", metavar="MODEL", help="published model: RELEASE/model, or REPO[@REVISION]"),
    ] = None,
) -> None:
    """Write a recipe of your own, NAME.yaml.

    It is a copy of a packaged recipe, with its comments, in the current folder. No file is overwritten.

    With --start-from, a recipe such as atom-smoke-adapter begins with that model: a model's folder of a release, or a
    repository of the Hub. Its digest and its license are written into the recipe.

    Example: atom init my-model --from atom-smoke
    """
    from pipeline.operations import recipe_template

    path = recipe_template.write(name, source, Path(), start_from)
    print(f"{path} is a copy of {source}; change it, and check it: atom validate {path}")


@app.command()
def validate(
    recipe: RecipeArgument,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="cluster profile that the recipe must fit as well")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List all mistakes of a recipe.

    Each mistake of the recipe, of its data recipe and of the cluster profile is one sentence with file, line and field.
    The contradictions between sections, the graph, and the limits of the Hub follow once the files are in order; with
    --cluster, also whether each stage fits. Data need not be here. Exit code 2 says that there is a mistake.

    Example: atom validate atom-tiny --cluster h100-pyxis
    """
    from pipeline.operations import recipe_check

    findings = recipe_check.check(recipe, open_store(), cluster)
    if as_json:
        body = {"problems": [problem.json() for problem in findings.problems], "notes": list(findings.notes)}
        print(json.dumps(body, indent=1))
    else:
        count = len(findings.problems)
        summary = f"{count} mistake{'s' if count > 1 else ''}" if count else "no mistake"
        print(*recipe_check.lines(findings), f"{recipe}: {summary}", sep="\n")
    if findings.problems:
        raise typer.Exit(2)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="RECIPE", help="name of a packaged recipe, or path to its YAML file")],
    second: Annotated[str, typer.Argument(metavar="OTHER", help="the recipe that is compared with it")],
    cluster: ProfileOption = "local",
    as_json: JsonOption = False,
) -> None:
    """Show what changes from one recipe to another.

    The settings that differ, with those of the data recipes; the stages of OTHER whose keys differ, why, and whether
    they are sealed in $ATOM_HOME; and the cost of those that are not.

    Example: atom diff atom-smoke atom-smoke-dense
    """
    from pipeline.cli.experiment_tables import print_difference
    from pipeline.launch import cluster_profile
    from pipeline.operations import recipe_diff

    store, profile = open_store(), cluster_profile.load(cluster)
    warn_of_home(store)
    graphs = graph_of(first, without_data=True), graph_of(second, without_data=True)
    difference = recipe_diff.compare(*graphs, store, profile)
    if as_json:
        print(json.dumps(difference.json(), indent=1))
    else:
        print_difference(difference, first, second, console())
