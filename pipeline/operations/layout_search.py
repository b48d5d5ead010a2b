"""Searches the fastest layouts of a training phase that fit a cluster, by the model of training time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.core.errors import RecipeError
from pipeline.core.stage import Alternative, TrainingTime
from pipeline.graph import plan
from pipeline.graph.dag import Graph, Node, State
from pipeline.graph.plan import StagePlan
from pipeline.launch.cluster_profile import Profile
from pipeline.operations.fit import GIB, Use, fits, gpus_of, missing_nodes, model_error, priced, rate_of

SHOWN, MISSING_SHOWN = 5, 1
"""Layouts that are found: those that run in the project's image, and those that need a package which it lacks."""
HEADROOM = 0.9
"""Share of a GPU's memory that a found layout may take.

The estimate assumes even routing, and leaves out buffers and fragments.
"""


@dataclass(frozen=True)
class Layout:
    """A layout of the phase with its figures.

    Attributes:
        label: The layout in shorthand.
        settings: The settings that vary, by their field in the section of the phase.
        package: A package that it needs and that the project's image lacks.
        memory_bytes: Bytes of the fullest rank.
        tokens_per_second: Tokens a second of one GPU, over all steps.
        hours: Hours on the clock.
        gpu_hours: Hours of all GPUs of the job.
        cost: Money by the profile; 0 if it states no prices.
    """

    label: str
    settings: Mapping[str, Any]
    package: str | None
    memory_bytes: int
    tokens_per_second: float
    hours: float
    gpu_hours: float
    cost: float


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        phase: The stage.
        profile: The cluster.
        written: The layout of the recipe.
        found: The fastest layouts that fit, fastest first; of those that need a missing package, one.
        assumed: Sentences on what the figures rest on.
    """

    phase: str
    profile: Profile
    written: Layout
    found: tuple[Layout, ...]
    assumed: tuple[str, ...]

    @property
    def best(self) -> Layout | None:
        """The fastest layout that runs in the project's image, if one fits."""
        return next((layout for layout in self.found if layout.package is None), None)

    def json(self) -> dict[str, Any]:
        prices = self.profile.costs()
        return asdict(self) | {
            "profile": self.profile.name,
            "currency": prices["currency"] if prices else None,
        }


def search(graph: Graph, name: str, profile: Profile) -> Search:
    """Searches the fastest layouts of a phase that fit a cluster.

    Args:
        graph: The graph of the recipe.
        name: The stage of the phase, whose ranks and batches stay.
        profile: The cluster. Its section `gpu` states peaks, bandwidths and memory.

    Raises:
        AtomError: The graph has no such stage.
        RecipeError: The stage cannot be searched, or the profile does not state enough or has too few nodes.
    """
    node, gpu = graph.nodes[graph.select(None, name)[0]], profile.gpu
    if node.stage.alternatives is None or node.stage.time is None:
        names = ", ".join(other.name for other in graph.nodes.values() if other.stage.alternatives)
        raise RecipeError(f"--stage {name}: only layouts of training on text are searched; name one of {names}")
    written = _row(graph, node)
    if isinstance(reason := rate_of(written, profile), str):
        raise RecipeError(f"--search: {reason}")
    accelerator = profile.accelerator
    if accelerator is None or gpu is None or gpu.memory_gb is None or profile.slurm is None:
        raise RecipeError(
            f"cluster profile {profile.name}: --search needs the section slurm, and memory_gb, memory_tb_s, "
            "nvlink_gb_s and network_gb_s of the section gpu"
        )
    # No layout changes the ranks, so none would fit.
    if reasons := missing_nodes(written, profile):
        raise RecipeError(f"--search: {name} does not fit {profile.name}: {reasons[0]}; lower parallelism.ranks")
    layouts = node.stage.alternatives(node.config, accelerator, HEADROOM * gpu.memory_gb * GIB)
    first = next(layouts)
    # Those that need a missing package are as a rule the fastest, so one is there before the others are complete.
    found, counts = [], Counter[bool]()
    for other in layouts:
        if counts[other.package is not None] == (MISSING_SHOWN if other.package else SHOWN):
            continue
        row = _row(graph, replace(node, config=other.config))
        layout = _figures(row, other, profile, node.stage.time(other.config, accelerator))
        use = Use(name, layout.hours)
        if not any(fit.reasons for fit in fits([row], {name: use}, profile)):
            found.append(layout)
            counts[other.package is not None] += 1
        if counts[False] == SHOWN:
            break
    time = node.stage.time(node.config, accelerator)
    assumed = (
        f"assumed: {gpu.name} by a model of compute, memory and network, with even routing; {model_error(time)}",
        f"found layouts take at most {HEADROOM:.0%} of gpu.memory_gb = {gpu.memory_gb:g}, since real routing is less "
        "even; ranks and batches stay, and the smallest batch limits the rows of a micro-batch",
    )
    return Search(name, profile, _figures(written, first, profile, time), tuple(found), assumed)


def _row(graph: Graph, node: Node) -> StagePlan:
    """Returns the plan of a stage that is still to run."""
    states = {node.name: State(node.name, node.key, "to run")}
    return plan.plan(replace(graph, nodes={node.name: node}), states, [node.name], other_python=True)[0]


def _figures(row: StagePlan, layout: Alternative[Any], profile: Profile, time: TrainingTime) -> Layout:
    """Returns the figures of a layout, whose time on the GPUs of the profile is known."""
    estimate, name, hours = row.estimate, row.state.name, time.seconds / 3600
    assert estimate.training is not None and estimate.tokens is not None and estimate.memory_bytes is not None
    use = priced(Use(name, hours, gpu_hours=hours * gpus_of(row, profile, all_of_job=True)), profile)
    return Layout(
        estimate.training.layout,
        layout.settings,
        layout.package,
        estimate.memory_bytes,
        estimate.tokens / time.seconds / row.ranks,
        use.hours,
        use.gpu_hours,
        use.cost,
    )
