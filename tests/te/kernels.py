"""Compares the stand-ins with second implementations; prints the largest relative difference of each as JSON.

    python -m tests.te hopper tests.te.kernels

Names with "exact" must be equal; with "bf16" the unit is bf16's precision.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

from stages.mcore.fake_quantization import FP8, KINDS, RECIPES, Kind, Linear, Rounding
from tests.fixtures.quantize_fixtures import quantize_dequantize
from tests.te import stand_ins

SHAPES = ((256, 384), (96, 160))
"""Whole blocks of 128, and not."""


def quantizer(recipe: str, kind: Kind):
    """The one that TE's recipe of that name makes for a kind of operand."""
    e4m3, both = DType.kFloat8E4M3, {"rowwise": True, "columnwise": True}
    if recipe == "fp8-tensorwise":
        return Float8CurrentScalingQuantizer(DType.kFloat8E5M2 if kind == "gradient" else e4m3, "cpu", **both)
    if recipe == "fp8-blockwise":
        return Float8BlockQuantizer(e4m3, **both, block_scaling_dim=2 if kind == "weight" else 1)
    return MXFP8Quantizer(e4m3, **both)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Magnitudes over several powers of two, a row of zeros, and a block of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.logspace(-4, 4, shape[1])
    x[3] = 0
    x[32:64, :32] = 0
    return x.bfloat16()


def quantizers() -> Iterator[tuple[str, float]]:
    """TE's tensors hold the numbers that the project's simulation rounds to, in the copies of both directions."""
    for recipe in FP8:
        for kind in KINDS:
            for number, shape in enumerate(SHAPES):
                x = matrix(shape, number)
                quantized = quantizer(recipe, kind)(x)
                both = [
                    difference(
                        stand_ins.values(quantized, rowwise),
                        quantize_dequantize(x.float(), RECIPES[recipe], kind, summed),
                    )
                    for rowwise, summed in ((True, 1), (False, 0))
                ]
                exact = "exact " if recipe != "fp8-tensorwise" else ""  # of which TE keeps the inverse of the scale
                yield f"{exact}{recipe}, {kind}, {shape}", max(both)


def products() -> Iterator[tuple[str, float]]:
    """TE's linear layer, norm and linear layer with a norm, forward and backward, against autograd. A norm's gain is the
    parameter, or one more than it."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(s, generator=generator) for s in ((6, 5, 32), (48, 32), (6, 5, 48)))
    gain = 1 + 0.1 * torch.randn(32, generator=generator)
    words = {"eps": 1e-6, "device": "cpu"}
    norm_linear = functools.partial(te.LayerNormLinear, 32, 48, bias=False, normalization="RMSNorm", **words)

    def norm(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (32,), g, 1e-6)

    def norm_and_product(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return F.linear(norm(x, w, g), w)

    for name, layer, function, less in (
        ("linear", te.Linear(32, 48, bias=False, device="cpu"), lambda x, w, g: F.linear(x, w), 0),
        ("norm", te.RMSNorm(32, **words), norm, 0),
        ("norm and linear", norm_linear(), norm_and_product, 0),
        ("centered norm", te.RMSNorm(32, zero_centered_gamma=True, **words), norm, 1),
        ("centered norm and linear", norm_linear(zero_centered_gamma=True), norm_and_product, 1),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, w, gain)]
        expected = function(*leaves)
        gradient = dy[..., : expected.shape[-1]]
        expected.backward(gradient)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(gain - less if parameter.ndim == 1 else w)
        mine = x.clone().requires_grad_()
        actual = layer(mine)
        actual.backward(gradient)
        yield f"{name}, forward", difference(actual.detach(), expected.detach())
        yield f"{name}, input's gradient", difference(mine.grad, leaves[0].grad)
        for key, parameter in layer.named_parameters():
            yield f"{name}, {key}'s gradient", difference(parameter.grad, leaves[2 if parameter.ndim == 1 else 1].grad)


def rounded_products() -> Iterator[tuple[str, float]]:
    """What TE's layers multiply under each FP8 recipe is what the project's simulation does: the three products of a
    linear layer, and of two experts' layers, in bf16."""
    from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, Format, MXFP8BlockScaling

    recipes = {"fp8-tensorwise": Float8CurrentScaling(fp8_format=Format.HYBRID)}
    if te.is_mxfp8_available():
        recipes["mxfp8"] = MXFP8BlockScaling(fp8_format=Format.E4M3)
    else:
        recipes["fp8-blockwise"] = Float8BlockScaling(fp8_format=Format.E4M3)
    splits, words = [128, 256], {"bias": False, "params_dtype": torch.bfloat16, "device": "cpu"}
    x, dy = matrix((384, 256), 0), matrix((384, 128), 1)
    weights = [matrix((128, 256), seed) for seed in (2, 3)]
    for recipe, te_recipe in recipes.items():
        for name, layer, parts in (
            ("linear", te.Linear(256, 128, **words), [384]),
            ("experts", te.GroupedLinear(2, 256, 128, **words), splits),
        ):
            parameters = list(layer.parameters())
            with torch.no_grad():
                for parameter, weight in zip(parameters, weights, strict=False):
                    parameter.copy_(weight)
            mine = x.clone().requires_grad_()
            with te.autocast(enabled=True, recipe=te_recipe):
                actual = layer(mine, parts) if len(parts) > 1 else layer(mine)
            actual.backward(dy)
            theirs = x.clone().requires_grad_()
            leaves = [w.clone().requires_grad_() for w in weights[: len(parts)]]
            expected = torch.cat([
                Linear.apply(part, w, Rounding(RECIPES[recipe]))
                for part, w in zip(theirs.split(parts), leaves, strict=True)
            ])  # fmt: skip
            expected.backward(dy)
            bf16 = 2.0**-8  # both are rounded to it once, from sums in another order
            yield f"bf16 {recipe}, {name}, forward", difference(actual.detach(), expected.detach()) / bf16
            yield f"bf16 {recipe}, {name}, input's gradient", difference(mine.grad, theirs.grad) / bf16
            gradients = zip(parameters, leaves, strict=True)
            yield (
                f"bf16 {recipe}, {name}, weight's gradient",
                max(difference(p.grad, w.grad) for p, w in gradients) / bf16,
            )


def attention() -> Iterator[tuple[str, float]]:
    """TE's attention of rows of one document, and of documents one after the other, with grouped queries."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 10]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    q, k, v = (torch.randn(16, heads, 8, generator=generator) for heads in (4, 2, 2))
    gradient = torch.randn(16, 32, generator=generator)
    for name, documents in (("attention of a row", [16]), ("attention of documents", lengths)):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        parts = zip(*(t.transpose(0, 1).split(documents, 1) for t in leaves), strict=True)
        expected = torch.cat(
            [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts], 1
        )
        expected.transpose(0, 1).flatten(1).backward(gradient)
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        if len(documents) == 1:
            layer = te.DotProductAttention(4, 8, 2, 0.0, qkv_format="sbhd", attn_mask_type="causal")
            actual = layer(*(t[:, None] for t in inputs))[:, 0]
        else:
            layer = te.DotProductAttention(4, 8, 2, 0.0, qkv_format="thd", attn_mask_type="padding_causal")
            words = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), ends) | dict.fromkeys(
                ("max_seqlen_q", "max_seqlen_kv"), 10
            )
            actual = layer(*inputs, **words)
        actual.backward(gradient)
        yield f"{name}, forward", difference(actual.detach(), expected.detach().transpose(0, 1).flatten(1))
        for letter, a, b in zip("qkv", inputs, leaves, strict=True):
            yield f"{name}, d{letter}", difference(a.grad, b.grad)


def optimizer() -> Iterator[tuple[str, float]]:
    from transformer_engine.pytorch.optimizers import FusedAdam

    weights = [torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    for weight, make in zip(weights, (FusedAdam, torch.optim.AdamW), strict=True):
        adam = make([weight], **settings)
        for step in range(5):
            weight.grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
            adam.step()
    yield "AdamW", difference(weights[0].detach(), weights[1].detach())


def padding() -> Iterator[tuple[str, float]]:
    rows, x = [3, 0, 17], torch.randn(20, 4)
    padded, sizes = te.Fp8Padding(3)(x, rows)
    assert all(size % 16 == 0 for size in sizes) and len(padded) == sum(sizes)
    kept = torch.cat([part[:n] for part, n in zip(padded.split(sizes), rows, strict=True)])
    yield "exact padding", difference(kept, x) + float(padded.abs().sum() - x.abs().sum() > 1e-4)
    yield "exact unpadding", difference(te.Fp8Unpadding(3)(padded, rows), x)


def missing_copy() -> Iterator[tuple[str, float]]:
    """A tensor that was rounded along rows only is no operand of a product that sums over columns."""
    only_rows = quantizer("fp8-blockwise", "input")
    only_rows.set_usage(rowwise=True, columnwise=False)
    try:
        stand_ins.values(only_rows(matrix(SHAPES[0], 0)), rowwise=False)
        yield "exact missing copy", 1.0
    except AssertionError:
        yield "exact missing copy", 0.0


if __name__ == "__main__":
    checks = (quantizers, products, rounded_products, attention, optimizer, padding, missing_copy)
    print(json.dumps({name: value for check in checks for name, value in check()}))
