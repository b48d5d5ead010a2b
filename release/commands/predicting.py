"""The commands that predict runs, and the one that shows the whole pipeline.

`predict` seals what it says of a run, `ladder` fits a law and predicts by it, `mix` fits one to small runs and proposes
a mix of sources, and `demo` makes a tiny release.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.operations.command_options import (
    JsonOption,
    ProfileOption,
    QuietOption,
    RecipeArgument,
    graph_of,
    open_store,
)

app = typer.Typer()


@app.command()
def predict(
    recipe: RecipeArgument,
    ladder: Annotated[
        list[str], typer.Option("--from", metavar="RECIPE", help="a smaller recipe whose run is sealed; at least three")
    ],
    as_json: JsonOption = False,
) -> None:
    """Seal what smaller runs predict, before training.

    A law is fitted to the held-out loss, bits per byte and accuracy of the smaller runs against their training FLOPs.
    What it says of this recipe, with bands of 90 %, is sealed once, before pre-training begins; the release carries it,
    and the model's card compares it with the result.

    Example: atom predict atom-mini --from mini-1 --from mini-2 --from mini-3
    """
    from release.facts.forecast import NAMES
    from release.prediction import sealing

    graphs = [graph_of(name) for name in ladder]
    artifact, prediction = sealing.seal(graph_of(recipe), graphs, open_store())
    if as_json:
        print(json.dumps({"key": artifact.key, "digest": artifact.digest, **prediction.to_json()}, indent=1))
        return
    print(
        f"{prediction.target.recipe}: {prediction.target.flops:.3g} training FLOPs, from {len(prediction.points)} runs"
    )
    for row in prediction.forecasts:
        print(f"  {NAMES[row.figure]}: {row.value:.4f} ({row.low:.4f} to {row.high:.4f})")
    print(f"sealed as {artifact.key}, digest {artifact.digest}; next: atom run {recipe}")


@app.command()
def ladder(
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE...", help="recipes whose sealed runs are points")
    ] = None,
    points: Annotated[
        list[Path] | None, typer.Option("--points", metavar="FILE", help="CSV or JSON file of points; repeatable")
    ] = None,
    following: Annotated[
        list[str] | None,
        typer.Option(
            "--next",
            metavar="RUN",
            help="predict this run: a recipe, or its figures with commas between them, such as 7e9,1.4e11; repeatable",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="write ladder.json and ladder.png there")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a scaling law to runs, and predict the next one.

    Points are sealed runs of recipes, and files of points that others measured: columns parameters, tokens and
    loss. The law has bands of 90 %, and predicts the next run before it is run. An answer beyond ten times the points
    is marked. Nothing is run.


    Example: atom ladder --points runs.csv --next 7e9,1.4e11 --out ladder
    """
    from pipeline.core.errors import AtomError
    from release.prediction import ladder as ladder_report

    if not recipes and not points:
        raise AtomError("no points: name recipes whose runs are sealed, or give --points FILE")

    rows = ladder_report.read_runs([graph_of(name) for name in recipes], open_store()) if recipes else []
    for path in points or ():
        rows += ladder_report.read_file(path)
    runs = [(name, _figures(name)) for name in following or ()]
    result = ladder_report.make(rows, runs)

    if out is not None:
        from release.cards import plots

        ladder_report.write(result.to_json(), plots.law(*ladder_report.drawing(result)), out, "ladder")
    if as_json:
        print(json.dumps(result.to_json(), indent=1, sort_keys=True, allow_nan=False))
        return
    print(*ladder_report.sentences(result), sep="\n")
    if out is not None:
        print(f"written: {out / 'ladder.json'}, {out / 'ladder.png'}")


def _figures(run: str) -> dict[str, float]:
    """Returns the columns of the law for `--next`, from numbers with commas between them or the size of a recipe."""
    from pipeline.core.errors import AtomError
    from pipeline.core.text import escaped
    from release.prediction import ladder as ladder_report
    from stages.evaluation.scaling_laws import COLUMNS

    try:
        values = [float(part) for part in run.split(",")]
    except ValueError:
        size = ladder_report.size_of(graph_of(run, without_data=True))
        return {name: size[name] for name in COLUMNS}
    if len(values) != len(COLUMNS) or not all(0 < value < float("inf") for value in values):
        raise AtomError(
            f"--next {escaped(run, 80)} must be {len(COLUMNS)} numbers above 0 ({', '.join(COLUMNS)}), or a recipe"
        )
    return dict(zip(COLUMNS, values, strict=True))


@app.command()
def mix(
    recipe: RecipeArgument,
    target: Annotated[str, typer.Option("--for", metavar="RECIPE", help="the run that the mix is for")],
    runs: Annotated[int, typer.Option(max=10_000, help="proxies: runs of the small recipe with other weights")] = 24,
    jobs: Annotated[int, typer.Option(min=1, max=1000, help="proxies at a time on this machine")] = 2,
    weights: Annotated[str, typer.Option(help="domains that count, as 'a: 2, b: 1'; default: all mixed, equally")] = "",
    cluster: ProfileOption = "local",
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="write mix.json and mix.png there")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list proxies with their minutes; run nothing")] = False,
    as_json: JsonOption = False,
) -> None:
    """Propose a mix of sources, from small runs.

    The small recipe is run with drawn weights in pretrain.mix, up to evaluate-base. What is sealed is not run again,
    and Ctrl-C stops cleanly. A law is fitted to the bits per byte of each domain, and the mix with the least mean is
    proposed for the run of --for, whose phases together read no source more often than its supply.max_epochs, or
    supply.acknowledged_epochs of that source. On a Slurm cluster the proxies are submitted; run the command again
    once they are sealed.

    Example: atom mix small --for large --runs 24 --out mix
    """
    from pipeline.graph import dag, plan
    from pipeline.launch import cluster_profile, slurm
    from pipeline.operations import fit
    from release.cards import plots
    from release.prediction import ladder, mixtures, sealing

    store, profile, factors = open_store(), cluster_profile.load(cluster), mixtures.factors_of(weights)
    small, large = graph_of(recipe, without_data=dry_run), graph_of(target, without_data=True)
    sources, end = list(mixtures.mix_of(small)), sealing.EVALUATION
    mixtures.target_of(large, sources, store)  # raises for too small a supply, before anything is run
    proxies = mixtures.proxies_of(small, runs, store, without_data=dry_run)
    if dry_run:
        counted, rows = set[str](), []
        for proxy in proxies:
            stages = plan.plan(proxy, dag.states(proxy, store), proxy.select(end, None))
            # Stages that proxies share are those of the first one.
            own = [row for row in stages if row.state.key not in counted]
            counted.update(row.state.key for row in own)
            minutes = 60 * fit.estimate_costs(own, profile, plan.is_small(proxy)).total.hours
            rows.append({"name": proxy.recipe.config.name, "minutes": minutes, "mix": mixtures.mix_of(proxy)})
        lines = [f"{row['name']}: {row['minutes']:.1f} minutes, {row['mix']}" for row in rows]
        print(json.dumps(rows, indent=1) if as_json else "\n".join(lines))
        return
    waiting = [proxy for proxy in proxies if not store.sealed(proxy.nodes[end].key)]
    if waiting and profile.slurm is not None:
        for proxy in waiting:
            fit.require(proxy, store, proxy.select(end, None), profile)
            slurm.submit(proxy, store, proxy.select(end, None), profile, cluster)
        print(f"{len(waiting)} of {runs} proxies are in Slurm; run this again once they are sealed (atom status)")
        return
    try:
        mixtures.run_all([proxy.recipe.path for proxy in waiting], jobs, cluster)
    except KeyboardInterrupt:
        print("atom: stopped; run the same command to go on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    # Again, since the supply is counted once the corpus is tokenized.
    report = mixtures.report_of(proxies, mixtures.target_of(large, sources, store), factors, store)
    if out is not None:
        ladder.write(report, plots.pareto(report), out, "mix")
    print(json.dumps(report, indent=1, sort_keys=True) if as_json else "\n".join(mixtures.sentences(report)))


@app.command()
def demo(
    recipe: Annotated[str, typer.Argument(help="name of a packaged recipe, or path to its YAML file")] = "atom-tiny",
    quiet: QuietOption = False,
) -> None:
    """Take a tiny model from raw text to a verified release.

    Runs, builds, signs, publishes to a local Hub, pulls back and verifies, and says what each step proves. It needs no
    account and no network. A second run uses what is sealed.

    Example: atom demo atom-smoke
    """
    from release import demo as release_demo

    release_demo.demo(recipe, quiet)
