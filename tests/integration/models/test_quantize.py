"""FP8's arithmetic against a second implementation, number by number, that knows neither torch's casts nor our scales.

The second one reckons with fractions: it looks for the nearest multiple of the spacing at a number's power of two, and
for the largest power of two that keeps a block within the format.
"""

from __future__ import annotations

import math
import random
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.mcore.fake_quantization import E4M3, E5M2, FP8, RECIPES, Format, _round, multiply, quantize
from tests.fixtures.quantize_fixtures import quantize_dequantize, spread_out

pytestmark = pytest.mark.numeric

FORMATS = {"e4m3": (3, -6, 448), "e5m2": (2, -14, 57344)}  # mantissa bits, least normal exponent, largest
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
EXPECTED = {  # format of input, weight and gradient; block along the summed dimension; block of a weight across it
    "fp8-tensorwise": ({"input": "e4m3", "weight": "e4m3", "gradient": "e5m2"}, None, None),
    "fp8-blockwise": (dict.fromkeys(("input", "weight", "gradient"), "e4m3"), 128, 128),
    "mxfp8": (dict.fromkeys(("input", "weight", "gradient"), "e4m3"), 32, 1),
}
Number = Fraction | float


def nearest(x: Fraction, name: str) -> Fraction:
    """The number of the format nearest to x, ties to even, saturating."""
    mantissa, least, largest = FORMATS[name]
    if x == 0:
        return x
    exponent = max(math.frexp(float(abs(x)))[1] - 1, least)
    spacing = Fraction(2) ** (exponent - mantissa)
    multiple = round(abs(x) / spacing)  # Python rounds fractions to even
    return min(multiple * spacing, Fraction(largest)) * (1 if x > 0 else -1)


def fp32(x: Number) -> Fraction:
    """x rounded to fp32; the largest number where that would be infinite."""
    try:
        return Fraction(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        return Fraction(struct.unpack("<f", b"\xff\xff\x7f\x7f")[0])


def power_of_two(largest: Fraction, limit: int) -> Fraction:
    """The largest one, up to 2^127, that keeps `largest` within the limit."""
    exponent = 127
    while largest * Fraction(2) ** exponent > limit:
        exponent -= 1
    return Fraction(2) ** exponent


def scalar(x: torch.Tensor, recipe: str, kind: str, summed: int) -> list[list[Fraction]]:
    """The matrix that the product sees."""
    formats, along, across = EXPECTED[recipe]
    name, (rows, columns) = formats[kind], x.shape
    limit = FORMATS[name][2]
    if along is None:
        height, width = rows, columns
    else:
        other = across if kind == "weight" else 1
        height, width = (along, other) if summed == 0 else (other, along)
    exact = [[Fraction(v) for v in row] for row in x.tolist()]
    out = [[Fraction(0)] * columns for _ in range(rows)]
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            cells = [
                (r, c) for r in range(top, min(top + height, rows)) for c in range(left, min(left + width, columns))
            ]
            largest = max(abs(exact[r][c]) for r, c in cells)
            if largest == 0:
                continue
            multiplier = fp32(float(limit) / float(largest)) if along is None else power_of_two(largest, limit)
            for r, c in cells:
                value = nearest(fp32(float(exact[r][c]) * float(multiplier)), name)
                out[r][c] = value * fp32(1 / float(multiplier))
    return out


CASES = [(recipe, kind, summed) for recipe in FP8 for kind in ("input", "weight", "gradient") for summed in (0, 1)]


@pytest.mark.parametrize(("recipe", "kind", "summed"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_agrees_with_the_scalar_implementation(recipe: str, kind: str, summed: int, dtype: torch.dtype) -> None:
    underflows = 0
    for wild, (rows, columns) in ((False, (130, 9)), (True, (5, 131)), (True, (1, 1))):
        x = spread_out(rows, columns, rows, dtype, wild)
        expected = scalar(x, recipe, kind, summed)
        result = quantize(x, RECIPES[recipe], kind, summed)
        assert result.values.dtype == dtype
        factor = Fraction(result.factor)
        exact = [[Fraction(v) * factor for v in row] for row in result.values.tolist()]
        assert exact == expected, "every value, exactly"
        underflows += int(((result.values == 0) & (x != 0)).sum())
    assert underflows > 0, "there must have been something to lose"


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    rows=st.lists(st.lists(numbers, min_size=40, max_size=40), min_size=1, max_size=3),
    case=st.sampled_from(CASES),
)
@settings(max_examples=40, deadline=None)
def test_agrees_with_the_scalar_implementation_on_any_numbers(rows: list, case: tuple) -> None:
    x = torch.tensor(rows, dtype=torch.float32)
    recipe, kind, summed = case
    expected = scalar(x, recipe, kind, summed)
    result = quantize(x, RECIPES[recipe], kind, summed)
    values = result.values.tolist()
    if not any(math.isinf(v) for row in values for v in row):  # rounding upwards may leave fp32 at its very end
        assert [[Fraction(v) * Fraction(result.factor) for v in row] for row in values] == expected


@pytest.mark.parametrize("format_", [E4M3, E5M2], ids=lambda f: f.name)
def test_rounds_every_bf16_number_as_the_scalar_does(format_: Format) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    result = _round(x.clone(), format_)
    assert torch.equal(result.isnan(), x.isnan())
    for value, rounded in random.Random(0).sample(list(zip(x.tolist(), result.tolist(), strict=True)), 3000):
        if math.isfinite(value):
            assert Fraction(rounded) == nearest(Fraction(value), format_.name)


@pytest.mark.parametrize("format_", [E4M3, E5M2], ids=lambda f: f.name)
def test_ties_go_to_even_and_ends_saturate(format_: Format) -> None:
    mantissa, least, largest = FORMATS[format_.name]
    unit = 2.0**-mantissa
    subnormal = 2.0 ** (least - mantissa)
    pairs = [
        (1 + unit / 2, 1.0), (1 + 1.5 * unit, 1 + 2 * unit), (-(1 + unit / 2), -1.0),
        (subnormal / 2, 0.0), (1.5 * subnormal, 2 * subnormal), (0.51 * subnormal, subnormal),
        (largest * 1.01, largest), (math.inf, largest), (-math.inf, -largest),
    ]  # fmt: skip
    inputs, expected = (torch.tensor(list(x)) for x in zip(*pairs, strict=True))
    assert _round(inputs, format_).tolist() == expected.tolist()


def test_whatever_is_not_finite_never_hides() -> None:
    for name, recipe in RECIPES.items():
        x = torch.ones(2, 256)
        x[0, 3] = math.inf
        x[1, 200] = math.nan
        values = quantize_dequantize(x, recipe, "input")
        assert not values[1, 200].isfinite() and values[0, 3] >= 448, name
    # one block of the two holds the infinity; e8m0's largest scale leaves nothing of its neighbors
    x = torch.ones(1, 64)
    x[0, 0] = math.inf
    values = quantize_dequantize(x, RECIPES["mxfp8"], "input")
    assert values[0, 1:].tolist() == [0.0] * 31 + [1.0] * 32


@pytest.mark.parametrize("recipe", ["fp8-blockwise", "mxfp8"])
def test_a_cut_between_blocks_changes_nothing(recipe: str) -> None:
    x = spread_out(256, 256, 5, torch.float32)
    for kind in ("input", "weight", "gradient"):
        for summed in (0, 1):
            uncut = quantize_dequantize(x, RECIPES[recipe], kind, summed)
            for dimension in (0, 1):
                parts = [quantize_dequantize(p, RECIPES[recipe], kind, summed) for p in x.chunk(2, dimension)]
                assert torch.equal(torch.cat(parts, dimension), uncut)


def _hardware_product(out: torch.dtype) -> None:
    torch._scaled_mm(torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 16).to(torch.float8_e4m3fn).t(),
                     scale_a=torch.tensor(1.0), scale_b=torch.tensor(1.0), out_dtype=out)  # fmt: skip


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("left", "right"), [("input", "weight"), ("gradient", "weight")])
def test_a_product_is_that_of_scaled_mm(left: str, right: str, out: torch.dtype) -> None:
    """PyTorch's own product of FP8 tensors with one scale each, where this build has it on CPU."""
    try:
        _hardware_product(out)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch._scaled_mm does not run here: {str(error).splitlines()[0]}")
    recipe = RECIPES["fp8-tensorwise"]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(96, 192, generator=generator) * torch.logspace(-6, 2, 192)
    b = torch.randn(64, 192, generator=generator) * 0.02
    x, w = (quantize(t.to(out), recipe, kind) for t, kind in ((a, left), (b, right)))
    eight = [q.values.to(TORCH[recipe.format(kind).name]) for q, kind in ((x, left), (w, right))]
    assert all(torch.equal(e.float(), q.values.float()) for e, q in zip(eight, (x, w), strict=True)), "FP8 numbers"
    scales = [torch.tensor(q.factor) for q in (x, w)]
    theirs = torch._scaled_mm(eight[0], eight[1].t(), scale_a=scales[0], scale_b=scales[1], out_dtype=out)
    ours = multiply(x.values, w.values.t(), x.factor * w.factor)
    assert ours.dtype == out
    # Bounds that hold in whatever order a processor adds: the sum of K products in fp32, and one rounding to the result.
    exact = (x.values.double() @ w.values.double().t()) * x.factor * w.factor
    size = (x.values.double().abs() @ w.values.double().abs().t()) * x.factor * w.factor
    sums = a.shape[1] * 2**-23 * size
    once = torch.finfo(out).eps / 2 * exact.abs() + 2 * sums
    for product in (ours, theirs):
        assert ((product.double() - exact).abs() <= once).all(), "rounded once, after the scales"
    twice = (x.values @ w.values.t()) * torch.tensor(x.factor * w.factor).to(out)
    if out == torch.bfloat16:
        assert ((twice.double() - exact).abs() > once).any(), "what rounding before the scales would give"
