"""The optimizer's states in checkpoints, and their bytes in the memory plan."""

from __future__ import annotations

from stages.mcore.memory import owned_bytes, state_bytes
from stages.mcore.optimizer import STATES, state_shapes
from stages.models.base import MemoryShare
from stages.models.parallel_layout import Layout

SHAPES = {
    "embedding.word_embeddings.weight": (32, 4),
    "decoder.layers.0.input_layernorm.weight": (4,),
    "decoder.layers.0.mlp.linear_fc1.weight": (8, 4),
    "decoder.layers.0.mlp.router.expert_bias": (2,),
}


def test_every_trained_tensor_has_states() -> None:
    trained = [name for name in SHAPES if not name.endswith("expert_bias")]
    states = state_shapes(SHAPES)
    assert list(states) == [f"{state}.{name}" for state in STATES for name in trained]
    assert states["exp_avg.decoder.layers.0.mlp.linear_fc1.weight"][2] == (8, 4)


def test_memory_counts_the_states() -> None:
    share, layout = MemoryShare(dense=1000, experts=200, table=400), Layout()
    assert state_bytes(share, layout, "bf16") == 18 * 1200 == 6 * 1200 + owned_bytes(share, layout)
