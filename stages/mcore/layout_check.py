"""Checks whether a parallel layout can train a model. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable

from stages.models.base import ModelConfig, Precision
from stages.models.parallel_layout import Layout


def problem(
    layout: Layout,
    model: ModelConfig,
    padded_vocab_size: int,
    micro_batches: Iterable[int],
    packed: bool = False,
    precision: Precision = "bf16",
) -> str | None:
    """The reason why this layout cannot train the model, as a sentence that starts with a field; None if it can.

    micro_batches: of one optimizer step, over all ranks; several if the batch grows. packed: rows hold several
    documents.
    """
    if reason := _no_recomputation(layout, model, precision) or _no_pipeline(layout, model):
        return reason
    if layout.cuda_graphs and (reason := _no_graphs(layout, model, packed)):
        return f"parallelism.cuda_graphs = true is not possible {reason}; leave it out"
    if model.routing is None:
        for field, size in (("ep", layout.ep), ("etp", layout.etp or 1)):
            if size > 1:
                return f"parallelism.{field} = {size} splits experts, and the model has none; leave it out"
    sizes = {"tp": layout.tp, "etp": layout.split_experts, "ep": layout.ep}
    for field, dimension, value in [*model.split_sizes(), ("tp", "padded_vocab_size", padded_vocab_size)]:
        if value % (size := sizes[field]):
            nearest = _divisors_around(value, size)
            return f"parallelism.{field} = {size} does not divide {dimension} = {value}; nearest: {nearest}"
    for fields, size in (
        ("tp x pp x cp", layout.tp * layout.pp * layout.cp),
        ("etp x ep x pp", layout.split_experts * layout.ep * layout.pp),
    ):
        if layout.ranks % size:
            return (
                f"parallelism.ranks = {layout.ranks} is not a multiple of {fields} = {size}; "
                f"nearest: {multiples_around(layout.ranks, size)}"
            )
    # The most dangerous of Megatron's silent faults: the loss falls all the same.
    if layout.ep == 1 and layout.split_experts != layout.tp:
        return (
            f"parallelism.etp = {layout.split_experts} with tp = {layout.tp} and ep = 1 would "
            f"train wrongly without an error: Megatron-core then sums no expert's gradient over the tensor ranks; "
            f"leave etp out, or set ep to {layout.tp}"
        )
    if layout.vpp > 1 and layout.pp == 1:
        return f"parallelism.vpp = {layout.vpp} interleaves pipeline ranks, and pp = 1 has none; leave it out"
    if layout.overlap_weights and layout.overlap_gradients is False:
        return (
            "parallelism.overlap_weights = true needs the buckets of overlap_gradients, which is false; "
            "leave one of them out"
        )
    # Of each batch of a ramp.
    for count in micro_batches:
        if count % layout.data:
            return (
                f"parallelism.ranks = {layout.ranks} makes {layout.data} data-parallel ranks, which cannot share "
                f"the {count} micro-batches of a step evenly; use a number that divides them, "
                f"or other batch.micro_tokens"
            )
        per_rank = count // layout.data
        if layout.vpp > 1 and per_rank % layout.pp:
            return (
                f"parallelism.vpp = {layout.vpp} needs a multiple of pp = "
                f"{layout.pp} micro-batches on each data-parallel rank, not {per_rank}; "
                f"change batch.micro_tokens or ranks"
            )
    return None


def _no_recomputation(layout: Layout, model: ModelConfig, precision: Precision) -> str | None:
    """Returns a sentence on modules that cannot be computed again; None if they can."""
    if layout.recompute != "selective":
        if layout.recompute_modules:
            return (
                f"parallelism.recompute_modules needs recompute = selective, and recompute is {layout.recompute}; "
                "leave one of them out"
            )
        return None
    if precision not in ("fp32", "bf16"):
        return (
            f"parallelism.recompute = selective is not possible with precision = {precision}, where matrices keep "
            "other tensors than those that it computes again; use recompute = layer"
        )
    for module in layout.recompute_modules or ():
        part = {"layernorm": True, "moe_act": model.routing is not None}
        if not part.get(module, model.matrices_again([module]) > 0):
            return (
                f"parallelism.recompute_modules = {module} names a part that no layer of this model has; leave it out"
            )
    return None


def _no_pipeline(layout: Layout, model: ModelConfig) -> str | None:
    """Returns a sentence on layers that cannot be dealt to the chunks of the pipeline in this way; None if they can."""
    chunks, counts = layout.pp * layout.vpp, layout.chunk_layers(model.layers)
    if layout.pp_layers and (len(counts), sum(counts)) != (chunks, model.layers):
        return (
            f"parallelism.pp_layers has {len(counts)} numbers and the sum {sum(counts)}, not one for each of "
            f"pp x vpp = {chunks} chunks and the sum layers = {model.layers}; change it, or leave it out"
        )
    if min(counts) < 1:
        return (
            f"parallelism.pp = {layout.pp} with vpp = {layout.vpp} leaves a chunk without any of layers = "
            f"{model.layers}; nearest product: {_divisors_around(model.layers, chunks)}"
        )
    return None


def _no_graphs(layout: Layout, model: ModelConfig, packed: bool) -> str | None:
    """Returns the reason why CUDA graphs, which repeat kernels with the sizes of a first run, are impossible here."""
    if model.routing is not None:
        return "with experts, the number of whose tokens differs from step to step and is read by the host"
    if packed:
        return "with packed rows, whose documents differ in number and length"
    if layout.recompute != "none":
        return f"with recompute = {layout.recompute}, as Megatron-core does not record a layer that is computed again"
    if layout.pp > 1:
        return (
            f"with pp = {layout.pp}, where each micro-batch of a training step has graphs of its own, and an "
            "evaluation has other micro-batches"
        )
    return None


def divisors(value: int) -> list[int]:
    """Returns the divisors of a positive number, ascending."""
    return sorted({d for n in range(1, math.isqrt(value) + 1) if value % n == 0 for d in (n, value // n)})


def _divisors_around(value: int, size: int) -> str:
    """The divisors of `value` nearest to `size`, as text."""
    found = divisors(value)
    return " or ".join(str(d) for d in [d for d in found if d < size][-1:] + [d for d in found if d > size][:1])


def multiples_around(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, as text."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
