"""Rehearsals of costly phases: their settings, their nodes, and the comparison of a step before and after a restart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Annotated, Any, Literal

from pipeline.core.bounds import Range
from pipeline.core.stage import Config, operational
from pipeline.core.store import Store
from pipeline.graph.dag import Graph, NodeSpec
from stages.models.base import ModelConfig
from stages.models.parallel_layout import Layout
from stages.train.config import PhaseConfig, SftConfig
from stages.train.nodes import TextPhase

NAME = "rehearsal"
FILE = "rehearsal.json"
SAVED, COMPARED, STEPS = 2, 3, 13
"""Steps of a rehearsal: the last one before the checkpoint, the one that is taken twice, and the last one."""
GPU_FLOPS = 4e14
"""Nominal FLOP/s of a GPU: 40 % of the 989 TFLOP/s in bf16 that NVIDIA states for an H100.

Which phases are rehearsed follows from the recipe alone, so that a run has the same stages on every cluster.
"""
TOLERANCES = {"loss": 1e-3, "grad_norm": 1e-2}
"""Largest relative difference of a step that is repeated by kernels that may add in another order.

The weights before it are equal bit for bit, and a mean over millions of tokens averages rounding in bf16 of 4e-3 away.
Not measured on a GPU.
"""


class RehearsalSection(Config):
    """Rehearsal of costly phases on text: their first steps with a restart in between, before the phase begins."""

    above_gpu_hours: Annotated[float, Range(0, 1e11)] | None = 1000.0
    """a phase with more GPU hours is rehearsed: its FLOPs at 400 TFLOP/s a GPU, 40 % of an H100's peak in bf16; null:
    none is"""
    least_of_plan: Annotated[float, Range(0, 1)] = 0.7
    """share of the planned tokens a second below which a phase is slow; the plan itself errs by 11 % in the median"""
    slow: Literal["warn", "stop"] = "warn"
    """what a slow phase leads to: a sentence in the log and on the card, or a failed rehearsal"""


class RehearsalConfig(SftConfig):
    """Config of a rehearsal: that of the phase, with what the key of the phase leaves out."""

    layout: Layout
    """parallelism of the phase; another one is rehearsed anew"""
    least_of_plan: float = operational(0.7)
    """share of the planned tokens a second below which the phase is slow"""
    slow: Literal["warn", "stop"] = operational("warn")
    """what a slow phase leads to"""


def difference(before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]], exact: bool) -> str | None:
    """Returns how a repeated step differs from the first one, in words; None if it does not.

    Args:
        before: Lines of the log about the step before the restart.
        after: Those after it.
        exact: Whether a repeated step has the same bits.
    """
    first, again = ({name: value for line in lines for name, value in line.items()} for lines in (before, after))
    # A number says more than a digest.
    for name in sorted({*first, *again}, key=lambda name: (name == "digests", name)):
        was, now, tolerance = first.get(name), again.get(name), TOLERANCES.get(name)
        if was == now or not (exact or tolerance):
            continue
        if name == "digests":
            return f"{differing(was or [], now or [])} other weights or states of the optimizer"
        if exact or was is None or now is None or not math.isclose(was, now, rel_tol=tolerance or 0.0):
            return f"{name} was {was}, is {now}" + ("" if exact else f", and may differ by {tolerance:g} of it")
    return None


def within(exact: bool) -> str:
    """Returns what qualifies the word *equal* for a repeated step."""
    return "" if exact else " within the tolerance of kernels"


def differing(before: Sequence[str], now: Sequence[str]) -> str | None:
    """Returns the ranks whose digests differ, as the beginning of a clause; None if none do."""
    ranks = [rank for rank, pair in enumerate(zip_longest(before, now)) if pair[0] != pair[1]]
    return f"{len(ranks)} of {len(now)} ranks, the first of them rank {ranks[0]}, hold" if ranks else None


def with_rehearsals(
    specs: Sequence[NodeSpec],
    section: RehearsalSection,
    phases: Sequence[TextPhase],
    model: ModelConfig,
    padded_vocab_size: int,
) -> Iterator[NodeSpec]:
    """Yields the nodes of a graph, and before each costly phase its rehearsal, for which the phase waits.

    Args:
        specs: All other nodes.
        section: The section `rehearsal`.
        phases: The phases on text.
        model: The section `model`.
        padded_vocab_size: Rows of the embedding matrix.
    """
    costly = {phase.node for phase in phases if is_costly(phase.config, section, model, padded_vocab_size)}
    for spec in specs:
        if spec.name in costly:
            phase: PhaseConfig = spec.config["phase"]
            config = {**spec.config, "phase": phase.model_dump(), "layout": phase.parallelism.model_dump()}
            config |= {"least_of_plan": section.least_of_plan, "slow": section.slow}
            # It waits for what the phase waits for.
            rehearsal = replace(spec, name=f"{NAME}-{spec.name}", stage=NAME, config=config)
            yield rehearsal
            spec = replace(spec, after=(*spec.after, rehearsal.name))
        yield spec


def is_unrehearsed(graph: Graph, phase: str, store: Store) -> bool:
    """Returns True if a phase of a graph is sealed, and the rehearsal that the graph has for it is not."""
    rehearsal = graph.nodes.get(f"{NAME}-{phase}")
    return rehearsal is not None and store.sealed(graph.nodes[phase].key) and not store.sealed(rehearsal.key)


def is_costly(phase: PhaseConfig, section: RehearsalSection, model: ModelConfig, padded_vocab_size: int) -> bool:
    """Returns True if a phase costs more than the section says, and has the steps for a rehearsal."""
    flops = phase.tokens(phase.first_step) * model.flops_per_token(padded_vocab_size, phase.sequence_length)
    is_above = section.above_gpu_hours is not None and flops / GPU_FLOPS / 3600 > section.above_gpu_hours
    return is_above and phase.steps - phase.first_step + 1 >= STEPS
