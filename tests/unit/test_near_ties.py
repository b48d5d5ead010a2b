"""Rounding may choose another expert where two nearly tie; the parity check of an export tells that from a fault."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch

from stages.export import comparison, streamed_model

TOLERANCE = 1e-4


@pytest.mark.parametrize("bias", [None, torch.tensor([0.0, 0.0, 0.0, 1.0])])
def test_a_near_tie_is_one_between_the_last_chosen_expert_and_the_next(bias: torch.Tensor | None) -> None:
    """The scores that choose are those after sigmoid and bias, if the router has them."""
    logits = torch.tensor([[3.0, 2.0, 2.0 + 1e-6, 0.0], [3.0, 2.0, 1.0, 1.0], [3.0, 3.0, 2.0, 0.0]])
    function = "softmax" if bias is None else "sigmoid"
    router = SimpleNamespace(gating=lambda hidden: hidden, topk=2, score_function=function, expert_bias=bias)

    found = comparison.near_ties(router, logits[:, None])

    # With its bias the last expert is always first, so that the second place decides.
    assert found == ([0] if bias is None else [2])


def test_a_router_that_chooses_all_experts_has_no_ties() -> None:
    router = SimpleNamespace(gating=lambda hidden: hidden, topk=2, score_function="softmax", expert_bias=None)
    assert comparison.near_ties(router, torch.ones(5, 1, 2)) == []


@pytest.mark.parametrize(
    "tie, later, delta, tokens",
    [
        pytest.param([3], 0.003, 0.0, 3, id="the row is compared up to the tie"),
        pytest.param([], 0.003, 0.5, 8, id="without a tie it is a fault"),
        pytest.param([4], 0.003, 0.5, 8, id="a tie elsewhere explains nothing"),
        pytest.param([3], 0.02, 0.5, 8, id="nor does a tie if all later tokens differ much"),
        pytest.param([3], float("nan"), float("inf"), 8, id="nor if they are no numbers"),
    ],
)
def test_a_row_may_part_at_a_near_tie(
    monkeypatch: pytest.MonkeyPatch, tie: list[int], later: float, delta: float, tokens: int
) -> None:
    states = torch.zeros(1, 8, 2)
    expected = torch.zeros(8, 2)
    expected[3, 0] = 0.5
    expected[4:, 1] = later
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(expected.numpy().tobytes())))
    model = SimpleNamespace(get_output_embeddings=lambda: lambda state: state)

    worst = streamed_model.compare(model, [states], 3, TOLERANCE, [tie])

    assert worst["delta"] == pytest.approx(delta) and worst["tokens"] == tokens
