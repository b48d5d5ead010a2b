"""FP8 and FP4 quantization in plain PyTorch: rounds to a format's numbers and back, block by block.

A recipe has, for each operand of a matrix product, its format and the block of values that share a scale:

| recipe         | input, weight, gradient | values that share a scale                                 | scale        |
|----------------|-------------------------|-----------------------------------------------------------|--------------|
| fp8-tensorwise | e4m3, e4m3, e5m2        | the whole tensor                                          | fp32         |
| fp8-blockwise  | e4m3                    | 1 x 128 along the summed dimension; 128 x 128 of a weight | power of two |
| mxfp8          | e4m3                    | 1 x 32 along the summed dimension                         | e8m0         |
| nvfp4          | e2m1                    | 1 x 16 along the summed dimension; 16 x 16 of a weight    | e4m3, fp32   |
| mxfp4          | e2m1                    | 1 x 32 along the summed dimension                         | e8m0         |

Formats: OCP 8-bit Floating Point (2023); Microscaling: OCP MX 1.0 (2023); blockwise: DeepSeek-V3 (arXiv:2412.19437)
with scales rounded as Transformer Engine rounds them by default; nvfp4: NVIDIA (arXiv:2509.25149), whose blocks have an
e4m3 scale, and the tensor an fp32 one on top. mxfp8 has Transformer Engine's scale, rounded up so that nothing
overflows; mxfp4 that of OCP MX 1.0, section 6.3, rounded down, so that the largest of a block may saturate.

The recipes of FP4 have three further parts of the NVFP4 paper: gradients are rounded stochastically, both operands of a
weight's gradient pass a random Hadamard transform by 16 tokens, and the last layers stay in bf16. No Megatron here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stages.models.base import layers_in_bf16

Kind = Literal["input", "weight", "gradient"]
KINDS: tuple[Kind, ...] = ("input", "weight", "gradient")
"""The operands of a linear layer's three products: the input, the weight, the gradient of the output."""

FP32_MAX = torch.finfo(torch.float32).max
EXPONENT = 0x7F800000
"""The exponent bits of an fp32 number; without the other bits it is the power of two at or below it."""


@dataclass(frozen=True)
class Format:
    """A floating-point format of 8 or 4 bits."""

    name: str
    largest: float
    overflow: float
    """Magnitudes from here on are nearer to the next number above the largest, which the format does not have."""
    dtype: torch.dtype | None = None
    """PyTorch's type, whose cast rounds; None: numbers of 4 bits, for which it has no cast."""


E4M3 = Format("e4m3", 448.0, 464.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 57344.0, 61440.0, torch.float8_e5m2)
E2M1 = Format("e2m1", 6.0, 7.0)

HADAMARD = 16
"""Tokens that a Hadamard transform mixes, in every recipe that has one."""


@dataclass(frozen=True)
class QuantizationRecipe:
    """The rounding of the operands of a matrix product."""

    forward: Format
    """The format of inputs and weights."""
    backward: Format
    """The format of gradients."""
    block: int | None
    """Values that share a scale, along the summed dimension; None: all of the tensor."""
    square_weights: bool = False
    """True if a weight's blocks are block x block, and therefore the same for both of its products."""
    scale: Literal["fp32", "power of two", "e8m0", "e8m0, rounded down", "e4m3"] = "fp32"
    stochastic_gradients: bool = False
    """True if gradients are rounded up or down at random, so that their expectation is the value."""
    hadamard: bool = False
    """True if both operands of a weight's gradient are transformed."""

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
        return range(layers - (layers_in_bf16("nvfp4", layers) if self.forward == E2M1 else 0), layers)

    @property
    def smallest_dimension(self) -> int:
        """The minimum of every dimension of a product for its blocks to act as in a large model: two blocks.

        Where scales know no blocks, two times 16, the unit that FP8 tensor cores demand.
        """
        return 2 * (self.block or 16)


RECIPES: Mapping[str, QuantizationRecipe] = MappingProxyType(
    {
        "fp8-tensorwise": QuantizationRecipe(E4M3, E5M2, None),
        "fp8-blockwise": QuantizationRecipe(E4M3, E4M3, 128, square_weights=True, scale="power of two"),
        "mxfp8": QuantizationRecipe(E4M3, E4M3, 32, scale="e8m0"),
        "nvfp4": QuantizationRecipe(
            E2M1, E2M1, 16, square_weights=True, scale="e4m3", stochastic_gradients=True, hadamard=True
        ),
        "mxfp4": QuantizationRecipe(
            E2M1, E2M1, 32, scale="e8m0, rounded down", stochastic_gradients=True, hadamard=True
        ),
    }
)
FP8 = ("fp8-tensorwise", "fp8-blockwise", "mxfp8")
FP4 = ("nvfp4", "mxfp4")


@dataclass(frozen=True)
class Counts:
    """Counts of the effects of rounding on the values of one or more tensors."""

    values: int = 0
    nonzero: int = 0
    underflow: int = 0
    """Nonzero values that became zero."""
    overflow: int = 0
    """Values that were clipped to the largest number, and infinite or NaN values."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.values + other.values,
            self.nonzero + other.nonzero,
            self.underflow + other.underflow,
            self.overflow + other.overflow,
        )


@dataclass(frozen=True)
class Quantized:
    """A matrix of rounded values: `values` times `factor`; the scale of a block is in the values already.

    The factor is separate, because values are then exact in bf16 as in fp32, and a product of such matrices is rounded
    once, as on a tensor core: its scales are applied to the sum.
    """

    values: Tensor
    factor: float
    counts: Counts


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

    x: [rows, columns], fp32 or bf16, which is what `values` are as well. summed: the dimension that the product sums
    over, along which 1-D blocks lie; where it is no multiple of the block, the last block of each line is shorter.
    group: ranks over which the tensor is cut; one scale for a tensor is then that of all its parts. Blocks are not
    exchanged, so cuts must fall between them for a split product to round as a whole one does. noise: rounds
    stochastically instead, up or down with probabilities by the distance to either number, drawn from this generator in
    the order of the values.

    A block of zeros stays as it is. Magnitudes below the format's smallest normal number are rounded to its
    subnormals, and from half the smallest of these downwards (inclusive) to zero. A block whose largest magnitude is
    too small for its scale to be an fp32 number gets the largest one. In a block with an infinity or a NaN: fp32 and
    power-of-two scales are 1, an infinity saturates, a NaN stays; an e8m0 scale of an infinity is the largest (so the
    block's other values vanish), of a NaN it is a NaN, and so is then all of the block. An e4m3 scale that would be
    zero makes its block zero.
    """
    format_, shape = recipe.format(kind), recipe.shape(kind, summed)
    values, counts, factor = torch.empty_like(x), Counts(), 1.0
    if x.numel() == 0:
        return Quantized(values, factor, counts)
    shared = None
    if shape is None:
        shared = _multiplier(_max_magnitude(x, group), format_.largest, "fp32")
        factor = float(1 / shared)
    elif recipe.scale == "e4m3":
        # The largest value becomes the format's largest number times the largest scale of a block.
        shared = _multiplier(_max_magnitude(x, group), format_.largest * E4M3.largest, "fp32")
        factor = float(1 / shared)
    height, width = shape or (1, x.shape[1])
    for rounded, part in zip(_slabs(values, height), _slabs(x, height), strict=True):
        counts += _quantize(part, rounded, format_, height, width, shared, recipe.scale, noise)
    return Quantized(values, factor, counts)


SLAB = 2**17
"""Values that are rounded together: the dozen passes over them should stay in the processor's cache."""


def _slabs(x: Tensor, height: int) -> tuple[Tensor, ...]:
    """The rows of a matrix by about SLAB values, cut between blocks."""
    slabs: tuple[Tensor, ...] = x.split(max(1, SLAB // x.shape[1] // height) * height)
    return slabs


def _max_magnitude(x: Tensor, group: Any) -> Tensor:
    """The largest magnitude of a tensor and of its parts on the group's other ranks: an fp32 scalar."""
    low, high = torch.aminmax(x)
    largest = torch.maximum(-low, high).float()
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def _quantize(
    x: Tensor,
    out: Tensor,
    format_: Format,
    height: int,
    width: int,
    shared: Tensor | None,
    scale: str,
    noise: torch.Generator | None,
) -> Counts:
    """Fills `out` with the rounded values of x, [rows, columns], in blocks of height x width.

    Each block is scaled by itself. With a `shared` multiplier, the values stay multiplied by it.
    """
    rows, columns = x.shape
    padding = (0, -columns % width, 0, -rows % height)
    padded = F.pad(x, padding) if any(padding) else x
    blocks = (-1, height, padded.shape[1] // width, width)
    # A copy, as it is rounded in place below.
    y = padded.reshape(blocks).to(torch.float32, copy=True)
    largest = y.abs().amax((1, 3), keepdim=True)
    block_scale = None
    if scale == "e4m3":
        assert shared is not None
        block_scale = _block_scale(largest, shared, format_)
        multiplier = 1 / (block_scale * (1 / shared))
        # The inverse of a scale of zero is infinite, and would turn zeros into NaN.
        multiplier[block_scale == 0] = 0.0
        multiplier.clamp_max_(FP32_MAX)
    else:
        multiplier = _multiplier(largest, format_.largest, scale) if shared is None else shared
    nonzero = int(torch.count_nonzero(y))
    y.mul_(multiplier)
    # The blocks' largest magnitudes tell if any value is clipped. Mostly none is, which saves a pass over all.
    clips = not bool((largest * multiplier < format_.overflow).all())
    overflow = int((~(y.abs() < format_.overflow)).sum()) if clips else 0
    if noise is None:
        _round(y, format_)
    else:
        # Draws of the values alone, so that none depends on the padding of blocks.
        draws = torch.rand(rows, columns, generator=noise, device=x.device)
        _round_stochastically(y, (F.pad(draws, padding) if any(padding) else draws).reshape(blocks))
    counts = Counts(x.numel(), nonzero, nonzero - int(torch.count_nonzero(y)), overflow)
    if block_scale is not None:
        y.mul_(block_scale)
    elif shared is None:
        y.mul_(1 / multiplier)
    out.copy_(y.view(padded.shape)[:rows, :columns])
    return counts


def _multiplier(largest: Tensor, limit: float, scale: str) -> Tensor:
    """The factor of each block before rounding: the inverse of its scale. limit: the format's largest number.

    Powers of two are the largest one with which no value overflows; for e8m0 that is the scale 2^e with e from -127 to
    127, rounded up. Rounded down, 2^e is the largest power of two in the block by the largest one in the format.
    """
    if scale == "e8m0, rounded down":
        power = (largest.view(torch.int32) & EXPONENT).view(torch.float32)  # 0 of a subnormal
        multiplier = torch.full_like(largest, 2.0 ** (math.frexp(limit)[1] - 1)).div_(power).clamp_max_(2.0**127)
    else:
        # a number by a tensor would be the number times a rounded reciprocal
        multiplier = torch.full_like(largest, limit).div_(largest).clamp_max_(FP32_MAX)
        if scale != "fp32":
            multiplier = (multiplier.view(torch.int32) & EXPONENT).view(torch.float32)
    multiplier[~largest.isfinite() | (largest == 0)] = 1.0
    if scale.startswith("e8m0"):
        multiplier[largest.isinf()] = 2.0**-127
        multiplier[largest.isnan()] = math.nan
    return multiplier


def _block_scale(largest: Tensor, shared: Tensor, format_: Format) -> Tensor:
    """The e4m3 scale of each block of nvfp4.

    The block's rounded numbers are multiplied by it before the tensor's fp32 scale (arXiv:2509.25149, appendix B).
    `shared` is the inverse of the tensor's scale.
    """
    scale = largest.div(torch.full_like(largest, format_.largest)).mul_(shared)
    return _round(scale, E4M3)


def _round_stochastically(y: Tensor, draws: Tensor) -> Tensor:
    """Rounds fp32 values in place to one of the two neighboring numbers of e2m1.

    A value goes up, in magnitude, where the draw from [0, 1) is less than the distance from the lower number in
    spacings. Values beyond the largest saturate; NaN stays.
    """
    y.clamp_(-E2M1.largest, E2M1.largest)
    spacing = _spacing(y)
    size = y.abs().div_(spacing)  # exact: the spacing is a power of two
    lower = size.floor()
    return y.copy_((lower + (draws < size - lower)).mul_(spacing).copysign_(y))


def hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """A random Hadamard transform along the rows: each 16 rows times diag(signs) H / 4, where H is Sylvester's matrix.

    x: [rows, columns]; missing rows of the last 16 count as zeros. Returns fp32 [rows up to a multiple of 16, columns].
    The transform is orthogonal: a product that sums over the rows of two transformed matrices is that of the matrices.
    """
    padded = F.pad(x.float(), (0, 0, 0, -x.shape[0] % HADAMARD))
    y = padded.view(-1, HADAMARD, x.shape[1]) * signs[:, None]
    width = 1
    while width < HADAMARD:  # butterflies: the same sums in the same order on every machine
        pairs = y.view(-1, HADAMARD // (2 * width), 2, width, x.shape[1])
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
        width *= 2
    return y.reshape(padded.shape).mul_(HADAMARD**-0.5)


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


def _spacing(y: Tensor) -> Tensor:
    """Returns the distance of the numbers of e2m1 at each value: half the value's power of two, at least 0.5."""
    return (y.view(torch.int32) & EXPONENT).view(torch.float32).clamp_min_(1.0).mul_(0.5)
