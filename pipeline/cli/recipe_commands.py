"""The commands that take a recipe: begin, check and compare one, show its plan, run it here, or submit it to Slurm."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.operations.command_options import (
    JsonOption,
    OnlyOption,
    ProfileOption,
    RecipeArgument,
    UntilOption,
    console,
    graph_of,
    open_store,
    warn_of_home,
)

if TYPE_CHECKING:
    from pipeline.graph.dag import Graph
    from pipeline.launch.cluster_profile import Profile

app = typer.Typer()
# Of what `atom plan` prints, as its tables need it.
WIDTH = 160


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="name of the release, and of its file")],
    source: Annotated[str, typer.Option("--from", metavar="RECIPE", help="packaged recipe to copy")] = "atom-tiny",
    start_from: Annotated[
        str | None,
        typer.Option("--start-from", metavar="MODEL", help="published model: RELEASE/model, or REPO[@REVISION]"),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="GPUs of the largest phase; the others in proportion")
    ] = None,
    miniature: Annotated[
        bool, typer.Option("--miniature", help="write it at the size of one machine, with its data recipe")
    ] = False,
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", metavar="FILE", help="cluster profile to write, from what Slurm says here"),
    ] = None,
    like: Annotated[
        str, typer.Option("--like", metavar="PROFILE", help="packaged profile that FILE begins with")
    ] = "h100-pyxis",
    image: Annotated[
        str | None, typer.Option("--image", help="image of the container, for FILE; default: that of the profile")
    ] = None,
) -> None:
    """Write a recipe of your own, NAME.yaml.

    It is a copy of a packaged recipe, with its comments, in the current folder. No file is overwritten.

    With --start-from, a recipe such as atom-smoke-adapter begins with that model: a model's folder of a release, or a
    repository of the Hub. Its digest and its license are written into the recipe.

    With --miniature, the recipe and NAME-data.yaml have the sections, stages, gates and options of one for clusters,
    and widths, tokens, steps, ranks and sets that are small, to try its phases on one machine without a GPU. The
    operators' page says how far that has been done.

    With --cluster, on a host that reaches Slurm, a cluster profile is written too: a packaged one with the partitions,
    nodes, cores, memory, time limits and account that Slurm names.

    Example: atom init my-model --from atom-smoke
    """
    from pipeline.core.errors import AtomError
    from pipeline.operations import recipe_check, site_profile

    if miniature and (start_from or ranks):
        raise AtomError("--miniature sets the ranks and begins with random weights; leave --start-from and --ranks out")
    if miniature:
        path = recipe_check.write_miniature(name, source, Path())
    else:
        path = recipe_check.write_recipe(name, source, Path(), start_from, ranks)
    option = ""
    if cluster is not None:
        try:
            site_profile.write_profile(cluster, like, image, recipe_check.sampling_ranks(path, open_store()))
        except AtomError:
            path.unlink()
            raise
        print(f"{cluster} is {like} with what Slurm says of this cluster; change what Slurm cannot know")
        option = f" --cluster {cluster}"
    kind = "miniature" if miniature else "copy"
    print(f"{path} is a {kind} of {source}; change it, and check it: atom validate {path}{option}")


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
        body = {"problems": [asdict(problem) for problem in findings.problems], "notes": list(findings.notes)}
        print(json.dumps(body, indent=1))
    else:
        count = len(findings.problems)
        summary = f"{count} mistake{'s' if count > 1 else ''}" if count else "no mistake"
        notes = (f"note: {text}" for text in findings.notes)
        print(*findings.problems, *notes, f"{recipe}: {summary}", sep="\n")
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
    from pipeline.cli.tables import print_difference
    from pipeline.launch import cluster_profile
    from pipeline.operations import comparison

    store, profile = open_store(), cluster_profile.load(cluster)
    warn_of_home(store)
    graphs = graph_of(first, without_data=True), graph_of(second, without_data=True)
    difference = comparison.compare(*graphs, store, profile)
    if as_json:
        print(json.dumps(difference.json(), indent=1))
    else:
        print_difference(difference, first, second, console())


@app.command()
def plan(
    recipe: RecipeArgument,
    until: UntilOption = None,
    only: OnlyOption = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="cluster profile to estimate hours, cost and energy with")
    ] = None,
    simulate: Annotated[
        int | None,
        typer.Option("--simulate", metavar="RANK", help="simulate this rank of each training phase (minutes, 1 GB)"),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="search the fastest layouts of a phase that fit; needs --cluster")
    ] = False,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="STAGE", help="phase of --search; pretrain if none is named")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the stages, keys and costs of a recipe.

    Nothing is run. The tables show the key, state (sealed, stale, to run) and estimated cost of every stage, and the
    resources that every training phase needs for each rank. The command also works without the data.

    With --simulate, the engine of that rank is built at full size and walks through training steps on this machine,
    without the memory that they need: its parameters, peak memory and collectives are shown beside the estimate.

    With --search, only layouts of one phase are shown: the recipe's own, and the fastest that fit the cluster, with the
    memory of a GPU, tokens a second of a GPU, hours and money. It varies the ranks by kind, pipeline chunks,
    recomputation, the dispatcher, and the rows of a micro-batch, as far as the engine supports them.

    Another table lists the gates on the effect of training, with the phase after which each is judged: by a stage that
    stops the run, if the recipe sets evaluation.stop_at_gates, else by `atom build`.

    A further table compares the tokens of each source with those that the phases ask for. Supply is what `atom pin` has
    probed, or what the data recipe states, or computed for documents that are drawn, or unknown.

    Exit code 2 says that a source would be read more often than the recipe takes, or that the Hub would not take a file
    or a folder of the release.

    Example: atom plan atom-tiny --cluster h100-pyxis
    """
    from pipeline.cli.tables import cost_table, gates_table, phases_table, plan_table, simulation_table, supply_table
    from pipeline.core.errors import AtomError
    from pipeline.graph import budget, dag, plan, supply
    from pipeline.launch import cluster_profile
    from pipeline.operations import fit
    from pipeline.operations.fit import estimate_costs

    composed, store = graph_of(recipe, without_data=True), open_store()
    warn_of_home(store)
    profile = None if cluster is None else cluster_profile.load(cluster)
    if search and profile is not None:
        _search(composed, stage or "pretrain", profile, as_json)
        return
    if search or stage is not None:
        raise AtomError("--search needs --cluster, and --stage names the phase of --search; add what is missing")
    other_python = profile is not None and profile.other_python
    rows = plan.plan(composed, dag.states(composed, store), composed.select(until, only), other_python)
    costs, beyond, fitting, identity = None, [], [], composed.recipe.config
    if profile is not None:
        costs = estimate_costs(rows, profile, plan.is_small(composed))
        fitting = fit.fits(rows, {use.name: use for use in costs.uses}, profile)
        spent = budget.used(store, (node.key for node in composed.nodes.values()))
        beyond = budget.foreseen(budget.limits_of(identity), spent, costs.hours)
    simulations = {} if simulate is None else plan.simulations(composed, rows, simulate)
    supplies = dag.supply(composed) if any(row.trains for row in rows) else ()
    gates = dag.gates(composed, {row.state.name for row in rows})
    if as_json:
        body: dict[str, Any] = {
            "recipe": identity.name,
            "version": identity.version,
            "absent": list(composed.absent),
            "stages": [r.json() for r in rows],
        }
        for entry, stage_fit in zip(body["stages"], fitting, strict=bool(fitting)):
            entry |= {"fits": not stage_fit.reasons, "reasons": list(stage_fit.reasons)}
        if simulations:
            body["simulations"] = {name: asdict(result) for name, result in simulations.items()}
        body["supply"] = [row.json() for row in supplies]
        body["gates"] = [asdict(gate) for gate in gates]
        body["unpublishable"] = fit.unpublishable(rows)
        print(json.dumps(body if costs is None else {**body, "cluster": {**costs.json(), "beyond": beyond}}, indent=1))
        # Errors come last, so that the plan is printed all the same.
        fit.require_publishable(rows)
        supply.require_served(composed.recipe.title, supplies)
        return
    for text in composed.absent:
        print(text)
    console().print(plan_table(rows))
    for further in filter(None, (phases_table(rows), gates_table(gates))):
        console().print()
        console().print(further)
    if supplies:
        console().print()
        console().print(supply_table(supplies))
        for text in (*supply.origins(supplies), *supply.curation_costs(supplies)):
            print(_wrapped(text))
    if costs:
        console().print()
        console().print(cost_table(costs))
        for text in (*costs.assumed, *beyond):
            print(text)
        for stage_fit in fitting:
            if stage_fit.reasons:
                print(stage_fit.sentence)
    for name, result in simulations.items():
        console().print()
        console().print(simulation_table(name, result))
    for text in plan.remarks(rows):
        print(_wrapped(text))
    fit.require_publishable(rows)
    supply.require_served(composed.recipe.title, supplies)


def _search(graph: Graph, stage: str, profile: Profile, as_json: bool) -> None:
    from pipeline.cli.tables import search_table
    from pipeline.operations import layout_search

    result = layout_search.search(graph, stage, profile)
    if as_json:
        print(json.dumps(result.json(), indent=1))
        return
    console().print(search_table(result))
    if result.best:
        settings = (f"{name}: {json.dumps(value)}" for name, value in result.best.settings.items())
        print(f"settings of {stage} in the fastest that runs in the image:", *settings, sep="\n  ")
    else:
        print("none that runs in the image fits; the plan without --search says what the recipe's own layout exceeds")
    for text in result.assumed:
        print(_wrapped(text))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


@app.command()
def run(
    recipe: RecipeArgument, until: UntilOption = None, only: OnlyOption = None, cluster: ProfileOption = "local"
) -> None:
    """Run a recipe on this machine.

    Sealed stages are not run again. Ctrl-C stops cleanly; the same command resumes.

    Example: atom run atom-tiny --until pretrain
    """
    from pipeline.cli import execution
    from pipeline.launch import cluster_profile

    composed, store, settings = graph_of(recipe), open_store(), cluster_profile.load(cluster)
    execution.run(composed, store, composed.select(until, only), cluster, settings, recipe)


@app.command()
def submit(
    recipe: RecipeArgument,
    cluster: Annotated[str, typer.Option("--cluster", help="name of a cluster profile, or path to its YAML file")],
    until: UntilOption = None,
    only: OnlyOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write the jobs' scripts and let Slurm check each; submit nothing")
    ] = False,
    ignore_fit: Annotated[
        bool, typer.Option("--ignore-fit", help="submit even if a stage needs more than the profile states")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a recipe to a Slurm cluster, and return.

    Each stage that is not sealed gets a job with dependencies. A stage that another run has submitted gets no second
    job; this run waits for that one. The jobs run from a snapshot of the present code, and restart after time limits,
    preemption and dead nodes.

    A stage that needs more memory, time or space than the cluster profile states is refused, as `atom plan --cluster`
    shows it. So is training on a source that would be read too often, or whose supply `atom pin` has not probed.

    Example: atom submit atom-tiny --cluster cluster.yaml
    """
    from pipeline.cli import execution
    from pipeline.graph import dag, supply
    from pipeline.launch import cluster_profile, slurm
    from pipeline.operations import fit

    composed, store, settings = graph_of(recipe, without_data=dry_run), open_store(), cluster_profile.load(cluster)
    selected = composed.select(until, only)
    for text in filter(None, (*composed.absent, slurm.missing_image(settings))):
        print(f"note: {text}", file=sys.stderr)
    if not ignore_fit:
        fit.require(composed, store, selected, settings)
    # What is trained already has been read, and its order has the real epochs.
    nodes = [composed.nodes[name] for name in selected]
    if any(node.stage.trains and not store.sealed(node.key) for node in nodes):
        supplies = dag.supply(composed)
        supply.require_served(composed.recipe.title, supplies)
        if not dry_run:
            supply.require_probed(composed.recipe.title, supplies)
    if dry_run:
        checks = slurm.dry_run(composed, store, selected, settings)
        if as_json:
            print(json.dumps({"scripts": [asdict(row) for row in checks]}, indent=1))
        else:
            for row in checks:
                print(f"{row.script}: {row.answer}")
        slurm.require_taken(checks)
        return
    submission = slurm.submit(composed, store, selected, settings, cluster)
    if as_json:
        body = {
            "run": submission.run and submission.run.id,
            "submitted": submission.submitted,
            "attached": submission.attached,
            "sealed": submission.sealed,
        }
        print(json.dumps(body, indent=1))
    else:
        execution.print_submission(submission)
