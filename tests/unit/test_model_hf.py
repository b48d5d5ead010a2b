"""The mapping to Hugging Face's Qwen3-MoE is exact in both directions at any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.mcore.hf_mapping import from_hf, hf_config, to_hf
from stages.models.mixture import Qwen3MoeConfig
from tests.fixtures import train_fixtures

pytestmark = pytest.mark.numeric


@st.composite
def models(draw: st.DrawFn) -> Qwen3MoeConfig:
    kv_heads, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    experts = draw(st.integers(2, 4))
    return Qwen3MoeConfig(
        layers=draw(st.integers(1, 3)), hidden_size=draw(st.integers(1, 9)), heads=kv_heads * queries,
        kv_heads=kv_heads, head_dim=2 * draw(st.integers(1, 3)), experts=experts,
        num_experts_per_tok=draw(st.integers(2, experts)), moe_intermediate_size=draw(st.integers(1, 5)), context_length=16,
        tie_embeddings=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(1, 12), st.sampled_from([torch.float32, torch.bfloat16]))
def test_round_trip(model: Qwen3MoeConfig, vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    ours = {n: torch.randn(s, generator=generator).to(dtype) for n, s in model.shapes(vocab).items()}
    theirs = dict(to_hf(ours, model, vocab))
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in ours.values())
    restored = dict(from_hf(theirs, model))
    assert restored.keys() == ours.keys() and all(torch.equal(restored[n], ours[n]) for n in ours)


def test_padded_vocabulary_is_dropped() -> None:
    model = Qwen3MoeConfig(**{**train_fixtures.MODEL, "tie_embeddings": False})
    ours = {n: torch.randn(s) for n, s in model.shapes(64).items()}
    theirs = dict(to_hf(ours, model, 60))
    assert theirs["lm_head.weight"].shape == theirs["model.embed_tokens.weight"].shape == (60, 32)


def test_foreign_tensors_are_refused() -> None:
    model = Qwen3MoeConfig(**train_fixtures.MODEL)
    theirs = dict(to_hf({n: torch.zeros(s) for n, s in model.shapes(64).items()}, model, 64))
    with pytest.raises(ValueError, match=r"does not have: model\.layers\.0\.mlp\.shared"):
        list(from_hf({**theirs, "model.layers.0.mlp.shared": torch.zeros(1)}, model))
    del theirs["model.norm.weight"]
    with pytest.raises(KeyError, match=r"model\.norm"):
        list(from_hf(theirs, model))


def test_config_is_read_as_written() -> None:
    from transformers import Qwen3MoeConfig as HfConfig

    model = Qwen3MoeConfig(**{**train_fixtures.MODEL, "rope_theta": 50000.0})
    read = HfConfig.from_dict(hf_config(model, 60, 1, 0, "float32"))
    assert read.rope_parameters["rope_theta"] == 50000.0 and read.num_experts == 4 and read.head_dim == 8
    assert read.tie_word_embeddings and read.eos_token_id == 1 and read.pad_token_id == 0 and read.norm_topk_prob
    assert read.router_aux_loss_coef == pytest.approx(6.67e-3 * 2 / 2)
