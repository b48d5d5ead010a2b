"""From a recipe's graph and its sealed artifacts to what `build` asks for."""

from __future__ import annotations

import sys
from pathlib import Path

import pipeline
from pipeline import environment, ledger
from pipeline.errors import AtomError
from pipeline.graph import Graph, states
from pipeline.stage import identity
from pipeline.store import Store
from release.build import BuildInput


def build_input(graph: Graph, store: Store) -> BuildInput:
    """Opens every artifact of the graph. Raises AtomError naming what is not sealed, or has no statement."""
    missing = [name for name, node in graph.nodes.items() if not store.sealed(node.key)]
    if missing:
        more = f" and {len(missing) - 1} more stages are" if len(missing) > 1 else " is"
        raise AtomError(f"{missing[0]}{more} not sealed yet; run `atom run {graph.recipe.path.stem}` first")
    artifacts = {name: store.open(node.key) for name, node in graph.nodes.items()}
    statements, metrics = [], {}
    for name, artifact in artifacts.items():
        made = ledger.sealed(store.ledger, artifact)
        if made is None:
            raise AtomError(
                f"artifact {artifact.key} has no statement in {store.ledger}; "
                f"remove {artifact.path} and run the recipe again"
            )
        statements += [path for path, _ in ledger.read(store.ledger, artifact.key)]
        curves = store.logs / ledger.invocation(made[1]) / "metrics.jsonl"
        if curves.exists():
            metrics[name] = curves
    root = Path(pipeline.__path__[0]).parent  # a checkout, or the site-packages folder of a wheel
    commit, dirty = environment.git_commit(root)
    return BuildInput(
        name=graph.recipe.config.name,
        version=graph.recipe.config.version,
        recipe={**identity(graph.recipe.config), "data_recipe": identity(graph.recipe.data)},
        recipe_files=graph.recipe.files,
        artifacts=artifacts,
        statements=statements,
        metrics=metrics,
        environment=environment.describe(),
        code_roots=[root],
        commit=commit,
        dirty=dirty,
        stale=[s.name for s in states(graph, store).values() if s.text == "stale"],
        machine_paths=[store.home, root, Path.home(), Path(sys.prefix)],
    )
