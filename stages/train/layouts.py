"""Other layouts of a training phase on the same ranks, fastest first by the model of training time. No torch.

The tokens of a step, the length of a row, the precision and the model stay as they are. What varies: tensor, pipeline,
context, expert and data ranks, the chunks of the pipeline and their layers, recomputation (selective: of what costs no
matrix product), the dispatcher, and the rows of a micro-batch. Only layouts are given that the engine accepts. The
overlaps of gradients and weights, fusions and CUDA graphs stay as the recipe has them, because the model of time has no
figures for them in this engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import get_args

from pipeline.core.stage import Accelerator, Alternative
from stages.mcore.layout_check import divisors, problem
from stages.mcore.throughput import shape_of
from stages.models.base import Rows
from stages.models.parallel_layout import Layout, deal
from stages.train.config import TrainConfig
from stages.train.estimate import rank_memory, training_seconds

CONTEXT_TOKENS = 4096
"""Tokens of a row that each context rank has at least."""
MOST_STAGES, MOST_CHUNKS = 16, 24
"""Pipeline ranks, and chunks of one, at most, as in published runs (bench/anchors.csv).

Traffic of the pipeline, which grows with them, counts as hidden.
"""
MISSING = {"flex": "deep_ep"}
"""Packages that dispatchers need and that the project's image lacks."""


def alternatives(config: TrainConfig, gpu: Accelerator, memory: float) -> Iterator[Alternative[TrainConfig]]:
    """Yields the phase as it is, and then in each layout that the engine accepts and that fits, fastest first.

    Layouts whose times agree in four digits come in the order of their splits, fewest first. Up to some ten thousand
    layouts are timed, at 0.1 ms each, before the first one is yielded. Their memory is computed one by one.

    Args:
        config: The config of the phase.
        gpu: The figures of a GPU.
        memory: Bytes that a rank may take.
    """
    yield _alternative(config)
    too_many: dict[Layout, int] = {}
    for *_, other in sorted(_timed(config, gpu), key=lambda row: row[:-1]):
        phase = other.phase
        # The dispatcher changes no estimate of memory, and more rows never take less.
        layout = phase.parallelism.model_copy(update={"dispatcher": "alltoall"})
        if phase.micro_rows >= too_many.get(layout, math.inf):
            continue
        rows = Rows(phase.micro_rows, phase.sequence_length, phase.pack)
        # As a rule the first rank takes the most, so what does not fit is known without the others.
        if any(sum(rank_memory(other, rows, rank)[1:]) > memory for rank in range(layout.pp)):
            too_many[layout] = phase.micro_rows
        else:
            yield _alternative(other)


def _alternative(config: TrainConfig) -> Alternative[TrainConfig]:
    layout, micro_tokens = config.phase.parallelism, config.phase.batch.micro_tokens
    settings = {"batch.micro_tokens": micro_tokens, "parallelism": layout.model_dump(exclude_defaults=True)}
    return Alternative(config, settings, MISSING.get(layout.dispatcher))


def _timed(config: TrainConfig, gpu: Accelerator) -> Iterator[tuple[float, int, int, TrainConfig]]:
    """Yields (seconds in four digits, product of the splits, number, config) of each layout that is possible."""
    phase, model, vocabulary = config.phase, config.model, config.padded_vocab_size
    shape, number = shape_of(model, vocabulary), itertools.count()
    # Each batch of a ramp is divided among the data ranks and into micro-batches.
    batch_rows = math.gcd(phase.rows_of(phase.steps), *(rows for _, rows in phase.row_ramp))
    # The layers that take the time of the output head.
    heads = round(shape.head * shape.depth / (shape.matrices - shape.head))
    for layout in _layouts(config, gpu.nvlink_gpus, heads):
        if phase.adapter and phase.adapter.problem(layout, phase.precision, model):
            continue
        for rows in divisors(batch_rows // layout.data) if batch_rows % layout.data == 0 else ():
            batch = phase.batch.model_copy(update={"micro_tokens": rows * phase.sequence_length})
            changed = phase.model_copy(update={"parallelism": layout, "batch": batch})
            if problem(layout, model, vocabulary, changed.micro_batch_counts, phase.packed, phase.precision):
                continue
            other = config.model_copy(update={"phase": changed})
            seconds = training_seconds(other, gpu, shape)
            splits = layout.tp * layout.pp * layout.vpp * layout.cp * layout.ep
            yield float(f"{seconds:.3e}"), splits, next(number), other


def _pipelines(pp: int, layers: int, heads: int) -> Iterator[tuple[int, tuple[int, ...] | None]]:
    """Yields (chunks of a rank, layers of each chunk or None for the default) for so many pipeline ranks.

    Chunks are equal, at least if embedding and loss count as a layer each; or the loss counts as `heads` layers, as
    many as take the time of the output head.
    """
    if pp == 1:
        yield 1, None
        return
    for vpp in range(1, min(MOST_CHUNKS, layers // pp) + 1):
        chunks = pp * vpp
        if vpp == 1 or layers % chunks == 0 or (layers + 2) % chunks == 0:
            yield vpp, None
        if heads > 1 and (vpp == 1 or (layers + 1 + heads) % chunks == 0):
            yield vpp, deal(layers, chunks, heads)


def _layouts(config: TrainConfig, domain: int, heads: int) -> Iterator[Layout]:
    """Yields the layouts of the phase's ranks that the engine accepts for some batch.

    Tensor ranks stay in an NVLink domain of `domain` GPUs. Context ranks beside them do too, unless those of the recipe
    do not, because their traffic counts as hidden. heads: as in `_pipelines`.
    """
    phase, model, written = config.phase, config.model, config.phase.parallelism
    ranks, contexts = divisors(written.ranks), max(1, phase.sequence_length // CONTEXT_TOKENS)
    inside, experts = max(domain, written.tp * written.cp), model.routing.experts if model.routing else 1
    recomputes, dispatchers = (get_args(Layout.model_fields[name].annotation) for name in ("recompute", "dispatcher"))
    pipelines = {pp: list(_pipelines(pp, model.layers, heads)) for pp in ranks if pp <= MOST_STAGES}
    for tp, pp, cp, ep in itertools.product(ranks, ranks, ranks, divisors(experts)):
        if tp > domain or tp * cp > inside or cp > contexts or pp > MOST_STAGES or written.ranks % (tp * pp * cp):
            continue
        # Only experts on several ranks can be whole where attention is split.
        for etp, (vpp, layers) in itertools.product((None, 1) if tp > 1 and ep > 1 else (None,), pipelines[pp]):
            sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp, "vpp": vpp, "pp_layers": layers}
            layout = written.model_copy(update={**sizes, "recompute": "none", "recompute_modules": None})
            if problem(layout, model, config.padded_vocab_size, (), phase.packed):
                continue
            for recompute, dispatcher in itertools.product(recomputes, dispatchers if ep > 1 else ("alltoall",)):
                yield layout.model_copy(update={"recompute": recompute, "dispatcher": dispatcher})
