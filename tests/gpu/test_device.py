"""Points 1 to 4 and 16: groups of ranks, attention's kernels, where the model is, and the device test before training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from pipeline.launch import cluster_profile, device_test
from pipeline.launch.rendezvous import Ranks
from stages.mcore import gpu
from stages.mcore.layer_spec import Attention
from stages.mcore.model import build, transformer_config
from stages.models.base import Precision
from stages.models.mixture import Qwen3MoeConfig
from stages.models.parallel_layout import Layout
from stages.train import parallel
from tests.fixtures import gpu_fixtures, train_fixtures
from tests.fixtures.device_test_fixtures import BREAKS, verdicts
from tests.gpu.conftest import Report

pytestmark = pytest.mark.numeric

MODEL = Qwen3MoeConfig(**train_fixtures.MODEL)
STARTS = torch.tensor([[0] * 100 + [100] * 60 + [160] * 96, [0] * 256])
"""Three documents in a row, and one."""
LENGTH = 2048 if gpu_fixtures.ON_GPU else 512
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.point(1)
def test_tensors_of_host_and_device_are_summed(report: Report) -> None:
    with parallel.session(0) as ranks:
        sums = [torch.ones(3, device=device) for device in ("cpu", ranks.device)]
        for tensor in sums:
            dist.all_reduce(tensor)
        backends = dist.get_backend_config()
    devices = ", ".join(sorted({str(t.device) for t in sums}))
    versions = ", ".join(
        f"{name} {value}" for name, value in gpu_fixtures.machine().items() if name not in ("device", "driver")
    )
    report("imports and versions", versions, "no error", True)
    report(f"sums in a world of one by {backends}", devices, "each is 1", all(bool((t == 1).all()) for t in sums))


@pytest.mark.point(2)
@pytest.mark.parametrize("precision", DTYPES)
def test_backends_of_attention_are_named(precision: Precision, report: Report) -> None:
    """The choice of `scaled_dot_product_attention` for each kind of call."""
    calls: dict[str, list[str]] = {}
    for groups, kind in product((8, 2), ("plain", "causal", "mask")):
        shapes = ((1, heads, 256, 64) for heads in (8, groups, groups))
        q, k, v = (torch.zeros(shape, dtype=DTYPES[precision], device=gpu.device()) for shape in shapes)
        mask = torch.zeros(1, 1, 256, 256, dtype=q.dtype, device=q.device) if kind == "mask" else None
        choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, kind == "causal", enable_gqa=groups < 8)
        calls.setdefault(SDPBackend(choice).name, []).append(f"{'GQA ' if groups < 8 else ''}{kind}")
    figure = "; ".join(f"{name} for {', '.join(kinds)}" for name, kinds in calls.items())
    report(f"attention's backends in {precision}", figure, "each is named", "ERROR" not in calls)


@pytest.fixture(params=DTYPES)
def attention(request: pytest.FixtureRequest) -> Iterator[Attention]:
    with parallel.session(0):
        yield Attention(transformer_config(MODEL, Layout(), request.param))


def leaves_of(attention: Attention, length: int, batch: int) -> list[torch.Tensor]:
    """Queries, keys and values [length, batch, heads, 64], of 8 and 2 heads."""
    generator, dtype = torch.Generator().manual_seed(0), attention.config.params_dtype
    return [torch.randn(length, batch, heads, 64, generator=generator).to(gpu.device(), dtype).requires_grad_()
            for heads in (8, 2, 2)]  # fmt: skip


@pytest.mark.point(2)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_attentions_memory_grows_with_the_row(attention: Attention, packed: bool, report: Report) -> None:
    """Forward and backward of one row, of a length and twice that."""
    peaks = []
    for length in (LENGTH, 2 * LENGTH):
        leaves = leaves_of(attention, length, 1)
        starts = torch.arange(length)[None] // 256 * 256 if packed else None
        with gpu_fixtures.peak_bytes() as peak:
            torch.autograd.grad(attention(*leaves, starts).sum(), leaves)
        peaks += peak
    kind = f"{'varlen' if attention.takes_documents(leaves[0]) else 'SDPA'}, {attention.config.params_dtype}, {'packed' if packed else 'plain'}"  # fmt: skip
    growth = peaks[1] / peaks[0]
    report(f"attention's memory ({kind}), {LENGTH} to {2 * LENGTH} tokens", f"{growth:.2f} times", "< 3: the square is 4", growth < 3)  # fmt: skip


@pytest.mark.point(2)
@pytest.mark.parametrize("starts", [None, STARTS], ids=["plain", "packed"])
def test_attention_is_that_of_the_whole_table(
    attention: Attention, starts: torch.Tensor | None, report: Report
) -> None:
    """Forward and backward, with grouped queries; fp32 with all scores is the reference."""
    leaves = leaves_of(attention, 256, 2)
    out = attention(*leaves, starts)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    q, k, v = (x.permute(1, 2, 0, 3) for x in exact)
    position = torch.arange(256, device=q.device)
    first = torch.zeros_like(STARTS) if starts is None else starts
    seen = (position[:, None] >= position) & (first.to(q.device)[:, :, None] <= position)
    scores = (q @ k.repeat_interleave(4, 1).mT / 8).masked_fill(~seen[:, None], -torch.inf)
    expected = (scores.softmax(-1) @ v.repeat_interleave(4, 1)).permute(2, 0, 1, 3).flatten(2)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(q.device)
    pairs = [(out, expected), *zip(torch.autograd.grad(out, leaves, weight.to(out.dtype)),
                                   torch.autograd.grad(expected, exact, weight), strict=True)]  # fmt: skip
    worst = max(float((a.detach().float() - b.detach()).norm() / b.detach().norm()) for a, b in pairs)
    bound = 1e-2 if out.dtype == torch.bfloat16 else 1e-5
    name = f"attention in {out.dtype}, {'plain' if starts is None else 'packed'}"
    report(name, f"relative difference {worst:.1e}", f"< {bound:g}", worst < bound)


@pytest.mark.point(2)
@gpu_fixtures.needs_gpu("PyTorch has this kernel for CUDA only")
def test_documents_go_by_the_kernel_for_rows_of_variable_length(report: Report) -> None:
    with parallel.session(0):
        attention = Attention(transformer_config(MODEL, Layout(), "bf16"))
        taken = attention.takes_documents(leaves_of(attention, 16, 1)[0])
    report("kernel of packed rows in bf16", "torch.nn.attention.varlen" if taken else "SDPA", "varlen", taken)


@pytest.mark.point(3)
@pytest.mark.parametrize("precision", DTYPES)
def test_the_model_is_on_the_device(precision: Precision, report: Report) -> None:
    with parallel.session(0):
        (chunk,) = build(MODEL, train_fixtures.VOCAB, precision=precision, packed=True)
        tensors = [*chunk.parameters(), *chunk.buffers()]
        devices = {tensor.device for tensor in tensors}
    names = ", ".join(sorted(map(str, devices)))
    report(f"{len(tensors)} tensors of a {precision} model", names, f"all on {gpu.device()}", devices == {gpu.device()})


@pytest.mark.point(4)
def test_fp32_products_are_not_in_tf32(report: Report) -> None:
    """TF32 keeps ten bits of each factor: an error of some 1e-4."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    with parallel.session(0):
        result = F.linear(a.to(gpu.device()), b.T.to(gpu.device())).cpu().double()
    exact = a.double() @ b.double()
    error = float((result - exact).norm() / exact.norm())
    report("a product in fp32", f"relative difference {error:.1e}", "< 1e-6", error < 1e-6)


@pytest.mark.point(16)
def test_the_rate_of_a_product_is_measured(report: Report) -> None:
    """By the process that a job starts before training, which names it in its complaint of a slow device."""
    profile = cluster_profile.load("h100-pyxis")
    assert profile.accelerator is not None and profile.slurm is not None
    least = profile.slurm.device_test_share * profile.accelerator.peaks["bf16"]
    failure = device_test.check(Ranks(), 1e18)
    assert failure is not None
    rate = re.search(r"a product of matrices reaches (\S+) TFLOP/s", failure.text)
    assert rate is not None, failure.text
    name, figure, criterion = "a product of matrices", f"{rate[1]} TFLOP/s", f"{least / 1e12:.0f} TFLOP/s"
    if gpu_fixtures.ON_GPU:
        passes = device_test.product_problem(gpu.device(), least) is None
        report(f"{name}, bf16", figure, f"> {criterion}", passes and float(rate[1]) * 1e12 > least)
    else:
        passes = device_test.product_problem(gpu.device(), 1.0) is None
        report(f"{name}, fp32", figure, f"measured; {criterion} in bf16 are asked of an H100", passes)


@pytest.mark.point(16)
def test_numbers_of_a_collective_are_known(monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    """In a world of one, as NCCL takes one rank for each GPU."""
    gather = dist.all_gather
    with parallel.session(0) as ranks:
        wrong = device_test.wrong_senders(ranks.device, 1, 0)
        monkeypatch.setattr(dist, "all_gather", lambda rows, row: gather(rows, row + (torch.arange(len(row), device=row.device) == 9)))  # fmt: skip
        wrong_ranks = device_test.wrong_senders(ranks.device, 1, 0)
    figure = f"{len(wrong)} wrong, {len(wrong_ranks)} with a number changed on purpose"
    report(f"{device_test.ROW:,} numbers from each rank", figure, "0, 1", (wrong, wrong_ranks) == ([], [0]))


@gpu_fixtures.at_length(12)
@pytest.mark.point(16)
@pytest.mark.parametrize("name", ["sound", "product"])
def test_ranks_test_their_devices(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    """A rank on each GPU by NCCL; with fewer than two GPUs, two ranks on the CPU."""
    count = torch.cuda.device_count()
    if count < 2:
        count = 2
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    broken, sentence = BREAKS[name]
    verdict, *others = verdicts(tmp_path, monkeypatch, broken, count, seconds=30.0)
    text = verdict.text if verdict else "no rank complains" if others == [None] * len(others) else str(others)
    criterion = "rank 0 names it" if sentence else "none complains"
    report(f"{count} ranks, {'one with a broken product' if sentence else 'sound'}", text, criterion, text == (sentence or "no rank complains"))  # fmt: skip
