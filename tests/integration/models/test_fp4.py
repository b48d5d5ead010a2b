"""FP4's arithmetic against the second implementation of fp4_fixtures, number by number, and by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from stages.mcore import fake_quantization
from stages.mcore.fake_quantization import LinearRecord
from stages.mcore.quantize import E2M1, FP4, RECIPES, Kind, _round, hadamard, quantize
from stages.train import parallel
from tests.fixtures.fp4_fixtures import TABLE, decode, f32, nearest, scalar, tensor_encode
from tests.fixtures.quantize_fixtures import loss_of, model, quantize_dequantize, spread_out

pytestmark = pytest.mark.numeric

KINDS: tuple[Kind, ...] = ("input", "weight", "gradient")


def test_the_numbers_are_those_of_the_specification() -> None:
    assert TABLE == [0, 0.5, 1, 1.5, 2, 3, 4, 6], "OCP MX 1.0, section 5.3.3: largest 6, least normal 1, subnormal 0.5"
    assert [decode(code) for code in range(8, 16)] == [-x for x in TABLE]
    grid = torch.arange(-9 * 64, 9 * 64 + 1) / 64  # all ties are multiples of a quarter
    assert _round(grid.clone(), E2M1).tolist() == [nearest(x) for x in grid.tolist()]
    assert E2M1.overflow == 7


def test_examples_by_hand() -> None:
    """A block of MXFP4 whose largest value is 7 has the scale 1 and saturates; one with 8 has the scale 2. NVFP4 with
    the largest value 2688 has the tensor scale 1, and a block with the largest value 9 the scale 1.5."""
    x = torch.zeros(1, 64)
    x[0, :4] = torch.tensor([7.0, 0.7, 0.2, -2.5])
    x[0, 32:35] = torch.tensor([8.0, 1.0, 0.4])
    result = quantize(x, RECIPES["mxfp4"], "input")
    assert result.values[0, :4].tolist() == [6, 0.5, 0, -2] and result.values[0, 32:35].tolist() == [8, 1, 0]
    assert result.counts.overflow == 1 and result.counts.underflow == 2
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16], x[0, 17], x[0, 18] = 2688, 9, 3.1, 0.3
    result = quantize(x, RECIPES["nvfp4"], "input")
    assert result.factor == 1.0 and result.values[0, 0] == 2688
    assert result.values[0, 16:19].tolist() == [9, 3, 0]


CASES = [(recipe, kind, summed) for recipe in FP4 for kind in KINDS for summed in (0, 1)]


@pytest.mark.parametrize(("recipe", "kind", "summed"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_agrees_with_the_table(recipe: str, kind: Kind, summed: int, dtype: torch.dtype) -> None:
    underflow = 0
    for wild, (rows, columns) in ((False, (50, 9)), (True, (5, 67)), (True, (1, 1))):
        x = spread_out(rows, columns, rows, dtype, wild)
        result = quantize(x, RECIPES[recipe], kind, summed)
        assert result.values.dtype == dtype
        assert np.array_equal(result.values.double().numpy(), scalar(x, recipe, kind, summed)), "every value, exactly"
        assert result.factor == (1.0 if recipe == "mxfp4" else f32(1) / tensor_encode(float(x.abs().max())))
        underflow += result.counts.underflow
    assert underflow > 0


def test_what_is_rounded_stays_as_it_is() -> None:
    """A weight of MXFP4 has one representation, so a second rounding changes no bit."""
    x = spread_out(64, 96, 1, torch.float32, wild=False)
    first = quantize_dequantize(x, RECIPES["mxfp4"], "weight")[0]
    assert torch.equal(quantize_dequantize(first, RECIPES["mxfp4"], "weight")[0], first)
    assert torch.equal(first.bfloat16().float(), first), "exact in bf16"


def test_stochastic_rounding_is_unbiased_and_repeats() -> None:
    value, copies = torch.tensor([0.1, 0.75, 1.0, 2.7, -5.5, 6.0]), 40_000
    x = value.repeat(copies, 1).repeat_interleave(32, 1)[:, ::32].contiguous()
    x = torch.cat([x, torch.full((copies, 26), 4.0)], 1)  # a block whose scale is 1
    result = quantize(x, RECIPES["mxfp4"], "gradient", noise=torch.Generator().manual_seed(1)).values
    for column, number in enumerate(value.tolist()):
        counts = Counter(result[:, column].abs().tolist())
        lower = max(v for v in TABLE if v <= abs(number) + 1e-9 and (v < 6 or abs(number) >= 6))
        upper = min([v for v in TABLE if v > lower], default=lower)
        assert set(counts) <= {lower, upper}
        share = (abs(number) - lower) / (upper - lower) if upper > lower else 0.0
        error = 5 * (share * (1 - share) / copies) ** 0.5  # five standard errors
        assert abs(counts[upper] / copies - share) <= error or upper == lower
        assert math.copysign(1, float(result[0, column])) == math.copysign(1, number)
    again = quantize(x, RECIPES["mxfp4"], "gradient", noise=torch.Generator().manual_seed(1)).values
    other = quantize(x, RECIPES["mxfp4"], "gradient", noise=torch.Generator().manual_seed(2)).values
    assert torch.equal(result, again) and not torch.equal(result, other)


def test_slabs_change_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    x = spread_out(300, 70, 6, torch.float32, wild=False)
    cases = [(name, summed) for name in FP4 for summed in (0, 1)]

    def rounded(name: str, summed: int) -> torch.Tensor:
        return quantize(x, RECIPES[name], "gradient", summed, noise=torch.Generator().manual_seed(3)).values

    whole = {case: rounded(*case) for case in cases}
    monkeypatch.setattr("stages.mcore.quantize.SLAB", 1000)
    assert all(torch.equal(rounded(*case), whole[case]) for case in cases)


def matrix(signs: torch.Tensor) -> torch.Tensor:
    """diag(signs) H / 4 by the definition of Sylvester's matrix: the parity of the common bits of row and column."""
    h = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(16)] for i in range(16)], dtype=torch.float64)
    return signs.double()[:, None] * h / 4


def test_the_hadamard_transform_is_orthogonal() -> None:
    signs = LinearRecord(1, 1, seed=7).signs()
    assert set(signs.tolist()) == {1.0, -1.0} and torch.equal(signs, LinearRecord(9, 9, name="other", seed=7).signs())
    m = matrix(signs)
    assert torch.equal(m @ m.t(), torch.eye(16, dtype=torch.float64))
    x = torch.randint(-8, 9, (40, 5), generator=torch.Generator().manual_seed(0)).float()
    padded = torch.cat([x, torch.zeros(8, 5)]).double()
    expected = torch.cat([m.t() @ block for block in padded.split(16)])
    assert torch.equal(hadamard(x, signs).double(), expected), "whole numbers: exact"
    y = torch.randint(-8, 9, (40, 3), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(hadamard(x, signs).t() @ hadamard(y, signs), x.t() @ y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FP4)
def test_a_layer_and_its_gradients(name: str, dtype: torch.dtype) -> None:
    """y = Q(x) Q(w)^T; dx = SR(dy) Q(w); dw = SR(H dy)^T Q(H x)."""
    recipe, generator = RECIPES[name], torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((72, 96), (64, 96), (72, 64)))
    record, twin = (LinearRecord(96, 64, name="0 x", seed=5) for _ in range(2))

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
    y = fake_quantization.Linear.apply(x, w, recipe, None, record)
    y.backward(dy)
    for mine, theirs in zip((y, x.grad, w.grad), (y_, dx_, dw_), strict=True):
        assert mine is not None and mine.dtype == dtype
        assert (mine.double() - theirs).abs().max() <= theirs.abs().max() * (2e-6 if dtype == torch.float32 else 2**-8)
    assert record.draws == 2
    exact = dy.double().t() @ x.detach().double()
    assert 0.02 < float((dw_ - exact).norm() / exact.norm()) < 0.4, "rounding shows, and is no mistake"


def test_the_last_layers_stay_in_bf16_and_seeds_decide_gradients() -> None:
    def gradients(seed: int) -> tuple[float, torch.Tensor, set[int]]:
        gpt = model()
        recipe = RECIPES["nvfp4"]
        record = fake_quantization.attach([gpt], recipe, seed, recipe.layers_in_bf16(3))
        loss = loss_of(gpt)
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in gpt.parameters() if p.grad is not None])
        return loss.item(), flat, {layer for layer, _ in record}

    with parallel.session(0):
        loss, first, layers = gradients(1)
        assert layers == {0, 1}, "of three layers the last one"
        same, again, _ = gradients(1)
        forward, other, _ = gradients(2)
    assert loss == same == forward and torch.equal(first, again) and not torch.equal(first, other)
    assert [len(RECIPES["nvfp4"].layers_in_bf16(n)) for n in (1, 6, 7, 62)] == [1, 1, 2, 10]
