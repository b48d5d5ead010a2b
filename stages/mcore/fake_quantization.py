"""FP8 and FP4 simulated without their hardware: a built model's linear layers multiply rounded numbers.

`attach` changes every linear layer of the decoder (attention, dense feed-forward, experts, shared experts) and nothing
else: embeddings, norms, router, attention's own products, output head, and under FP4 the last layers are unchanged. A
layer's three products are those of FP8 training (Micikevicius et al., 2022, arXiv:2209.05433),

    y = Q(x) Q(w)^T        dx = Q(dy) Q(w)        dw = Q(dy)^T Q(x)

each operand rounded along the dimension that its product sums over, from the unrounded tensor. In FP4, dy is rounded
stochastically, and both operands of dw pass a Hadamard transform first. The draws follow from the seed, the name of the
layer and the number of the product, so a run in one process repeats bit by bit. Sums run in fp32 and are rounded once
to the model's type, where tensor cores of the Hopper generation keep fewer bits of a sum.

Under tensor parallelism the FP8 recipes round as in one process: a per-tensor scale is that of the whole tensor;
Transformer Engine uses the rank's part of a weight. Blocks agree if cuts are between them. Two things still depend on
the layout, in both: an expert's tokens come from several ranks, and context ranks have a share of a row each, so the
number and the neighbors of the values that are rounded together differ. The draws of FP4 depend on it as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stages.formats.seeds import seed_of
from stages.mcore.latent_attention import WholeLinear
from stages.mcore.megatron_imports import GPTModel, tensor_parallel
from stages.mcore.quantize import HADAMARD, KINDS, Counts, Kind, QuantizationRecipe, Quantized, hadamard, quantize

LINEARS = (tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear, WholeLinear)


@dataclass
class LinearRecord:
    """The roundings of one linear layer on this rank; the experts of a layer share a record."""

    columns: int
    """Width of the input: K of its forward product."""
    rows: int
    """Width of the output: N."""
    counts: dict[Kind, Counts] = field(default_factory=lambda: dict.fromkeys(KINDS, Counts()))
    """Both roundings of an operand, if its two products use different blocks."""
    tokens: Counter[int] = field(default_factory=Counter)
    """The number of products by their number of tokens (M)."""
    name: str = ""
    seed: int = 0
    draws: int = 0
    """Gradients that were rounded stochastically, each with a generator of its own."""

    def noise(self) -> torch.Generator:
        """The generator of the next gradient."""
        self.draws += 1
        return torch.Generator().manual_seed(seed_of(f"stochastic rounding {self.name} {self.draws}", self.seed))

    def signs(self) -> Tensor:
        """The random signs of the Hadamard transform: one vector for all layers and steps."""
        bits = seed_of("hadamard", self.seed)
        return torch.tensor([1.0 if bits >> n & 1 else -1.0 for n in range(HADAMARD)])

    def json(self) -> dict[str, Any]:
        return {
            "k": self.columns,
            "n": self.rows,
            "tokens": {str(tokens): self.tokens[tokens] for tokens in sorted(self.tokens)},
            "counts": {kind: asdict(counts) for kind, counts in self.counts.items()},
        }


Record = dict[tuple[int, str], LinearRecord]
"""Key: the layer, from 0, and the linear's name in it: self_attention.linear_qkv, mlp.experts.linear_fc1, ..."""


def attach(
    chunks: Sequence[GPTModel], recipe: QuantizationRecipe, seed: int = 0, in_bf16: Container[int] = ()
) -> Record:
    """Patches the linear layers of this rank's part of a model to round by the recipe.

    seed: of what is drawn. in_bf16: the layers, from 0, that are left alone. Returns the record, which fills as the
    model runs.
    """
    record: Record = {}
    for gpt in chunks:
        for path, module in gpt.decoder.named_modules():
            if not isinstance(module, LINEARS):
                continue
            match = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
            assert match, path
            key = gpt.decoder.layers[int(match[1])].model_layer, re.sub(r"\.local_experts\.\d+", "", match[2])
            if key[0] in in_bf16:
                continue
            rows, columns = module.weight.shape
            linear = record.setdefault(key, LinearRecord(columns, rows, name=f"{key[0]} {key[1]}", seed=seed))
            module._forward_impl = _product(recipe, module.tp_group, linear)
    return record


def _product(recipe: QuantizationRecipe, group: Any, record: LinearRecord) -> Any:
    """Megatron's `_forward_impl` of a linear layer, with the same collectives around a product of rounded numbers."""

    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        **_: Any,
    ) -> Tensor:
        if sequence_parallel:
            input = tensor_parallel.gather_from_sequence_parallel_region(input, group=group)
        elif allreduce_dgrad:
            input = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=group)
        tokens = input.numel() // input.shape[-1]
        # An expert may get no token, which is no product.
        if tokens:
            record.tokens[tokens] += 1
        out: torch.Tensor = Linear.apply(input, weight, recipe, group, record)
        return out if bias is None else out + bias

    return forward


class Linear(torch.autograd.Function):
    """A product of a linear layer, [..., K] x [N, K] -> [..., N], with the two of its backward pass.

    All three are rounded by the recipe. x and w are of the same type.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, recipe: QuantizationRecipe, group: Any, record: LinearRecord) -> Tensor:
        ctx.shape, ctx.recipe, ctx.group, ctx.record = x.shape, recipe, group, record
        flat = x.reshape(-1, x.shape[-1])
        x_by_k, x_by_m = _quantize_both_ways(flat, "input", ctx)
        w_by_k, w_by_n = _quantize_both_ways(w, "weight", ctx)
        ctx.save_for_backward(x_by_m.values, w_by_n.values)
        ctx.factors = x_by_m.factor, w_by_n.factor
        return multiply(x_by_k.values, w_by_k.values.t(), x_by_k.factor * w_by_k.factor).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        x_factor, w_factor = ctx.factors
        dy_by_n, dy_by_m = _quantize_both_ways(dy.reshape(-1, dy.shape[-1]), "gradient", ctx)
        dx = multiply(dy_by_n.values, w, dy_by_n.factor * w_factor).view(ctx.shape)
        dw = multiply(dy_by_m.values.t(), x, dy_by_m.factor * x_factor)
        return dx, dw, None, None, None


def _quantize_both_ways(x: Tensor, kind: Kind, ctx: Any) -> tuple[Quantized, Quantized]:
    """A matrix rounded for the product that sums over its columns, and for the one that sums over its rows.

    Both are the same if the blocks are. The latter is transformed first where the recipe has it, unless it is a weight.
    """
    recipe: QuantizationRecipe = ctx.recipe

    def rounded(values: Tensor, summed: int) -> Quantized:
        options = {"noise": ctx.record.noise()} if kind == "gradient" and recipe.stochastic_gradients else {}
        result = quantize(values, recipe, kind, summed, ctx.group, **options)
        ctx.record.counts[kind] += result.counts
        return result

    by_columns = rounded(x, 1)
    if recipe.hadamard and kind != "weight":
        transformed = rounded(hadamard(x, ctx.record.signs()), 0)
        return by_columns, replace(transformed, values=transformed.values.to(x.dtype))  # exact
    if recipe.shape(kind, 1) == recipe.shape(kind, 0):
        return by_columns, by_columns
    return by_columns, rounded(x, 0)


def multiply(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """The product a b times a factor, [m, k] x [k, n] -> [m, n], in their type.

    The factor is applied to the sums before they are rounded to that type.
    """
    if factor == 1.0:
        return torch.mm(a, b)
    # It multiplies its sums by alpha. A factor after `mm` would round a second time.
    return torch.addmm(torch.zeros((), dtype=a.dtype, device=a.device), a, b, beta=0, alpha=factor)
