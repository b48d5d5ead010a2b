"""What must hold on this machine's device: on a GPU it is evidence, on a CPU it shows that the tests themselves work.

Each prints its figure and its criterion (`make test-gpu`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.utils.benchmark import Timer

from stages.mcore import gpu
from stages.mcore.layer_spec import Attention
from stages.mcore.model import build, transformer_config
from stages.mcore.parallel_layout import Layout
from stages.models.base import Precision
from stages.models.qwen3_moe.config import Qwen3MoeConfig
from stages.train import parallel
from tests.fixtures import train_fixtures

pytestmark = pytest.mark.numeric

MODEL = Qwen3MoeConfig(**train_fixtures.MODEL)
STARTS = torch.tensor([[0] * 100 + [100] * 60 + [160] * 96, [0] * 256])
"""Three documents in a row, and one."""


def report(name: str, figure: str, criterion: str) -> None:
    print(f"\n{gpu.device().type}: {name}: {figure} ({criterion})")


def test_tensors_of_host_and_device_are_summed() -> None:
    with parallel.session(0) as ranks:
        sums = [torch.ones(3, device=device) for device in ("cpu", ranks.device)]
        for tensor in sums:
            dist.all_reduce(tensor)
        assert all(tensor.sum() == 3 for tensor in sums)
        report("collectives", ", ".join(sorted({str(t.device) for t in sums})), "no error")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_is_on_the_device(precision: Precision) -> None:
    with parallel.session(0):
        (chunk,) = build(MODEL, train_fixtures.VOCAB, precision=precision, packed=True)
        tensors = [*chunk.parameters(), *chunk.buffers()]
        devices = {tensor.device for tensor in tensors}
    report(f"{len(tensors)} tensors of a {precision} model", str(devices), f"all on {gpu.device()}")
    assert devices == {gpu.device()}


@pytest.fixture
def attention() -> Iterator[Attention]:
    with parallel.session(0):
        yield Attention(transformer_config(MODEL, Layout(), "bf16"))


@pytest.mark.parametrize("starts", [None, STARTS], ids=["plain", "packed"])
def test_attention_in_bf16_is_that_of_fp32(attention: Attention, starts: torch.Tensor | None) -> None:
    """Forward and backward, with grouped queries; fp32 with a mask of the whole row is the reference."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(256, 2, heads, 64, generator=generator).to(gpu.device(), torch.bfloat16).requires_grad_()
              for heads in (8, 2, 2)]  # fmt: skip
    out = attention(*leaves, starts)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    q, k, v = (x.permute(1, 2, 0, 3) for x in exact)
    position = torch.arange(256, device=q.device)
    first = torch.zeros_like(STARTS) if starts is None else starts
    seen = (position[:, None] >= position) & (first.to(q.device)[:, :, None] <= position)
    scores = (q @ k.repeat_interleave(4, 1).mT / 8).masked_fill(~seen[:, None], -torch.inf)
    expected = (scores.softmax(-1) @ v.repeat_interleave(4, 1)).permute(2, 0, 1, 3).flatten(2)
    weight = torch.randn(expected.shape, generator=generator).to(q.device)
    pairs = [(out, expected), *zip(torch.autograd.grad(out, leaves, weight.bfloat16()),
                                   torch.autograd.grad(expected, exact, weight), strict=True)]  # fmt: skip
    worst = max(float((a.detach().float() - b.detach()).norm() / b.detach().norm()) for a, b in pairs)
    report("attention in bf16", f"relative difference {worst:.1e}", "< 1e-2")
    assert worst < 1e-2


def test_a_layer_waits_for_nothing(attention: Attention) -> None:
    """On a GPU, any synchronization of the second layer is an error."""
    q, k, v = (torch.randn(256, 2, heads, 64, device=gpu.device()).bfloat16() for heads in (8, 2, 2))
    attention(q, k, v, STARTS)
    with _no_synchronization():
        attention(q, k, v, STARTS)
    seconds = Timer("f(q, k, v, s)", globals={"f": attention, "q": q, "k": k, "v": v, "s": STARTS}).timeit(3).mean
    report("attention of 512 tokens", f"{1e6 * seconds:.0f} microseconds", "no synchronization in a second layer")


@contextlib.contextmanager
def _no_synchronization() -> Iterator[None]:
    if gpu.device().type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp32_products_are_not_in_tf32() -> None:
    """TF32 keeps ten bits of each factor: an error of some 1e-4."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    with parallel.session(0):
        product = (a.to(gpu.device()) @ b.to(gpu.device())).cpu().double()
    exact = a.double() @ b.double()
    error = float((product - exact).norm() / exact.norm())
    report("a product in fp32", f"relative difference {error:.1e}", "< 1e-6")
    assert error < 1e-6
