"""The gated delta rule by chunks is the recurrence that defines it, and starts anew with each document of a row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stages.mcore.architectures.qwen3_next_layers import CHUNK, gated_delta_rule, short_convolution

pytestmark = pytest.mark.numeric
HEADS, KEY, VALUE = 3, 8, 12
DOCUMENTS = [[150], [1, 2, 61, 64, 22], [64, 64, 22], [63, 1, 1, 85]]
"""Lengths of documents in a row: they end within chunks of 64 tokens, at their ends and next to them."""


def inputs(length: int, decay: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, length, HEADS, *shape, generator=generator)

    query, key = (torch.nn.functional.normalize(draw(KEY), dim=-1) for _ in range(2))
    return [query, key, draw(VALUE), -decay * draw().abs(), draw().sigmoid()]


def recurrence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Token by token, by the definition, in fp64."""
    query, key, value, g, beta = (x.double() for x in (query, key, value, g, beta))
    state, out = torch.zeros(1, HEADS, KEY, VALUE, dtype=torch.float64), []
    for t in range(query.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        predicted = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], beta[:, t, :, None] * (value[:, t] - predicted))
        out.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) / KEY**0.5)
    return torch.stack(out, 1)


def starts_of(lengths: list[int]) -> torch.Tensor:
    begins = torch.tensor([sum(lengths[:n]) for n in range(len(lengths))])
    return begins.repeat_interleave(torch.tensor(lengths))[None]


def pieces(x: torch.Tensor, lengths: list[int]) -> Iterator[torch.Tensor]:
    return iter(x.split(lengths, 1))


@pytest.mark.parametrize("decay", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("length", [1, CHUNK, 150])
def test_it_is_the_recurrence(length: int, decay: float) -> None:
    tensors = inputs(length, decay)
    torch.testing.assert_close(gated_delta_rule(*tensors).double(), recurrence(*tensors), atol=2e-5, rtol=0)


@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
def test_a_row_is_its_documents(lengths: list[int]) -> None:
    """And so are the gradients: of one document they do not depend on another."""
    together, alone = ([x.requires_grad_() for x in inputs(sum(lengths))] for _ in range(2))
    row = gated_delta_rule(*together, starts_of(lengths))
    documents = [gated_delta_rule(*parts) for parts in zip(*(pieces(x, lengths) for x in alone), strict=True)]
    torch.testing.assert_close(row, torch.cat(documents, 1), atol=2e-6, rtol=0)
    for outputs in (row, torch.cat(documents, 1)):
        (outputs * outputs.detach().cos()).sum().backward()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-5, rtol=0)


@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
def test_a_convolution_sees_one_document(lengths: list[int]) -> None:
    x = torch.randn(1, sum(lengths), 5, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([short_convolution(part, weight) for part in pieces(x, lengths)], 1)
    torch.testing.assert_close(short_convolution(x, weight, starts_of(lengths)), alone)
    by_hand = sum(weight[:, 0, -1 - back] * x[:, lengths[0] - 1 - back] for back in range(min(4, lengths[0])))
    torch.testing.assert_close(alone[:, lengths[0] - 1], torch.nn.functional.silu(by_hand))
