"""Ranks communicate in an order in which NCCL cannot hang: every simulated rank of a layout, run through together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from stages.mcore.megatron_imports import parallel_state
from stages.train import rank_simulation
from stages.train.config import TrainConfig
from stages.train.parallel import Ranks
from tests.fixtures import rank_simulation_fixtures, train_fixtures
from tests.fixtures.order_of_collectives import Call, DisorderError, classes, record, run_through

BATCHED = {"ranks": 8, "tp": 2, "pp": 2, "ep": 2, "etp": 1, "overlap_gradients": True}
INTERLEAVED = {"ranks": 2, "pp": 2, "vpp": 2}
"""Stages that send in batches, and those of an interleaved pipeline, which send one by one."""


def config(layout: dict[str, Any]) -> TrainConfig:
    data = layout["ranks"] // (layout.get("tp", 1) * layout["pp"])
    model = {**rank_simulation_fixtures.MODEL, "layers": layout["pp"] * layout.get("vpp", 1)}
    body = {**train_fixtures.PHASE, "sequence_length": 32, "pack": True, "parallelism": layout}
    body["batch"] = {"micro_tokens": 32, "global_tokens": 4 * data * 32}
    return TrainConfig.model_validate({"model": model, "phase": body, "padded_vocab_size": 64, "seed": 0})


def programs(layout: dict[str, Any]) -> dict[int, list[Call]]:
    settings = config(layout)
    return {rank: record(rank_simulation.simulate, settings, rank) for rank in range(layout["ranks"])}


@pytest.fixture(scope="module")
def batched() -> dict[int, list[Call]]:
    return programs(BATCHED)


def require_order(layout: dict[str, Any], calls: dict[int, list[Call]]) -> None:
    """All ranks reach the end, and those of a stage issue the same, so one rank of each stage is distinct."""
    counts = run_through(calls)
    assert counts["pp"] > 20 and counts["world"] >= 4 and sum(counts.values()) > 80, counts
    stage = layout["ranks"] // layout["pp"]
    stages = [list(range(first, first + stage)) for first in range(0, layout["ranks"], stage)]
    assert classes(config(layout).phase.parallelism, calls) == stages


def test_all_ranks_reach_the_end(batched: dict[int, list[Call]]) -> None:
    require_order(BATCHED, batched)
    require_order(INTERLEAVED, programs(INTERLEAVED))


original_sum = Ranks.sum
FAULTS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "a rank skips a sum": (Ranks, "sum", lambda ranks, value: value, "allreduce .*but rank|wait forever"),
    "a rank sums twice as many": (
        Ranks, "sum", lambda ranks, value: original_sum(ranks, torch.cat([value.flatten()] * 2))[: value.numel()].view_as(value), "but rank",
    ),
    "a rank sums over another group": (
        parallel_state, "get_data_parallel_group", lambda **_: parallel_state.get_tensor_model_parallel_group(), "rank",
    ),
}  # fmt: skip
"""Target, name, replacement on one rank, and what is said."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_code_of_one_rank_is_found(name: str, batched: dict[int, list[Call]]) -> None:
    target, attribute, replacement, message = FAULTS[name]
    with mock.patch.object(target, attribute, replacement):
        faulty = record(rank_simulation.simulate, config(BATCHED), 5)
    with pytest.raises(DisorderError, match=message):
        run_through(batched | {5: faulty})


def test_a_call_that_is_left_out_is_found(batched: dict[int, list[Call]]) -> None:
    """Of groups with other ranks, on one rank: every seventh call, each by itself."""
    calls = batched[5]
    for number in range(0, len(calls), 7):
        if len(calls[number].members) > 1:
            with pytest.raises(DisorderError):
                run_through(batched | {5: calls[:number] + calls[number + 1 :]})


def call(operation: str, group: str, members: tuple[int, ...], **settings: Any) -> Call:
    return Call(operation, group, group, members, settings.pop("content", ()), **settings)


def test_orders_by_hand() -> None:
    """Equal sequences in each group are not enough: two groups in another order wait in a circle, and so do two sends
    that wait for each other, unless they are issued together with their receives."""
    a, b = call("allreduce", "a", (0, 1)), call("allreduce", "b", (0, 1))
    assert run_through({0: [a, b], 1: [a, b]}) == {"a": 1, "b": 1}
    with pytest.raises(DisorderError, match="2 of 2 ranks wait forever"):
        run_through({0: [a, b], 1: [b, a]})

    def messages(rank: int, batch: int | None) -> list[Call]:
        return [call(x, "pp", (0, 1), partner=1 - rank, batch=batch) for x in ("send", "recv")]

    assert run_through({rank: messages(rank, 0) for rank in (0, 1)}) == {"pp": 2}
    assert run_through({0: messages(0, None), 1: messages(1, None)[::-1]}) == {"pp": 2}
    with pytest.raises(DisorderError, match="2 of 2 ranks wait forever"):
        run_through({rank: messages(rank, None) for rank in (0, 1)})
    # NCCL makes the communicator of a group with all of its ranks, also if only two of them send
    three = [[call(x, "pp", (0, 1, 2), partner=1 - rank, batch=0)] for rank, x in enumerate(("send", "recv"))]
    with pytest.raises(DisorderError, match="2 of 3 ranks wait forever"):
        run_through({0: three[0], 1: three[1], 2: []})


def test_contents_by_hand() -> None:
    sum_of_4, sum_of_8 = (call("allreduce", "a", (0, 1), content=(("tensors", "float32", n), "SUM")) for n in (4, 8))
    with pytest.raises(DisorderError, match=r"rank 1: allreduce in a \[0, 1\]: .*8.* but rank 0: .*4"):
        run_through({0: [sum_of_4], 1: [sum_of_8]})
    roots = [[call("broadcast", "a", (0, 1), partner=root)] for root in (0, 1)]
    with pytest.raises(DisorderError, match="with rank 1"):
        run_through(dict(enumerate(roots)))
    splits = (((1, 2), (1, 1)), ((2, 2), (2, 2)))  # rows to and from each rank
    exchange = [[call("alltoall_base", "ep", (0, 1), splits=both)] for both in splits]
    with pytest.raises(DisorderError, match="sends 2 rows to rank 0, which expects 1"):
        run_through(dict(enumerate(exchange)))
