"""Kinds of optimizers: the section of a recipe, states in checkpoints, and bytes in the memory plan."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.core.stage import identity
from stages.mcore.memory import owned_bytes, state_bytes
from stages.mcore.optimizer import ADAM, Adam, Optimizer, OptimizerSettings, Rule
from stages.models.base import MemoryShare
from stages.models.parallel_layout import Layout

SECTION = {"lr": 1e-3, "final_lr": 1e-4, "warmup_steps": 2}
SHAPES = {
    "embedding.word_embeddings.weight": (32, 4),
    "decoder.layers.0.input_layernorm.weight": (4,),
    "decoder.layers.0.mlp.linear_fc1.weight": (8, 4),
    "decoder.layers.0.mlp.router.weight": (2, 4),
    "decoder.layers.0.mlp.router.expert_bias": (2,),
}


class Momentum(OptimizerSettings):
    """A kind with one state of a matrix, as an extension may have."""

    kind: Literal["momentum"] = "momentum"
    matrices = Rule(("momentum_buffer",))


def test_section_without_kind_is_adam_and_writes_no_kind() -> None:
    adapter: TypeAdapter[OptimizerSettings] = TypeAdapter(Optimizer)

    plain, named = adapter.validate_python(SECTION), adapter.validate_python({"kind": "adam", **SECTION})

    assert plain == named and isinstance(plain, Adam)
    assert "kind" not in plain.model_dump() and "kind" not in identity(named)
    assert identity(Momentum(**SECTION))["kind"] == "momentum"


def test_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match="kind is not known; known: adam, muon"):
        TypeAdapter(Optimizer).validate_python({"kind": "lion", **SECTION})


def test_states_follow_the_rule_of_each_tensor() -> None:
    of_adam, of_momentum = Adam.state_shapes(SHAPES), Momentum.state_shapes(SHAPES)

    trained = [name for name in SHAPES if not name.endswith("expert_bias")]
    assert list(of_adam) == [f"{state}.{name}" for state in ADAM.states for name in trained]
    matrix = "decoder.layers.0.mlp.linear_fc1.weight"
    assert of_momentum[f"momentum_buffer.{matrix}"] == ("momentum_buffer", matrix, (8, 4))
    assert f"exp_avg.{matrix}" not in of_momentum
    for name in trained:
        assert (f"exp_avg_sq.{name}" in of_momentum) == (name != matrix)


def test_memory_counts_the_states_of_matrices_and_tables() -> None:
    share, layout = MemoryShare(dense=1000, experts=200, table=400), Layout()

    assert state_bytes(share, layout, "bf16", Adam) == 18 * 1200 == 6 * 1200 + owned_bytes(share, layout, Adam)
    assert owned_bytes(share, layout, Momentum) == 4 * 1200 + 4 * 800 + 8 * 400
    # Of four slices of 250 dense parameters, the first lies in the table.
    assert owned_bytes(share, Layout(ranks=4), Momentum) == 4 * 300 + 8 * 250 + 4 * 50
