"""Muon's update of a matrix, against PyTorch's, and what it leaves to Adam."""

from __future__ import annotations

import math

import pytest
import torch

from stages.mcore.megatron_patches import FusedAdam
from stages.mcore.muon import UPDATE_RMS, Matrix, _update, direction, orthogonalize

LR, DECAY, MOMENTUM = 0.1, 0.05, 0.9


def whole(main: torch.Tensor, shape: tuple[int, int]) -> Matrix:
    """A matrix of a model in bf16 that one rank has."""
    parameter = torch.zeros(shape, dtype=torch.bfloat16)
    return Matrix(parameter, (((0, shape[0]), (0, shape[1])),), shape, 0, main.numel(), main, 0, None, None, None)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_steps_are_those_of_pytorch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(shape))
    oracle = torch.optim.Muon([theirs], LR, DECAY, MOMENTUM, adjust_lr_fn="match_rms_adamw")
    main = torch.nn.Parameter(theirs.detach().flatten().clone())
    adam = FusedAdam([main], LR, weight_decay=DECAY)

    for _ in range(4):
        theirs.grad = torch.randn(shape)
        main.grad = theirs.grad.flatten()
        oracle.step()
        with torch.no_grad():
            _update(whole(main, shape), adam, MOMENTUM)

    torch.testing.assert_close(main.view(shape), theirs, rtol=0, atol=1e-6)
    assert torch.equal(adam.state[main]["momentum"].view(shape), oracle.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_singular_values_come_near_to_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)

    update = orthogonalize(matrix)

    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6 and values.max() < 1.3
    # With the same singular vectors: the exact factor has the same product with it as with the values' sum.
    assert (update * (left @ right)).sum() == pytest.approx(float(values.sum()), rel=1e-4)
    assert update.square().mean().sqrt() * math.sqrt(max(shape)) == pytest.approx(1.0, abs=0.3)
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def test_queries_keys_and_values_are_orthogonalized_each_by_themselves() -> None:
    torch.manual_seed(2)
    groups, heads, rows, columns = 2, 2, 3, 5
    queries, keys, values = (torch.randn(groups, n, rows, columns) for n in (heads, 1, 1))
    qkv = torch.cat([queries, keys, values], 1).flatten(0, 2)

    update = direction(qkv, (groups, rows)).unflatten(0, (groups, heads + 2, rows))

    for part, of_part in ((queries, update[:, :heads]), (keys, update[:, heads : heads + 1]), (values, update[:, -1:])):
        matrix = part.flatten(0, 2)
        expected = UPDATE_RMS * math.sqrt(max(matrix.shape)) * orthogonalize(matrix)
        torch.testing.assert_close(of_part.flatten(0, 2), expected)
