"""FP4's arithmetic against the second implementation of fp4_fixtures, number by number, and by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from stages.mcore import fake_quantization
from stages.mcore.fake_quantization import E2M1, RECIPES, Kind, Rounding, _round, hadamard, quantize
from stages.train import parallel
from tests.fixtures.fp4_fixtures import TABLE, decode, f32, nearest, scalar, tensor_encode
from tests.fixtures.quantize_fixtures import loss_of, model, spread_out

pytestmark = pytest.mark.numeric

KINDS: tuple[Kind, ...] = ("input", "weight", "gradient")


def test_the_numbers_are_those_of_the_specification() -> None:
    assert TABLE == [0, 0.5, 1, 1.5, 2, 3, 4, 6], "OCP MX 1.0, section 5.3.3: largest 6, least normal 1, subnormal 0.5"
    assert [decode(code) for code in range(8, 16)] == [-x for x in TABLE]
    grid = torch.arange(-9 * 64, 9 * 64 + 1) / 64  # all ties are multiples of a quarter
    assert _round(grid.clone(), E2M1).tolist() == [nearest(x) for x in grid.tolist()]


def test_examples_by_hand() -> None:
    """With the largest value 2688 the tensor has the scale 1, and a block with the largest value 9 the scale 1.5."""
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16], x[0, 17], x[0, 18] = 2688, 9, 3.1, 0.3
    result = quantize(x, RECIPES["nvfp4"], "input")
    assert result.factor == 1.0 and result.values[0, 0] == 2688
    assert result.values[0, 16:19].tolist() == [9, 3, 0]


@pytest.mark.parametrize("summed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_agrees_with_the_table(kind: Kind, summed: int, dtype: torch.dtype) -> None:
    underflow = 0
    for wild, (rows, columns) in ((False, (50, 9)), (True, (5, 67)), (True, (1, 1))):
        x = spread_out(rows, columns, rows, dtype, wild)
        result = quantize(x, RECIPES["nvfp4"], kind, summed)
        assert result.values.dtype == dtype
        assert np.array_equal(result.values.double().numpy(), scalar(x, kind, summed)), "every value, exactly"
        assert result.factor == f32(1) / tensor_encode(float(x.abs().max()))
        underflow += int(((result.values == 0) & (x != 0)).sum())
    assert underflow > 0


def test_stochastic_rounding_is_unbiased_and_repeats() -> None:
    value, copies = torch.tensor([0.1, 0.75, 1.0, 2.7, -5.5, 6.0]), 40_000
    # Blocks of 16 whose scale is 1, as that of the tensor, whose largest value is 6 x 448.
    x = torch.cat([value.repeat(copies, 1), torch.full((copies, 10), 6.0)], 1)
    x = torch.cat([torch.full((1, 16), 2688.0), x])

    def rounded(seed: int) -> torch.Tensor:
        return quantize(x, RECIPES["nvfp4"], "gradient", noise=torch.Generator().manual_seed(seed)).values[1:]

    result = rounded(1)
    for column, number in enumerate(value.tolist()):
        counts = Counter(result[:, column].abs().tolist())
        lower = max(v for v in TABLE if v <= abs(number) + 1e-9 and (v < 6 or abs(number) >= 6))
        upper = min([v for v in TABLE if v > lower], default=lower)
        assert set(counts) <= {lower, upper}
        share = (abs(number) - lower) / (upper - lower) if upper > lower else 0.0
        error = 5 * (share * (1 - share) / copies) ** 0.5  # five standard errors
        assert abs(counts[upper] / copies - share) <= error or upper == lower
        assert math.copysign(1, float(result[0, column])) == math.copysign(1, number)
    again, other = rounded(1), rounded(2)
    assert torch.equal(result, again) and not torch.equal(result, other)


def matrix(signs: torch.Tensor) -> torch.Tensor:
    """diag(signs) H / 4 by the definition of Sylvester's matrix: the parity of the common bits of row and column."""
    h = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(16)] for i in range(16)], dtype=torch.float64)
    return signs.double()[:, None] * h / 4


def test_the_hadamard_transform_is_orthogonal() -> None:
    signs = Rounding(RECIPES["nvfp4"], seed=7).signs()
    assert set(signs.tolist()) == {1.0, -1.0}
    assert torch.equal(signs, Rounding(RECIPES["nvfp4"], name="other", seed=7).signs())
    m = matrix(signs)
    assert torch.equal(m @ m.t(), torch.eye(16, dtype=torch.float64))
    x = torch.randint(-8, 9, (40, 5), generator=torch.Generator().manual_seed(0)).float()
    padded = torch.cat([x, torch.zeros(8, 5)]).double()
    expected = torch.cat([m.t() @ block for block in padded.split(16)])
    assert torch.equal(hadamard(x, signs).double(), expected), "whole numbers: exact"
    y = torch.randint(-8, 9, (40, 3), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(hadamard(x, signs).t() @ hadamard(y, signs), x.t() @ y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_and_its_gradients(dtype: torch.dtype) -> None:
    """y = Q(x) Q(w)^T; dx = SR(dy) Q(w); dw = SR(H dy)^T Q(H x)."""
    recipe, generator = RECIPES["nvfp4"], torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((72, 96), (64, 96), (72, 64)))
    rounding, twin = (Rounding(recipe, name="0 x", seed=5) for _ in range(2))

    def q(t: torch.Tensor, kind: Any, summed: int, noise: Any = None) -> torch.Tensor:
        rounded = quantize(t, recipe, kind, summed, noise=noise)
        return rounded.values.double() * rounded.factor

    def h(t: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([t.double(), torch.zeros(8, t.shape[1], dtype=torch.float64)])
        return torch.cat([matrix(twin.signs()).t() @ block for block in padded.split(16)])

    y_ = q(x, "input", 1) @ q(w, "weight", 1).t()
    dx_ = q(dy, "gradient", 1, twin.noise()) @ q(w, "weight", 0)
    assert (h(x) - hadamard(x, twin.signs()).double()).abs().max() < 1e-5
    transformed = hadamard(dy, twin.signs()), hadamard(x, twin.signs())  # fp32: the same ties as in the layer
    dw_ = q(transformed[0], "gradient", 0, twin.noise()).t() @ q(transformed[1], "input", 0)
    x, w = x.requires_grad_(), w.requires_grad_()
    y = fake_quantization.Linear.apply(x, w, rounding)
    y.backward(dy)
    for mine, theirs in zip((y, x.grad, w.grad), (y_, dx_, dw_), strict=True):
        assert mine is not None and mine.dtype == dtype
        assert (mine.double() - theirs).abs().max() <= theirs.abs().max() * (2e-6 if dtype == torch.float32 else 2**-8)
    assert rounding.draws == 2
    exact = dy.double().t() @ x.detach().double()
    assert 0.02 < float((dw_ - exact).norm() / exact.norm()) < 0.4, "rounding shows, and is no mistake"


def test_the_last_layers_stay_in_bf16_and_seeds_decide_gradients() -> None:
    def gradients(seed: int) -> tuple[float, torch.Tensor, set[int]]:
        gpt = model()
        recipe = RECIPES["nvfp4"]
        roundings = fake_quantization.attach([gpt], recipe, seed, recipe.layers_in_bf16(3))
        loss = loss_of(gpt)
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in gpt.parameters() if p.grad is not None])
        return loss.item(), flat, {layer for layer, _ in roundings}

    with parallel.session(0):
        loss, first, layers = gradients(1)
        assert layers == {0, 1}, "of three layers the last one"
        same, again, _ = gradients(1)
        forward, other, _ = gradients(2)
    assert loss == same == forward and torch.equal(first, again) and not torch.equal(first, other)
    assert [len(RECIPES["nvfp4"].layers_in_bf16(n)) for n in (1, 6, 7, 62)] == [1, 1, 2, 10]
