"""FP8 and FP4 without their hardware: a built model's linear layers multiply numbers that plain PyTorch rounds.

A recipe has, for each operand of a matrix product, its format and the block of values that share a scale:

| recipe         | input, weight, gradient | values that share a scale                                 | scale        |
|----------------|-------------------------|-----------------------------------------------------------|--------------|
| fp8-tensorwise | e4m3, e4m3, e5m2        | the whole tensor                                          | fp32         |
| fp8-blockwise  | e4m3                    | 1 x 128 along the summed dimension; 128 x 128 of a weight | power of two |
| mxfp8          | e4m3                    | 1 x 32 along the summed dimension                         | e8m0         |
| nvfp4          | e2m1                    | 1 x 16 along the summed dimension; 16 x 16 of a weight    | e4m3, fp32   |

Formats: OCP 8-bit Floating Point (2023); mxfp8: OCP MX 1.0 (2023) with Transformer Engine's scale, rounded up so that
nothing overflows; blockwise: DeepSeek-V3 (arXiv:2412.19437) with scales rounded as Transformer Engine rounds them by
default; nvfp4: NVIDIA (arXiv:2509.25149), whose blocks have an e4m3 scale, and the tensor an fp32 one on top.

`attach` changes every linear layer of the decoder (attention, dense feed-forward, experts, shared experts) and nothing
else: embeddings, norms, router, attention's own products, output head, and under FP4 the last layers are unchanged. A
layer's three products are those of FP8 training (Micikevicius et al., 2022, arXiv:2209.05433),

    y = Q(x) Q(w)^T        dx = Q(dy) Q(w)        dw = Q(dy)^T Q(x)

each operand rounded along the dimension that its product sums over, from the unrounded tensor. In FP4, dy is rounded
stochastically, and both operands of dw pass a random Hadamard transform by 16 tokens first. The draws follow from the
seed, the name of the layer and the number of the product, so a run in one process repeats bit by bit. Sums run in fp32
and are rounded once to the model's type, where tensor cores of the Hopper generation keep fewer bits of a sum.

Under tensor parallelism the FP8 recipes round as in one process: a per-tensor scale is that of the whole tensor;
Transformer Engine uses the rank's part of a weight. Blocks agree if cuts are between them. Two things still depend on
the layout, in both: an expert's tokens come from several ranks, and context ranks have a share of a row each, so the
number and the neighbors of the values that are rounded together differ. The draws of FP4 depend on it as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stages.formats.seeds import seed_of
from stages.mcore.latent_attention import WholeLinear
from stages.mcore.megatron_imports import GPTModel, tensor_parallel
from stages.models.base import layers_in_bf16

Kind = Literal["input", "weight", "gradient"]
KINDS: tuple[Kind, ...] = ("input", "weight", "gradient")
"""The operands of a linear layer's three products: the input, the weight, the gradient of the output."""
LINEARS = (tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear, WholeLinear)
FP32_MAX = torch.finfo(torch.float32).max
EXPONENT = 0x7F800000
"""The exponent bits of an fp32 number; without the other bits it is the power of two at or below it."""
HADAMARD = 16
"""Tokens that the Hadamard transform mixes."""


class Format(NamedTuple):
    """A floating-point format: its name, its largest number, and PyTorch's type, whose cast rounds.

    PyTorch has no cast to numbers of 4 bits, whose `dtype` is None.
    """

    name: str
    largest: float
    dtype: torch.dtype | None = None


E4M3 = Format("e4m3", 448.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 57344.0, torch.float8_e5m2)
E2M1 = Format("e2m1", 6.0)


@dataclass(frozen=True)
class QuantizationRecipe:
    """The rounding of the operands of a matrix product.

    forward, backward: the format of inputs and weights, and of gradients. block: the values that share a scale, along
    the summed dimension; None: all of the tensor. square_weights: a weight's blocks are block x block, and therefore
    the same for both of its products.
    """

    forward: Format
    backward: Format
    block: int | None
    square_weights: bool = False
    scale: Literal["fp32", "power of two", "e8m0", "e4m3"] = "fp32"

    @property
    def is_fp4(self) -> bool:
        return self.forward == E2M1

    def format(self, kind: Kind) -> Format:
        return self.backward if kind == "gradient" else self.forward

    def shape(self, kind: Kind, summed: int) -> tuple[int, int] | None:
        """Rows and columns of a block of a matrix whose dimension `summed` (0 or 1) is summed over; None: all of it."""
        if self.block is None:
            return None
        if kind == "weight" and self.square_weights:
            return self.block, self.block
        return (self.block, 1) if summed == 0 else (1, self.block)

    def layers_in_bf16(self, layers: int) -> range:
        """The layers of a model of so many, from 0, whose products are not rounded."""
        return range(layers - (layers_in_bf16("nvfp4", layers) if self.is_fp4 else 0), layers)


RECIPES: Mapping[str, QuantizationRecipe] = MappingProxyType(
    {
        "fp8-tensorwise": QuantizationRecipe(E4M3, E5M2, None),
        "fp8-blockwise": QuantizationRecipe(E4M3, E4M3, 128, square_weights=True, scale="power of two"),
        "mxfp8": QuantizationRecipe(E4M3, E4M3, 32, scale="e8m0"),
        "nvfp4": QuantizationRecipe(E2M1, E2M1, 16, square_weights=True, scale="e4m3"),
    }
)
FP8 = ("fp8-tensorwise", "fp8-blockwise", "mxfp8")


class Quantized(NamedTuple):
    """A matrix of rounded values: `values` times `factor`; the scale of a block is in the values already.

    The factor is separate, because values are then exact in bf16 as in fp32, and a product of such matrices is rounded
    once, as on a tensor core: its scales are applied to the sum.
    """

    values: Tensor
    factor: float = 1.0


def quantize(
    x: Tensor,
    recipe: QuantizationRecipe,
    kind: Kind,
    summed: int = 1,
    group: Any = None,
    noise: torch.Generator | None = None,
) -> Quantized:
    """Rounds a matrix to the format's nearest numbers (ties to even), with a scale for each block.

    The scale brings the block's largest magnitude as near to the format's largest number as the scale's own type
    allows; values beyond that saturate.

    A block of zeros stays as it is. Magnitudes below the format's smallest normal number are rounded to its
    subnormals, and from half the smallest of these downwards (inclusive) to zero. A block whose largest magnitude is
    too small for its scale to be an fp32 number gets the largest one. In a block with an infinity or a NaN: fp32 and
    power-of-two scales are 1, an infinity saturates, a NaN stays; an e8m0 scale of an infinity is the largest (so the
    block's other values vanish), of a NaN it is a NaN, and so is then all of the block. An e4m3 scale that would be
    zero makes its block zero.

    Args:
        x: The matrix, [rows, columns], fp32 or bf16, which is what `values` are as well.
        recipe: The recipe.
        kind: The operand that the matrix is.
        summed: The dimension that the product sums over, along which 1-D blocks lie; where it is no multiple of the
            block, the last block of each line is shorter.
        group: Ranks over which the tensor is cut; one scale for a tensor is then that of all its parts. Blocks are not
            exchanged, so cuts must fall between them for a split product to round as a whole one does.
        noise: Rounds stochastically instead, up or down with probabilities by the distance to either number, drawn
            from this generator in the order of the values.
    """
    if x.numel() == 0:
        return Quantized(torch.empty_like(x))
    format_, (rows, columns) = recipe.format(kind), x.shape
    height, width = recipe.shape(kind, summed) or (rows, columns)
    padding = (0, -columns % width, 0, -rows % height)
    padded = F.pad(x.float(), padding)
    blocks = padded.view(-1, height, padded.shape[1] // width, width)
    largest = blocks.abs().amax((1, 3), keepdim=True)
    shared = None
    if recipe.scale in ("fp32", "e4m3"):
        whole = largest.max()
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group)
        # With scales of blocks, the largest value becomes the largest number times the largest scale of a block.
        limit = format_.largest * (E4M3.largest if recipe.scale == "e4m3" else 1)
        shared = _multiplier(whole, limit, "fp32")
    multiplier, rescale = _scales(largest, shared, format_, recipe.scale)
    y = blocks * multiplier
    if noise is None:
        _round(y, format_)
    else:
        # Draws of the values alone, so that none depends on the padding of blocks; on the host, as the generator is.
        draws = torch.rand(rows, columns, generator=noise).to(x.device)
        _round_stochastically(y, F.pad(draws, padding).view(blocks.shape))
    values = (y * rescale).view(padded.shape)[:rows, :columns].to(x.dtype)
    return Quantized(values, 1.0 if shared is None else float(1 / shared))


def _scales(largest: Tensor, shared: Tensor | None, format_: Format, scale: str) -> tuple[Tensor, Tensor | float]:
    """Returns the factors of each block before and after its rounding.

    `largest` are the largest magnitudes of the blocks. With a `shared` multiplier of the tensor, the values stay
    multiplied by it.
    """
    if shared is None:
        multiplier = _multiplier(largest, format_.largest, scale)
        return multiplier, 1 / multiplier
    if scale == "fp32":
        return shared, 1.0
    # The e4m3 scale of each block, which precedes the tensor's fp32 scale (arXiv:2509.25149, appendix B).
    blocks = _round(largest.div(torch.full_like(largest, format_.largest)).mul_(shared), E4M3)
    multiplier = 1 / (blocks * (1 / shared))
    # The inverse of a scale of zero is infinite, and would turn zeros into NaN.
    multiplier[blocks == 0] = 0.0
    return multiplier.clamp_max_(FP32_MAX), blocks


def _multiplier(largest: Tensor, limit: float, scale: str) -> Tensor:
    """Returns the factor before rounding: the inverse of the scale. `limit` is the format's largest number.

    Powers of two are the largest one with which no value overflows; for e8m0 that is the scale 2^e with e from -127 to
    127, rounded up.
    """
    # A number by a tensor would be the number times a rounded reciprocal.
    multiplier = torch.full_like(largest, limit).div_(largest).clamp_max_(FP32_MAX)
    if scale != "fp32":
        multiplier = (multiplier.view(torch.int32) & EXPONENT).view(torch.float32)
    multiplier[~largest.isfinite() | (largest == 0)] = 1.0
    if scale == "e8m0":
        multiplier[largest.isinf()] = 2.0**-127
        multiplier[largest.isnan()] = math.nan
    return multiplier


def _round(y: Tensor, format_: Format) -> Tensor:
    """Rounds fp32 values in place to the nearest numbers of the format, ties to even; saturates; NaN stays.

    For e2m1, adding 1.5 x 2^23 spacings and taking them off again leaves a whole number of spacings, because that is
    where fp32 itself has no finer ones.
    """
    y.clamp_(-format_.largest, format_.largest)
    if format_.dtype is not None:
        return y.copy_(y.to(format_.dtype))
    shift = _spacing(y).mul_(1.5 * 2.0**23)
    return y.add_(shift).sub_(shift)


def _round_stochastically(y: Tensor, draws: Tensor) -> None:
    """Rounds fp32 values in place to one of the two neighboring numbers of e2m1.

    A value goes up, in magnitude, where the draw from [0, 1) is less than the distance from the lower number in
    spacings. Values beyond the largest saturate; NaN stays.
    """
    y.clamp_(-E2M1.largest, E2M1.largest)
    spacing = _spacing(y)
    size = y.abs().div_(spacing)  # exact: the spacing is a power of two
    lower = size.floor()
    y.copy_((lower + (draws < size - lower)).mul_(spacing).copysign_(y))


def _spacing(y: Tensor) -> Tensor:
    """Returns the distance of the numbers of e2m1 at each value: half the value's power of two, at least 0.5."""
    return (y.view(torch.int32) & EXPONENT).view(torch.float32).clamp_min_(1.0).mul_(0.5)


def hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """A random Hadamard transform along the rows: each 16 rows times diag(signs) H / 4, where H is Sylvester's matrix.

    x: [rows, columns]; missing rows of the last 16 count as zeros. Returns fp32 [rows up to a multiple of 16, columns].
    The transform is orthogonal: a product that sums over the rows of two transformed matrices is that of the matrices.
    """
    matrix, pair = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while len(matrix) < HADAMARD:
        matrix = torch.kron(pair, matrix)
    transform = (signs[:, None] * matrix * HADAMARD**-0.5).t()
    padded = F.pad(x.float(), (0, 0, 0, -x.shape[0] % HADAMARD))
    transformed: Tensor = transform.to(x.device) @ padded.view(-1, HADAMARD, x.shape[1])
    return transformed.view(padded.shape)


@dataclass
class Rounding:
    """The rounding of one linear layer; the experts of a layer share one.

    group: the ranks over which its tensors are cut. name, seed: the draws follow from them. draws: the gradients that
    were rounded stochastically, each with a generator of its own.
    """

    recipe: QuantizationRecipe
    group: Any = None
    name: str = ""
    seed: int = 0
    draws: int = 0

    def noise(self) -> torch.Generator:
        """The generator of the next gradient."""
        self.draws += 1
        return torch.Generator().manual_seed(seed_of(f"stochastic rounding {self.name} {self.draws}", self.seed))

    def signs(self) -> Tensor:
        """The random signs of the Hadamard transform: one vector for all layers and steps."""
        bits = seed_of("hadamard", self.seed)
        return torch.tensor([1.0 if bits >> n & 1 else -1.0 for n in range(HADAMARD)])

    def both_ways(self, x: Tensor, kind: Kind) -> tuple[Quantized, Quantized]:
        """A matrix rounded for the product that sums over its columns, and for the one that sums over its rows.

        Both are the same if the blocks are. In FP4 the latter is transformed first, unless it is a weight.
        """
        recipe = self.recipe

        def rounded(values: Tensor, summed: int) -> Quantized:
            noise = self.noise() if kind == "gradient" and recipe.is_fp4 else None
            return quantize(values, recipe, kind, summed, self.group, noise)

        by_columns = rounded(x, 1)
        if recipe.is_fp4 and kind != "weight":
            transformed = rounded(hadamard(x, self.signs()), 0)
            return by_columns, transformed._replace(values=transformed.values.to(x.dtype))  # exact
        same = recipe.shape(kind, 1) == recipe.shape(kind, 0)
        return by_columns, by_columns if same else rounded(x, 0)


def attach(
    chunks: Sequence[GPTModel], recipe: QuantizationRecipe, seed: int = 0, in_bf16: Container[int] = ()
) -> dict[tuple[int, str], Rounding]:
    """Patches the linear layers of this rank's part of a model to round by the recipe.

    seed: of what is drawn. in_bf16: the layers, from 0, that are left alone. Returns the roundings by layer, from 0,
    and the linear's name in it: self_attention.linear_qkv, mlp.experts.linear_fc1, ...
    """
    roundings: dict[tuple[int, str], Rounding] = {}
    for gpt in chunks:
        for path, module in gpt.decoder.named_modules():
            if not isinstance(module, LINEARS):
                continue
            match = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
            assert match, path
            key = gpt.decoder.layers[int(match[1])].model_layer, re.sub(r"\.local_experts\.\d+", "", match[2])
            if key[0] not in in_bf16:
                rounding = Rounding(recipe, module.tp_group, f"{key[0]} {key[1]}", seed)
                module._forward_impl = _product(roundings.setdefault(key, rounding))
    return roundings


def _product(rounding: Rounding) -> Any:
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
            input = tensor_parallel.gather_from_sequence_parallel_region(input, group=rounding.group)
        elif allreduce_dgrad:
            input = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=rounding.group)
        out: torch.Tensor = Linear.apply(input, weight, rounding)
        return out if bias is None else out + bias

    return forward


class Linear(torch.autograd.Function):
    """A product of a linear layer, [..., K] x [N, K] -> [..., N], with the two of its backward pass.

    All three are rounded. x and w are of the same type.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, rounding: Rounding) -> Tensor:
        ctx.shape, ctx.rounding = x.shape, rounding
        x_by_k, x_by_m = rounding.both_ways(x.reshape(-1, x.shape[-1]), "input")
        w_by_k, w_by_n = rounding.both_ways(w, "weight")
        ctx.save_for_backward(x_by_m.values, w_by_n.values)
        ctx.factors = x_by_m.factor, w_by_n.factor
        return multiply(x_by_k.values, w_by_k.values.t(), x_by_k.factor * w_by_k.factor).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        x_factor, w_factor = ctx.factors
        dy_by_n, dy_by_m = ctx.rounding.both_ways(dy.reshape(-1, dy.shape[-1]), "gradient")
        dx = multiply(dy_by_n.values, w, dy_by_n.factor * w_factor).view(ctx.shape)
        dw = multiply(dy_by_m.values.t(), x, dy_by_m.factor * x_factor)
        return dx, dw, None


def multiply(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """The product a b times a factor, [m, k] x [k, n] -> [m, n], in their type.

    The factor is applied to the sums before they are rounded to that type.
    """
    if factor == 1.0:
        return torch.mm(a, b)
    # It multiplies its sums by alpha. A factor after `mm` would round a second time.
    return torch.addmm(torch.zeros((), dtype=a.dtype, device=a.device), a, b, beta=0, alpha=factor)
