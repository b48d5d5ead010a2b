"""Megatron's groups of any number of ranks in one process: torch's own fake process group, whose collectives do nothing.
Enough to build each rank's part of a model, without weights, and to ask which part it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from stages.mcore.megatron_imports import parallel_state, tensor_parallel
from stages.mcore.parallel_layout import Layout
from stages.mcore.tensor_sharding import Box, boxes
from stages.models.qwen3_moe.config import ModelConfig, Precision
from stages.models.qwen3_moe.megatron_model import build, named_buffers, named_tensors


@dataclass(frozen=True)
class Place:
    """All that says which tensors a rank has: its place in the pipeline, among tensor ranks, and among those of experts."""

    pipeline: int
    tensor: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class Part:
    """A rank's tensors by global name: local shapes as Megatron built them, and which boxes of the full tensor those are."""

    shapes: dict[str, tuple[int, ...]]
    boxes: dict[str, tuple[Box, ...]]
    trained: int
    """Elements of its parameters, which its optimizer has; buffers are none."""


def places(layout: Layout) -> list[Place]:
    """Each rank's place, by Megatron's own numbering of ranks."""
    order = "tp-cp-ep-dp-pp"
    grid = parallel_state.RankGenerator
    dense = grid(layout.tp, 1, layout.data, layout.pp, layout.cp, order)
    each = layout.ranks // (layout.split_experts * layout.ep * layout.pp)
    sparse = grid(layout.split_experts, layout.ep, each, layout.pp, 1, order)
    at = [
        {rank: place for group in generator.get_ranks(kind) for place, rank in enumerate(group)}
        for generator, kind in ((dense, "pp"), (dense, "tp"), (sparse, "ep"), (sparse, "tp"))
    ]
    return [Place(*(numbers[rank] for numbers in at)) for rank in range(layout.ranks)]


@contextmanager
def as_rank(layout: Layout, rank: int) -> Iterator[Place]:
    """This process as one rank of a layout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("fake", rank=rank, world_size=layout.ranks, store=FakeStore())
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.split_experts,
                create_gloo_process_groups=False,
            )
            tensor_parallel.model_parallel_cuda_manual_seed(0)
            yield Place(
                parallel_state.get_pipeline_model_parallel_rank(),
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_expert_model_parallel_rank(),
                parallel_state.get_expert_tensor_parallel_rank(),
            )
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def part(
    model: ModelConfig, padded_vocab_size: int, layout: Layout, rank: int, precision: Precision, packed: bool = False
) -> tuple[Place, Part]:
    """What Megatron builds for a rank, on the meta device, and where the rank says that it stands."""
    full = model.shapes(padded_vocab_size)
    with as_rank(layout, rank) as place, torch.device("meta"):
        chunks = build(model, padded_vocab_size, layout, precision, packed)
        parameters, buffers = dict(named_tensors(chunks)), named_buffers(chunks)
        shapes = {name: tuple(tensor.shape) for name, tensor in (parameters | buffers).items()}
        blocks = {name: boxes(name, full[name]) for name in shapes}
    return place, Part(shapes, blocks, sum(p.numel() for _, p in parameters.items()))
