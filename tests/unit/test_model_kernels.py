"""What stands in the place of Megatron's steps around attention, against the formulas that it stands for."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from stages.mcore import layer_spec, row_tables
from stages.mcore.layer_spec import Attention, causal_attention
from stages.mcore.qkv import Heads
from stages.mcore.row_tables import Tables

pytestmark = pytest.mark.numeric


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_heads() -> None:
    torch.manual_seed(0)
    sequence, batch, groups, queries, dim, eps = 3, 2, 2, 3, 4, 1e-6
    mixed, q_weight, k_weight = _random(sequence, batch, groups, queries + 2, dim), _random(dim), _random(dim)
    angles = torch.randn(sequence, dim // 2, dtype=torch.float64).repeat(1, 2)

    def apply(mixed: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return Heads.apply(mixed, q_weight, k_weight, angles.cos(), angles.sin(), eps)

    def turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # [batch, heads, sequence, dim]
        x = F.rms_norm(x, (dim,), weight, eps)
        low, high = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-high, low], -1) * angles.sin()

    heads = mixed.permute(1, 2, 3, 0, 4)
    q, k, v = apply(mixed, q_weight, k_weight)
    torch.testing.assert_close(q, turned(heads[:, :, :queries].flatten(1, 2), q_weight))
    torch.testing.assert_close(k, turned(heads[:, :, queries], k_weight))
    torch.testing.assert_close(v, heads[:, :, queries + 1])
    assert all(x.is_contiguous() for x in (q, k, v))
    assert torch.autograd.gradcheck(apply, (mixed, q_weight, k_weight))


def _tables(positions: torch.Tensor, starts: torch.Tensor | None = None, context: int = 1) -> Tables:
    tables = Tables(None, len(positions), 1, torch.device("cpu"), (torch.ones(2), 1.0))
    tables.positions, tables.context = positions, context
    tables.local_starts = None if starts is None else starts[:, positions]
    return tables


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, starts: torch.Tensor | None = None
) -> torch.Tensor:
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    key = torch.arange(k.shape[2])
    unseen = (positions[:, None] < key)[None, None]
    if starts is not None:
        unseen = unseen | (starts[:, positions][:, None, :, None] > key)
    scores = scores.masked_fill(unseen, float("-inf"))
    return scores.softmax(-1) @ v.repeat_interleave(2, 1)


ALL, ENDS, MIDDLE = torch.arange(12), torch.tensor([0, 1, 2, 9, 10, 11]), torch.tensor([3, 4, 5, 6, 7, 8])
PACKED = torch.tensor([[0, 0, 0, 0, 4, 5, 5, 5, 5, 5, 10, 10], [0] * 12])


@pytest.mark.parametrize("positions", [ALL[:11], ENDS, MIDDLE])
@pytest.mark.parametrize("starts", [None, PACKED])
@pytest.mark.parametrize("shares", [True, False])
def test_attention_by_slices(
    positions: torch.Tensor, starts: torch.Tensor | None, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All positions of a row, and those that one of two context-parallel ranks holds; of one document or of several;
    with a kernel that takes fewer heads of keys, and with one that does not."""
    monkeypatch.setattr(layer_spec, "shares_keys", lambda q, mask: shares)
    torch.manual_seed(0)
    batch, heads, kv_heads, dim, keys = 2, 4, 2, 4, 12
    q, k, v = (
        _random(batch, heads, len(positions), dim),
        _random(batch, kv_heads, keys, dim),
        _random(batch, kv_heads, keys, dim),
    )
    expected = _reference(q, k, v, positions, starts)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for slice_ in (1, 4, 5, 64):
        monkeypatch.setattr(row_tables, "SLICE", slice_)
        out = causal_attention(q, k, v, _tables(positions, starts), 0.3)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients)


def test_a_gpu_takes_a_row_whole() -> None:
    rope = torch.ones(2), 1.0
    assert [len(Tables(None, 300, 1, torch.device(kind), rope).slices) for kind in ("cuda", "cpu")] == [1, 3]


@pytest.mark.parametrize("positions", [ALL, ENDS, MIDDLE])
@pytest.mark.parametrize("starts", [None, PACKED])
def test_documents_side_by_side(positions: torch.Tensor, starts: torch.Tensor | None) -> None:
    """What a GPU's kernels for rows of variable length get, computed by their definition: document by document, the last
    query at the last key."""
    torch.manual_seed(0)
    q, k, v = (_random(2, heads, size, 4) for heads, size in ((4, len(positions)), (2, 12), (2, 12)))
    documents = _tables(positions, starts, context=12 // len(positions)).documents(2)
    assert (documents.gathered is None) == (len(positions) == 12)
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    if documents.gathered is not None:
        keys, values = keys[documents.gathered], values[documents.gathered]
    out = []
    for (a, b), (c, d) in zip(pairwise(documents.queries), pairwise(documents.keys), strict=True):
        assert b - a <= d - c <= documents.longest <= 12
        parts = (x.transpose(0, 1)[None] for x in (queries[a:b], keys[c:d], values[c:d]))
        out.append(_reference(*parts, positions=torch.arange(d - c - (b - a), d - c))[0].transpose(0, 1))
    together = torch.cat(out).unflatten(0, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(together, _reference(q, k, v, positions, starts))


def test_no_layer_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer sends the tables of its rows to the device, and reads no number there; the second one makes and
    sends nothing. PyTorch's meta device stands for a GPU: tensors there have no numbers to read."""
    config = SimpleNamespace(context_parallel_size=1, rows=row_tables.RowTables((torch.ones(4), 1.0), 1))
    attention = Attention.__new__(Attention)
    torch.nn.Module.__init__(attention)
    attention.config, attention.scale = config, None
    monkeypatch.setattr(Attention, "takes_documents", lambda self, q: True)
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func._schema.name.partition("::")[2])
            return func(*args, **(kwargs or {}))

    q, k, v = (torch.empty(12, 2, heads, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    table_operators = {"_to_copy", "_local_scalar_dense", "arange", "cos", "sin"}
    for rows in (PACKED, None):
        for layer in range(2):
            seen.clear()
            with Watch():
                cos, _ = config.rows.of(rows, 12, q.device).rotary
                out = attention(q, k, v, rows)
            assert cos.device.type == out.device.type == "meta" and out.shape == (12, 2, 32)
            assert "_varlen_attn" in seen
            assert table_operators & set(seen) == (table_operators if layer == 0 else set())


def test_the_output_of_a_row_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, and by the projection behind it, whose input is the same tensor. On PyTorch's meta device."""
    config = SimpleNamespace(context_parallel_size=1, rows=row_tables.RowTables((torch.ones(4), 1.0), 1))
    attention = Attention.__new__(Attention)
    torch.nn.Module.__init__(attention)
    attention.config, attention.scale = config, None
    monkeypatch.setattr(Attention, "takes_documents", lambda self, q: True)
    kernel, outputs = layer_spec.varlen_kernel(), []
    assert kernel is not None
    monkeypatch.setattr(
        layer_spec, "varlen_kernel", lambda: lambda *x, **words: outputs.append(kernel(*x, **words)) or outputs[-1]
    )
    by_head = (torch.empty(1, heads, 12, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    out = attention(*(x.permute(2, 0, 1, 3) for x in by_head), PACKED[:1])
    assert out.shape == (12, 1, 32) and out.untyped_storage()._cdata == outputs[0].untyped_storage()._cdata
