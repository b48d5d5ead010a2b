"""Point 13: products of FP8 numbers by the machine (`torch._scaled_mm`) are those of the simulation."""

from __future__ import annotations

import pytest
import torch

from stages.mcore import gpu
from stages.mcore.fake_quantization import RECIPES, Kind, multiply, quantize
from tests.gpu.conftest import Report

pytestmark = pytest.mark.numeric

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ROWS, SUMMED, COLUMNS = (1024, 4096, 1024) if torch.cuda.is_available() else (96, 192, 64)
BOUND = 2.0**-8
"""A product's elements are rounded to bf16 once on either side, each by at most 2^-9 of the element; the rest is for
sums in another order and, on a tensor core, with fewer bits."""


@pytest.mark.point(13)
@pytest.mark.parametrize(("left", "right"), [("input", "weight"), ("gradient", "weight"), ("gradient", "input")])
def test_a_product_is_that_of_the_simulation(left: Kind, right: Kind, report: Report) -> None:
    """y = Q(x) Q(w)^T, dx = Q(dy) Q(w) and dw = Q(dy)^T Q(x) with one scale a tensor, as matrices of these shapes."""
    recipe, generator = RECIPES["fp8-tensorwise"], torch.Generator().manual_seed(0)
    spread = torch.logspace(-3, 1, SUMMED)
    a, b = (torch.randn(rows, SUMMED, generator=generator) * spread for rows in (ROWS, COLUMNS))
    rounded = [quantize(t.to(gpu.device(), torch.bfloat16), recipe, kind) for t, kind in ((a, left), (b, right))]
    eight = [q.values.to(FORMATS[recipe.format(kind).name]) for q, kind in zip(rounded, (left, right), strict=True)]
    exact = all(torch.equal(e.float(), q.values.float()) for e, q in zip(eight, rounded, strict=True))
    name = f"{left} by {right}, {ROWS} x {SUMMED} x {COLUMNS}"
    report(f"operands, {name}", "equal" if exact else "not numbers of the format", "FP8 numbers of the machine", exact)
    scales = [torch.tensor(q.factor, device=gpu.device()) for q in rounded]
    theirs = torch._scaled_mm(eight[0], eight[1].t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16)
    ours = multiply(rounded[0].values, rounded[1].values.t(), rounded[0].factor * rounded[1].factor)
    error = float((theirs.double() - ours.double()).norm() / ours.double().norm())
    report(f"_scaled_mm, {name}", f"relative difference {error:.1e}", f"< {BOUND:.1e}", error < BOUND)
