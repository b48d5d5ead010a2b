"""What stands in the place of Megatron's steps around attention, against the formulas that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stages.mcore.layer_spec import causal_attention
from stages.mcore.qkv import Heads

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


@pytest.mark.parametrize(
    "positions", [torch.arange(11), torch.tensor([0, 1, 2, 9, 10, 11]), torch.tensor([3, 4, 5, 6, 7, 8])]
)
def test_attention_by_slices(positions: torch.Tensor) -> None:
    """All positions of a row, and those that one of two context-parallel ranks holds."""
    torch.manual_seed(0)
    batch, heads, kv_heads, dim, keys = 2, 4, 2, 4, 12
    q, k, v = (
        _random(batch, heads, len(positions), dim),
        _random(batch, kv_heads, keys, dim),
        _random(batch, kv_heads, keys, dim),
    )
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    scores = scores.masked_fill(positions[:, None] < torch.arange(keys), float("-inf"))
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for slice_ in (1, 4, 5, 64):
        out = causal_attention(q, k, v, positions, 0.3, slice_)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients)
