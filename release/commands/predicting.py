"""The command that seals a prediction."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline.operations.command_options import JsonOption, RecipeArgument, graph_of, open_store

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
    from release.prediction import sealing
    from release.prediction.forecast import NAMES

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
