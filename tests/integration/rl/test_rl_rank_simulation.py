"""Simulated ranks of post-training: their updates send what real ranks send, and need the memory that the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.rl import estimates, rank_simulation
from stages.rl.config import DistillationConfig
from stages.train import parallel
from stages.train.engine import Engine
from tests.fixtures import rank_simulation_fixtures
from tests.fixtures.rank_simulation_fixtures import (
    LARGE,
    POST_TRAINING,
    VOCABULARY,
    compare_phases_with_real_ranks,
    post_training,
    require_planned_memory,
)
from tests.fixtures.run_fixtures import at_length

REPLAY = {"mix": {"code": 1.0}, "rows": 64, "sequence_length": 1024, "weight": 0.1}
MEMORY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "reward, one": ("reward", {}, {}),
    "dpo, TP2 EP2 PP2": ("dpo", {"ranks": 8, "tp": 2, "ep": 2, "pp": 2}, {}),
}
MORE_MEMORY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{
        f"{kind}, {name}": (kind, layout, {})
        for kind in POST_TRAINING
        for name, layout in {
            "EP4": {"ranks": 4, "ep": 4},
            "TP4": {"ranks": 4, "tp": 4},
            "TP2 EP2 PP2": {"ranks": 8, "tp": 2, "ep": 2, "pp": 2},
            "recompute": {"recompute": "layer"},
        }.items()
    },
    "rlvr, updates": ("rlvr", {"ranks": 4, "ep": 4}, {"updates": 2}),
    "rlvr, replay": ("rlvr", {"ranks": 4, "ep": 4}, {"replay": REPLAY}),
    "dpo, skills": (
        "dpo",
        {},
        {"sft_tasks": {**POST_TRAINING["dpo"]["preferences"], "count": 64, "num_generations": 2}},
    ),
}


def configured(kind: str, layout: dict[str, Any], **phase: Any) -> Any:
    body = post_training(kind, layout, LARGE, VOCABULARY, **{"precision": "bf16", **phase})
    return rank_simulation_fixtures.CONFIGS[kind].model_validate(body)


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_planned(name: str) -> None:
    kind, layout, phase = MEMORY[name]
    require_planned_memory(rank_simulation.simulate(configured(kind, layout, **phase), 0))


@at_length("training", 150)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", MORE_MEMORY)
def test_memory_of_more_phases_is_planned(name: str, precision: str) -> None:
    """The first and the last rank."""
    kind, layout, phase = MORE_MEMORY[name]
    for rank in {0, layout.get("ranks", 1) - 1}:
        result = rank_simulation.simulate(configured(kind, layout, **phase, precision=precision), rank)
        require_planned_memory(result)


def test_the_reference_of_a_kl_term_is_on_the_host() -> None:
    """Its copies are those that the plan adds to the host's memory."""
    result = rank_simulation.simulate(configured("rlvr", {"ranks": 4, "ep": 4}, kl_coef=0.1, prompts_per_step=2), 0)
    require_planned_memory(result)
    assert result.copies_bytes == result.planned_copies_bytes == 2 * 2 * result.parameters


@at_length("training", 20)
@pytest.mark.parametrize("layout", [{}, {"ranks": 4, "tp": 2, "pp": 2}], ids=str)
def test_a_teacher_is_planned(layout: dict[str, Any]) -> None:
    """Its weights are, and of its pass at most what it needs: the plan is that of a pass with gradients."""
    body = post_training("rlvr", layout, LARGE, VOCABULARY, precision="bf16", max_resample_rounds=0)
    config = DistillationConfig.model_validate({**body, "teacher": LARGE, "model": {**LARGE, "hidden_size": 256}})
    for rank in {0, layout.get("ranks", 1) - 1}:
        result = rank_simulation.simulate(config, rank)
        teacher = estimates.teacher_bytes(config)
        assert teacher < result.state_bytes == pytest.approx(result.planned_state_bytes, abs=0.07 * result.peak_bytes)
        assert 0.7 * result.planned_peak_bytes < result.peak_bytes < 1.05 * result.planned_peak_bytes


@pytest.mark.parametrize(("kind", "phase"), [("rlvr", {}), ("rlvr", {"replay": REPLAY}), ("dpo", {}), ("reward", {})])
def test_the_fullest_row_is_that_of_real_batches(kind: str, phase: dict[str, Any]) -> None:
    config = configured(kind, {}, **phase)
    examples, number = estimates.fullest_row(config)
    planned = examples.row(number)
    with parallel.session(0) as ranks:
        engine = Engine.__new__(Engine)
        engine.ranks = ranks
        batch = rank_simulation.full_batch(engine, config, examples, number, 2)
    for micro in batch.micro:
        assert micro.targets is not None
        assert (planned.length, planned.targets) == (int((~micro.padding).sum()), micro.targets.shape[1])


@at_length("training", 60)
@pytest.mark.parametrize("kind", POST_TRAINING)
def test_collectives_are_those_of_real_ranks(kind: str, tmp_path: Path) -> None:
    layouts = {"EP2": {"ep": 2}, "PP2": {"pp": 2}, "TP2+SP": {"tp": 2}}
    phase: dict[str, Any] = {"sampling": {"max_new_tokens": 8}} if kind != "reward" else {"pairs": 4}
    phase |= {"kl_coef": 0.1, "updates": 2} if kind == "rlvr" else {}
    model = {**rank_simulation_fixtures.MODEL, "context_length": 16}
    phases = {name: post_training(kind, {"ranks": 2, **x}, model, 64, **phase) for name, x in layouts.items()}
    compare_phases_with_real_ranks(kind, phases, tmp_path)
