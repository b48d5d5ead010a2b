"""The commands that predict runs, and the one that shows the whole pipeline.

`predict` seals what it says of a run, `ladder` fits a law and predicts by it, and `demo` makes a tiny release.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.operations.command_options import JsonOption, QuietOption, RecipeArgument, graph_of, open_store

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

        ladder_report.write(result, plots.law(ladder_report.drawing(result)), out)
    if as_json:
        print(json.dumps(result.to_json(), indent=1, sort_keys=True, allow_nan=False))
        return
    print(*ladder_report.sentences(result), sep="\n")
    if out is not None:
        print(f"written: {out / ladder_report.REPORT}, {out / ladder_report.PLOT}")


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
