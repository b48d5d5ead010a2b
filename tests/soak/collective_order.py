"""The part of the soak about the order of collectives in the layouts of the recipes for clusters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from stages.models.parallel_layout import Layout
from stages.train.config import TrainConfig
from tests.fixtures.order_of_collectives import classes, record, run_through, shrink
from tests.soak.layouts import Cells, Step

HEAD = ["layout", "ranks", "distinct", "operations", "messages", "of the recipe's ranks"]
RECIPES = ("atom-1b-a300m", "atom-30b-a3b", "atom-235b-a22b")


def steps() -> dict[str, Step]:
    """A step for each layout of a recipe, of the first phase on text that has it."""
    found: dict[str, Step] = {}
    for name in RECIPES:
        graph = dag.compose(recipes.load(name), Store(Path("none")), without_data=True)
        layouts = set()
        for phase in (graph.nodes[phase.node] for phase in graph.recipe.config.text_phases):
            if phase.config.phase.parallelism not in layouts:
                layouts.add(phase.config.phase.parallelism)
                found[f"{name}, {phase.name}"] = partial(check, phase.stage.simulate, phase.config)
    return found


def check(simulate: Any, config: TrainConfig, _: Path) -> Cells:
    """All ranks of the layout with few data ranks, then of the recipe's ranks the first and the last of each stage.

    Raises SystemExit if those of a stage do not issue the same, and DisorderError if the ranks would not all end.
    """
    small = shrink(config)
    layout = small.phase.parallelism
    programs = {rank: record(simulate, small, rank) for rank in range(layout.ranks)}
    counts = run_through(programs)
    distinct = classes(layout, programs)
    require_stages(distinct, layout.pp)

    full = shrink(config, config.phase.parallelism.ranks)
    ranks = ends_of_stages(full.phase.parallelism)
    programs = {rank: record(simulate, full, rank) for rank in ranks}
    run_through(programs)
    require_stages(classes(full.phase.parallelism, programs), layout.pp)
    split = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "ep")}
    return [
        " ".join(f"{name.upper()}{size}" for name, size in split.items() if size > 1),
        str(layout.ranks),
        str(len(distinct)),
        f"{counts.total():,}",
        f"{counts['pp']:,}",
        f"{len(ranks)} of {config.phase.parallelism.ranks}",
    ]


def ends_of_stages(layout: Layout) -> list[int]:
    """The first and the last rank of each stage of a pipeline."""
    stage = layout.ranks // layout.pp
    return sorted({rank for first in range(0, layout.ranks, stage) for rank in (first, first + stage - 1)})


def require_stages(distinct: list[list[int]], stages: int) -> None:
    if len(distinct) != stages:
        raise SystemExit(f"soak: ranks of {stages} stages issue {len(distinct)} sequences of operations: {distinct}")
