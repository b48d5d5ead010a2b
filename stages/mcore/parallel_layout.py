"""The parallel layout of a phase: its section `parallelism`. It never enters a key. No torch here.

The words are Megatron-core's. A rank is one process with one device. Dense tensors live on a grid of
tensor x context x data x pipeline ranks, experts on one of expert_tensor x expert x expert data x pipeline ranks;
both grids cover the same ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.bounds import Flag, Range
from pipeline.core.stage import Config, Renamed
from stages.models.qwen3_moe.config import ModelConfig

Split = Annotated[int, Range(1, 4096)]


class Layout(Config):
    """The ranks of a phase and their parallel layout. All layouts give the same loss within rounding."""

    ranks: Annotated[int, Range(1, 1e6, "Llama 3: 16384")] = Field(
        default=1, description="number of processes, one per device"
    )
    tp: Annotated[Split, Renamed("tensor")] = Field(
        default=1, description="tensor-parallel ranks, with sequence parallelism of the activations"
    )
    pp: Annotated[Split, Renamed("pipeline")] = Field(
        default=1, description="pipeline-parallel ranks, which split the layers"
    )
    vpp: Annotated[Split, Renamed("virtual_pipeline")] = Field(
        default=1, description="model chunks per pipeline rank; above 1: interleaved 1F1B schedule"
    )
    cp: Annotated[Split, Renamed("context")] = Field(
        default=1, description="context-parallel ranks, which split each sequence"
    )
    ep: Annotated[Split, Renamed("expert")] = Field(
        default=1, description="expert-parallel ranks, which split the experts of a layer"
    )
    etp: Annotated[Split | None, Renamed("expert_tensor")] = Field(
        default=None, description="tensor-parallel ranks of each expert; null: as tp"
    )
    dispatcher: Literal["alltoall", "allgather"] = Field(
        default="alltoall", description="how tokens are sent to their experts"
    )
    recompute: Literal["none", "layer"] = Field(
        default="none",
        description="layer: keep only the input of each layer, and recompute the rest in the backward pass",
    )
    overlap_gradients: Flag = Field(
        default=False, description="overlap the reduction of gradients with the backward pass"
    )

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.ranks // (self.tp * self.pp * self.cp)

    @property
    def split_experts(self) -> int:
        """Ranks that split each expert."""
        return self.etp or self.tp

    @property
    def width_unit(self) -> int:
        """Rows are padded to a multiple of this many tokens: two slices for each context rank (the zigzag that evens
        out causal attention), each cut again by sequence parallelism."""
        return self.tp * (2 * self.cp if self.cp > 1 else 1)


def problem(layout: Layout, model: ModelConfig, padded_vocab_size: int, micro_batches: Iterable[int]) -> str | None:
    """The reason why this layout cannot train the model, as a sentence that begins with a field; None if it can.

    micro_batches: of one optimizer step, over all ranks; several if the batch grows.
    """
    for field, size, dimension, value in (
        ("tp", layout.tp, "heads", model.heads),
        ("tp", layout.tp, "kv_heads", model.kv_heads),
        ("tp", layout.tp, "padded_vocab_size", padded_vocab_size),
        ("etp", layout.split_experts, "moe_intermediate_size", model.moe_intermediate_size),
        ("tp", layout.tp, "intermediate_size", model.intermediate_size or 0),
        ("tp", layout.tp, "shared_expert_intermediate_size", model.shared_expert_intermediate_size or 0),
        ("ep", layout.ep, "experts", model.experts),
    ):
        if value % size:
            return (
                f"parallelism.{field} = {size} does not divide {dimension} = {value}; nearest: {_divisors(value, size)}"
            )
    chunks = layout.pp * layout.vpp
    if model.layers % chunks:
        return (f"parallelism.pp = {layout.pp} with vpp = {layout.vpp} cannot deal "
                f"layers = {model.layers} evenly; nearest product: {_divisors(model.layers, chunks)}")  # fmt: skip
    for fields, size in (
        ("tp x pp x cp", layout.tp * layout.pp * layout.cp),
        ("etp x ep x pp", layout.split_experts * layout.ep * layout.pp),
    ):
        if layout.ranks % size:
            return (f"parallelism.ranks = {layout.ranks} is not a multiple of {fields} = {size}; "
                    f"nearest: {_multiples(layout.ranks, size)}")  # fmt: skip
    if layout.ep == 1 and layout.split_experts != layout.tp:
        return (f"parallelism.etp = {layout.split_experts} with tp = {layout.tp} and ep = 1 would "
                f"train wrongly without an error: Megatron-core then sums no expert's gradient over the tensor ranks; "
                f"leave etp out, or set ep to {layout.tp}")  # fmt: skip
    if layout.vpp > 1 and layout.pp == 1:
        return (f"parallelism.vpp = {layout.vpp} interleaves pipeline ranks, "
                f"and pp = 1 has none; leave it out")  # fmt: skip
    for count in micro_batches:
        if count % layout.data:
            return (f"parallelism.ranks = {layout.ranks} makes {layout.data} data-parallel ranks, which cannot share "
                    f"the {count} micro-batches of a step evenly; use a number that divides them, "
                    f"or other batch.micro_tokens")  # fmt: skip
        per_rank = count // layout.data
        if layout.vpp > 1 and per_rank % layout.pp:
            return (f"parallelism.vpp = {layout.vpp} needs a multiple of pp = "
                    f"{layout.pp} micro-batches on each data-parallel rank, not {per_rank}; "
                    f"change batch.micro_tokens or ranks")  # fmt: skip
    return None


def _divisors(value: int, size: int) -> str:
    """The divisors of `value` nearest to `size`, as text."""
    divisors = sorted({d for n in range(1, math.isqrt(value) + 1) if value % n == 0 for d in (n, value // n)})
    return " or ".join(str(d) for d in [d for d in divisors if d < size][-1:] + [d for d in divisors if d > size][:1])


def _multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
