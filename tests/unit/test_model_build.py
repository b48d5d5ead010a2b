"""The model that Megatron builds is the one that the recipe's numbers say, whatever the layout."""

from __future__ import annotations

import pytest
import torch

from stages.mcore.model import build, full_tensor, named_tensors
from stages.models.mixture import Qwen3MoeConfig
from stages.models.param_names import global_name
from stages.train import parallel
from tests.fixtures import train_fixtures
from tests.fixtures.model_fixtures import load_tensors

pytestmark = pytest.mark.numeric

TINY = Qwen3MoeConfig(**train_fixtures.MODEL)


def initialize(gpt, model: Qwen3MoeConfig, seed: int) -> None:
    shapes = model.shapes(train_fixtures.VOCAB)
    load_tensors([gpt], model, train_fixtures.VOCAB, {n: full_tensor(n, s, model, seed) for n, s in shapes.items()})


@pytest.mark.parametrize("change", [{}, {"tie_embeddings": False}, {"kv_heads": 1, "layers": 3, "experts": 3}])
def test_counts_and_shapes_are_those_built(change: dict) -> None:
    model = Qwen3MoeConfig(**{**train_fixtures.MODEL, **change})
    with parallel.session(0):
        built = {name: tuple(p.shape) for name, p in named_tensors(build(model, train_fixtures.VOCAB))}
    assert built == model.shapes(train_fixtures.VOCAB)
    counts = model.parameters(train_fixtures.VOCAB)
    assert counts["total"] == sum(torch.Size(s).numel() for s in built.values())
    idle = (
        (model.experts - model.num_experts_per_tok) * model.layers * 3 * model.hidden_size * model.moe_intermediate_size
    )
    assert counts["active"] == counts["total"] - idle
    assert counts["embedding"] == train_fixtures.VOCAB * model.hidden_size


def test_published_sizes() -> None:
    """Qwen3-30B-A3B by its published configuration: 30.5B parameters in total, 3.3B active."""
    model = Qwen3MoeConfig(
        layers=48, hidden_size=2048, heads=32, kv_heads=4, head_dim=128, experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, context_length=32768, tie_embeddings=False,
    )  # fmt: skip
    counts = model.parameters(151936)
    assert counts["total"] == 30_532_122_624 and 3.3e9 < counts["active"] < 3.4e9


def test_initial_weights() -> None:
    with parallel.session(0):
        (gpt,) = build(TINY, train_fixtures.VOCAB)
        initialize(gpt, TINY, seed=3)
        for name, p in named_tensors([gpt]):
            assert torch.equal(p, full_tensor(name, tuple(p.shape), TINY, seed=3))
    model = TINY.model_copy(update={"init_std": 0.1, "layers": 8})
    wide = (400, 400)
    assert full_tensor("decoder.layers.0.mlp.router.weight", wide, model, 0).std().item() == pytest.approx(
        0.1, rel=0.02
    )
    scaled = full_tensor("decoder.layers.0.self_attention.linear_proj.weight", wide, model, 0)
    assert scaled.std().item() == pytest.approx(0.1 / 4, rel=0.02)
    experts = [full_tensor(f"decoder.layers.0.mlp.experts.local_experts.{e}.linear_fc2.weight", wide, model, 0)
               for e in range(2)]  # fmt: skip
    assert not torch.equal(*experts)
    assert not torch.equal(scaled, full_tensor("decoder.layers.0.self_attention.linear_proj.weight", wide, model, 1))


def test_global_names() -> None:
    expert = "decoder.layers.4.mlp.experts.local_experts.9."
    for local, name in {
        "module.decoder.layers.1.mlp.router.weight": "decoder.layers.5.mlp.router.weight",
        "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight": expert + "linear_fc1.weight",
        "decoder.layers.0.mlp.experts.linear_fc2.weight1": expert + "linear_fc2.weight",
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.4.input_layernorm.weight",
        "decoder.final_layernorm.weight": "decoder.final_layernorm.weight",
    }.items():
        assert global_name(local, layers=[4, 5], first_expert=8) == name


def test_ids_that_pad_the_vocabulary_have_no_probability() -> None:
    """However large their logits would be, the loss is that over the real vocabulary and their rows get no gradient."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    padded, table = train_fixtures.VOCAB + 64, "embedding.word_embeddings.weight"
    full = {n: full_tensor(n, s, TINY, 0) for n, s in TINY.shapes(padded).items()}
    full[table][train_fixtures.VOCAB :] = 3.0
    ids = torch.randint(6, train_fixtures.VOCAB, (1, 17), generator=torch.Generator().manual_seed(0))
    losses = {}
    with parallel.session(0):
        for size in (train_fixtures.VOCAB, padded):
            (gpt,) = build(TINY, size, vocab_size=train_fixtures.VOCAB)
            load_tensors([gpt], TINY, size, {**full, table: full[table][:size]})
            losses[size] = gpt(ids[:, :-1], torch.arange(16)[None], None, labels=ids[:, 1:])
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as Megatron's schedule does before a backward pass
        losses[padded].sum().backward()
        gradient = dict(named_tensors([gpt]))[table].grad
    assert torch.allclose(losses[padded], losses[train_fixtures.VOCAB], rtol=1e-5)
    assert not gradient[train_fixtures.VOCAB :].any() and gradient[: train_fixtures.VOCAB].any()


def test_padding_changes_no_real_position() -> None:
    with parallel.session(0), torch.no_grad():
        (gpt,) = build(TINY, train_fixtures.VOCAB)
        initialize(gpt, TINY, seed=0)
        gpt.eval()
        ids = torch.randint(6, train_fixtures.VOCAB, (1, 16), generator=torch.Generator().manual_seed(0))
        padded = torch.cat([ids, torch.zeros(1, 8, dtype=torch.long)], 1)
        alone, beside = (gpt(x, torch.arange(x.shape[1])[None], None, padding_mask=x == 0) for x in (ids, padded))
        assert torch.allclose(alone, beside[:, :16], atol=1e-5)
