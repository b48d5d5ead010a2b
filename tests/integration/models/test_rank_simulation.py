"""Simulated ranks: what they send is what real ranks send, and what they allocate is what the plan says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pipeline.core.errors import RecipeError
from pipeline.core.stage import RankSimulation, Traffic
from stages.mcore.model import transformer_config
from stages.mcore.simulated_rank import Collective, CollectiveLog
from stages.models.base import Rows
from stages.models.parallel_layout import Layout
from stages.train import parallel, rank_simulation
from stages.train.config import SftConfig, TrainConfig
from stages.train.engine import Engine
from stages.train.estimate import rank_memory
from tests.fixtures import rank_simulation_fixtures, train_fixtures
from tests.fixtures.rank_simulation_fixtures import (
    LARGE,
    VOCABULARY,
    compare_phases_with_real_ranks,
    require_planned_memory,
)
from tests.fixtures.run_fixtures import SOAK, at_length, atom

REAL: dict[str, dict[str, Any]] = {
    "EP2": {"ep": 2},
    "PP2 overlap": {"pp": 2, "overlap_gradients": True},
}
MORE_REAL: dict[str, dict[str, Any]] = {
    "DP2 overlap": {"overlap_gradients": True},
    "TP2+SP": {"tp": 2},
    "CP2 recompute": {"cp": 2, "recompute": "layer"},
    "TP2 EP2 ETP1": {"tp": 2, "ep": 2, "etp": 1},
    "PP2 interleaved": {"pp": 2, "vpp": 2},
}
MEMORY: dict[str, dict[str, Any]] = {
    "EP4": {"ranks": 4, "ep": 4},
    "EP4 selective": {"ranks": 4, "ep": 4, "recompute": "selective"},
    "PP2 uneven": {"ranks": 2, "pp": 2, "pp_layers": [1, 2]},
    "TP2 EP4 ETP1 PP2 overlap": {
        "ranks": 16, "tp": 2, "pp": 2, "ep": 4, "etp": 1, "overlap_gradients": True,
    },
    "CP2 EP8 recompute": {"ranks": 8, "cp": 2, "ep": 8, "recompute": "layer"},
}  # fmt: skip
MORE_MEMORY: dict[str, dict[str, Any]] = {
    "one": {},
    "recompute": {"recompute": "layer"},
    "TP2 EP2": {"ranks": 4, "tp": 2, "ep": 2},
    "TP4": {"ranks": 4, "tp": 4},
    "CP4 EP4": {"ranks": 4, "cp": 4, "ep": 4},
    "PP2": {"ranks": 2, "pp": 2},
    "PP4 EP2": {"ranks": 8, "pp": 4, "ep": 2},
    "PP2 VPP2": {"ranks": 2, "pp": 2, "vpp": 2},
    "PP2 recompute": {"ranks": 2, "pp": 2, "recompute": "layer"},
    "TP2 PP2 EP2": {"ranks": 8, "tp": 2, "pp": 2, "ep": 2},
}  # fmt: skip


def config(layout: dict[str, Any], model: dict[str, Any], vocabulary: int, row: int, **phase: Any) -> dict[str, Any]:
    """Four micro-batches of one packed row on each data rank."""
    data = layout.get("ranks", 1) // (layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1))
    body = {**train_fixtures.PHASE, "sequence_length": row, "pack": True, "parallelism": layout, **phase}
    body["batch"] = {"micro_tokens": row, "global_tokens": 4 * data * row}
    return {"model": model, "phase": body, "padded_vocab_size": vocabulary, "seed": 0}


def compare_with_real_ranks(layouts: dict[str, dict[str, Any]], folder: Path, **model: Any) -> None:
    sizes = {**rank_simulation_fixtures.MODEL, **model}
    configs = [config({"ranks": 2, **layout}, sizes, 64, 32) for layout in layouts.values()]
    compare_phases_with_real_ranks("text", dict(zip(layouts, configs, strict=True)), folder)


@at_length("training", 40)
def test_collectives_are_those_of_real_ranks(tmp_path: Path) -> None:
    compare_with_real_ranks(REAL, tmp_path)


@at_length("training", 30)
def test_collectives_of_more_layouts_are_those_of_real_ranks(tmp_path: Path) -> None:
    compare_with_real_ranks(MORE_REAL, tmp_path, layers=4)


def simulate_large(
    layout: dict[str, Any], rank: int = 0, precision: str = "bf16", pack: bool = True, **model: Any
) -> RankSimulation:
    settings = config(layout, {**LARGE, **model}, VOCABULARY, 1024, precision=precision, pack=pack)
    return rank_simulation.simulate(TrainConfig.model_validate(settings), rank)


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_planned(name: str) -> None:
    """And no fake tensor stays in the process, where the next training would compute with it."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    with mock.patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", None):
        layers = sum(MEMORY[name].get("pp_layers", [2]))
        require_planned_memory(simulate_large(MEMORY[name], layers=layers))
        assert MoEAuxLossAutoScaler.main_loss_backward_scale is None


def test_settings_of_this_process_are_not_the_ranks() -> None:
    """Deterministic kernels need more memory; a rank has them if its layout says so."""
    before = torch.are_deterministic_algorithms_enabled()
    peaks = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        peaks.append(simulate_large({"ranks": 2, "ep": 2}, layers=1).peak_bytes)
    torch.use_deterministic_algorithms(before)
    assert (
        peaks[0] == pytest.approx(peaks[1], abs=64)
        and peaks[0] < simulate_large({"ranks": 2, "ep": 2, "deterministic": True}, layers=1).peak_bytes
    )


FEW_TOKENS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "gradients of tied embeddings": ({}, {"tie_embeddings": True}, {}, 128),
    "gradient of the embedding, PP2": ({"ranks": 2, "pp": 2}, {}, {}, 128),
    "adapters, TP4": ({"ranks": 4, "tp": 4}, {"heads": 32}, {"lora": {"rank": 64, "alpha": 16}}, 256),
    "adapters, a large vocabulary": ({}, {"tie_embeddings": True}, {"lora": {"rank": 8, "alpha": 16}}, 128),
    "masks of fp32, CP4": ({"ranks": 4, "cp": 4}, {}, {"precision": "fp32"}, 2048),
    "gradients in bf16, DP2": ({"ranks": 2}, {}, {"gradient_precision": "bf16"}, 128),
    "gradients in bf16, one rank, tied": ({}, {"tie_embeddings": True}, {"gradient_precision": "bf16"}, 128),
}  # fmt: skip
"""Layout, model, phase, row: what is a large part of the memory there, and was once planned wrong."""


IN_EVERY_RUN = ("gradients of tied embeddings", "adapters, TP4", "gradients in bf16, DP2")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in IN_EVERY_RUN else at_length("training", 4)) for x in FEW_TOKENS]
)
def test_memory_of_small_parts_is_planned(name: str) -> None:
    layout, model, phase, row = FEW_TOKENS[name]
    sizes = {**LARGE, "num_experts_per_tok": 2, "moe_intermediate_size": 128, **model}
    settings = config(layout, sizes, 4096 if row > 128 else 65536, row, **{"precision": "bf16", **phase})
    kind = SftConfig if "lora" in phase else TrainConfig
    result = rank_simulation.simulate(kind.model_validate(settings), 0)
    assert result.parameters == result.planned_parameters
    assert result.peak_bytes == pytest.approx(result.planned_peak_bytes, rel=0.05)


SLICED: dict[str, dict[str, Any]] = {
    "one": {},
    "recompute": {"recompute": "layer"},
    "CP2": {"ranks": 2, "cp": 2},
    "TP2 EP2 ETP1 PP2": {"ranks": 4, "tp": 2, "ep": 2, "etp": 1, "pp": 2},
}
SPLIT: dict[str, dict[str, Any]] = {
    "TP4": {"ranks": 4, "tp": 4},
    "TP2 EP2 PP2": {"ranks": 8, "tp": 2, "ep": 2, "pp": 2},
    "TP4 recompute": {"ranks": 4, "tp": 4, "recompute": "layer"},
}


def simulate_long_rows(layout: dict[str, Any], rank: int) -> tuple[TrainConfig, RankSimulation]:
    settings = config(layout, {**LARGE, "context_length": 6144}, 32768, 6144, precision="bf16")
    phase = TrainConfig.model_validate(settings)
    return phase, rank_simulation.simulate(phase, rank)


@pytest.mark.parametrize("name", SLICED if SOAK else ["TP2 EP2 ETP1 PP2"])
def test_memory_of_a_loss_by_slices_is_planned(name: str) -> None:
    """On the last rank; with all logits it would need a tenth more at least."""
    layout = SLICED[name]
    phase, sliced = simulate_long_rows(layout, layout.get("ranks", 1) - 1)
    assert sliced.peak_bytes == pytest.approx(sliced.planned_peak_bytes, rel=0.05)
    with mock.patch.object(Layout, "slices_loss", lambda *_: False):
        rows = Rows(phase.phase.micro_rows, phase.phase.sequence_length, phase.phase.pack)
        _, state, activations = rank_memory(phase, rows, layout.get("pp", 1) - 1)
    assert state + activations > 1.1 * sliced.peak_bytes


@pytest.mark.parametrize("name", SPLIT if SOAK else ["TP4"])
def test_memory_of_split_experts_in_long_rows_is_planned(name: str) -> None:
    """On the first and the last rank. A layer's experts then need more than the loss."""
    layout = SPLIT[name]
    for rank in {0, layout["ranks"] - 1} if SOAK else {0}:
        _, result = simulate_long_rows(layout, rank)
        assert result.peak_bytes == pytest.approx(result.planned_peak_bytes, rel=0.05)


@at_length("training", 400)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", MORE_MEMORY)
def test_memory_of_more_layouts_is_planned(name: str, precision: str) -> None:
    """The first and the last rank."""
    layout = MORE_MEMORY[name]
    for rank in {0, layout.get("ranks", 1) - 1}:
        require_planned_memory(simulate_large(layout, rank, precision, layers=4))


@at_length("training", 60)
def test_memory_of_a_published_run() -> None:
    """Qwen3-30B-A3B on 16 H100, EP16, rows of 4,096 tokens: 62.17 GiB at its peak (Megatron-Bridge's card), with one
    kernel for SwiGLU. Memory grows by the layer, so two small models give that of 48."""
    fused, model = transformer_config, dict(
        hidden_size=2048, heads=32, kv_heads=4, head_dim=128, experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, context_length=4096, tie_embeddings=False,
    )  # fmt: skip

    def configured(*arguments: Any) -> Any:
        built = fused(*arguments)
        built.bias_activation_fusion = True
        return built

    peaks = {}
    for layers in (2, 6):
        settings = config(
            {"ranks": 16, "ep": 16}, {**model, "layers": layers}, 151936, 4096, precision="bf16", pack=False
        )
        with mock.patch("stages.mcore.model.transformer_config", configured):
            peaks[layers] = rank_simulation.simulate(TrainConfig.model_validate(settings), 0).peak_bytes
    peak = peaks[2] + (48 - 2) * (peaks[6] - peaks[2]) / (6 - 2)
    assert peak / 2**30 == pytest.approx(62.17, rel=0.1)


@at_length("training", 15)
@pytest.mark.parametrize(("gradients", "times"), [("fp32", 2), ("bf16", 1)])
def test_weights_are_gathered_once_and_gradients_in_buckets(gradients: str, times: int) -> None:
    """Experts have an optimizer of their own; a later pipeline rank reduces in as many buckets as the first. Weights are
    bf16."""
    layout = {"ranks": 16, "pp": 2, "ep": 4, "overlap_gradients": True}
    model = {**LARGE, "layers": 4, "hidden_size": 2048, "moe_intermediate_size": 4096}
    settings = config(layout, model, VOCABULARY, 64, precision="bf16", gradient_precision=gradients)
    config_ = TrainConfig.model_validate(settings)
    buckets = []
    for rank in (0, 8):
        traffic = rank_simulation.simulate(config_, rank).traffic
        for group in ("dp_cp", "edp"):
            gathered, reduced = (
                sorted((x.bytes, x.calls) for x in traffic if (x.operation, x.group) == (operation, group))
                for operation in ("allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced")
            )
            assert gathered == [(size // times, calls) for size, calls in reduced]
        buckets.append(sum(calls for _, calls in reduced))
    assert buckets[0] == buckets[1] > 1


def test_a_step_of_more_micro_batches() -> None:
    """By hand: one and two micro-batches with an exchange each, and one reduction of gradients."""
    exchange, reduction = Collective("alltoall_base", "ep", 8, 10), Collective("reduce_scatter_base", "edp", 4, 20)
    steps = [[exchange, reduction], [exchange, exchange, reduction]]
    expected = (Traffic("alltoall_base", "ep", 8, 10, 64), Traffic("reduce_scatter_base", "edp", 4, 20, 1))
    assert rank_simulation._traffic(steps, [1, 2], 64) == expected
    assert rank_simulation._traffic([steps[0]] * 2, [1, 1], 1)[0].calls == 1


def test_a_rank_alone_copies_no_weights_and_no_gradients() -> None:
    """gloo's collectives of one rank would."""
    config_ = TrainConfig.model_validate(config({}, rank_simulation_fixtures.MODEL, 64, 32))
    with parallel.session(0) as ranks:
        engine = Engine(config_, ranks, config_.padded_vocab_size)
        engine.initialize()
        before = [x.clone() for x in engine.local_weights()]
        with CollectiveLog() as log:
            engine.step(rank_simulation.full_batch(config_, 2), 1e-3, lambda loss, norm: None)
        moved = [not torch.equal(a, b) for a, b in zip(before, engine.local_weights(), strict=True)]
    assert not [call for call in log.calls if call.operation.startswith(("allgather", "reduce_scatter"))]
    assert all(moved)


def test_a_rank_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match=r"rank 4 is not one of the phase's parallelism.ranks = 4"):
        simulate_large({"ranks": 4, "ep": 4}, 4)


def test_command(tmp_path: Path) -> None:
    body = json.loads(atom(tmp_path, "plan", "atom-tiny", "--only", "pretrain", "--simulate", "0", "--json").stdout)
    result = body["simulations"]["pretrain"]
    assert result["parameters"] == result["planned_parameters"] == body["stages"][0]["parameters"]["total"]
    assert result["peak_bytes"] > result["state_bytes"] > 0
    refusal = atom(tmp_path, "plan", "atom-tiny", "--only", "dedup", "--simulate", "0", code=2).stderr
    assert refusal == "atom: no stage of this plan can be simulated; choose a training phase with --only\n"
