"""DeepSeek-V3's shape behind the same interface: built, counted, trained in several layouts, exported, planned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import ValidationError

from bench import published
from pipeline.core.store import write_manifest
from release.facts.model_facts import read_model_facts
from stages.export import hf
from stages.export.hf import Rounded
from stages.export.variants import registry as variants
from stages.generation.in_process import load_weights
from stages.mcore import layer_spec
from stages.mcore.fake_quantization import RECIPES, attach
from stages.mcore.hf_mapping import from_hf, hf_config, to_hf
from stages.mcore.layout_check import problem
from stages.mcore.memory import Activations, memory_share
from stages.mcore.model import Initial, build, named_buffers, named_tensors
from stages.models import registry
from stages.models.base import ModelConfig, Rows
from stages.models.deepseek_v3 import DeepseekV3Config
from stages.models.parallel_layout import Layout
from stages.train import parallel, rank_simulation
from stages.train.checkpoint import release_checkpoint
from stages.train.config import TrainConfig
from tests.fixtures import fake_rank_fixtures, layout_fixtures, train_fixtures
from tests.fixtures.model_fixtures import load_tensors
from tests.fixtures.run_fixtures import at_length

# isort: split
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

VOCAB = train_fixtures.VOCAB
MODEL: dict[str, Any] = dict(
    architecture="deepseek_v3", layers=2, hidden_size=32, heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=10, experts=8, num_experts_per_tok=4, n_group=4, topk_group=2, n_shared_experts=2,
    moe_intermediate_size=16, dense_layers=1, intermediate_size=40, routed_scaling_factor=2.5, balance="sequence",
    context_length=256, init_std=0.08, tie_embeddings=False,
)  # fmt: skip
YARN = {"factor": 4, "original_length": 64}
CHANGES: list[dict[str, Any]] = [
    {}, {"q_lora_rank": None, "tie_embeddings": True}, {"n_group": 1, "topk_group": 1, "v_head_dim": 16, "yarn": YARN},
]  # fmt: skip
SHAPES = {"DeepSeek-V3": (published.DEEPSEEK_V3, 129_280), "Kimi K2": (published.KIMI_K2, 163_840)}


def settings(**phase: Any) -> dict[str, Any]:
    return {**train_fixtures.config(**phase), "model": {**MODEL, "router_bias_update_rate": 0.01}}


def varied(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Initial tensors with norms that differ from one and biases that differ from zero."""
    generator = torch.Generator().manual_seed(1)
    tensors = dict(Initial(model.shapes(VOCAB), model, 0))
    for name, tensor in tensors.items():
        if name.endswith(("layernorm.weight", "expert_bias")):
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    return tensors


@pytest.mark.parametrize("change", CHANGES)
def test_what_megatron_builds_has_the_stated_tensors_and_the_logits_of_transformers(
    change: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = DeepseekV3Config(**{**MODEL, **change})
    tensors, ids = varied(model), torch.randint(VOCAB, (2, 200), generator=torch.Generator().manual_seed(0))
    with parallel.session(0):
        chunks = build(model, VOCAB)
        built = {n: tuple(t.shape) for n, t in [*named_tensors(chunks), *named_buffers(chunks).items()]}
        assert built == model.shapes(VOCAB)
        assert model.parameters(VOCAB)["total"] == sum(math.prod(shape) for shape in built.values())
        load_tensors(chunks, model, VOCAB, tensors)
        with torch.no_grad():
            ours = chunks[0].eval()(ids, torch.arange(200).expand_as(ids), None)
    exported = dict(to_hf(tensors, model, VOCAB))
    release_checkpoint.save_tensors(tmp_path / "model.safetensors", exported)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model, VOCAB, 1, 0, "float32")))
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    with torch.no_grad():
        delta = float((theirs.eval()(ids).logits - ours).abs().max())
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM" and not any(loading.values())
    stated = theirs.config.rope_parameters  # vLLM leaves the scores as they are if an attention_factor is stated
    assert "attention_factor" not in stated and (stated.get("mscale_all_dim") == 1.0) == (model.yarn is not None)
    assert delta < 1e-5 and float(ours.std()) > 0.05
    load_weights(theirs, {name: 2 * tensor for name, tensor in exported.items()})  # as a sampler's
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(theirs.state_dict()[bias], 2 * exported[bias])
    back = dict(from_hf(exported, model))
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    with pytest.raises(ValueError, match=r"deepseek_v3 does not have: model\.layers\.2"):
        list(from_hf({**exported, "model.layers.2.extra": torch.zeros(1)}, model))


def test_biases_that_choose_experts_stay_fp32_in_bf16_exports() -> None:
    tensors = Rounded(varied(DeepseekV3Config(**MODEL)), torch.bfloat16)
    kept = {name for name in tensors if tensors[name].dtype == torch.float32}
    assert kept == {"decoder.layers.1.mlp.router.expert_bias"}


@pytest.mark.parametrize("name", SHAPES)
def test_the_published_models_have_the_parameters_that_transformers_builds(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model, vocabulary = SHAPES[name]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**hf_config(model, vocabulary, 1, 0, "bfloat16"))
        )
    biases = len(model.routing.layers) * model.experts  # buffers there
    assert model.parameters(vocabulary)["total"] == sum(p.numel() for p in theirs.parameters()) + biases
    whole = memory_share(model, vocabulary, Layout(), 0)
    assert whole.all == model.parameters(vocabulary)["total"] - biases


def test_parameters_and_cache_are_those_that_were_published() -> None:
    """README_WEIGHTS.md of DeepSeek-V3: 671B, of which a token uses 36.6B with the head. arXiv:2405.04434, table 1: a
    token's cache is 9/2 heads of 128, as latent attention with 512 + 64 numbers has it."""
    model, vocabulary = SHAPES["DeepSeek-V3"]
    counts = model.parameters(vocabulary)
    assert counts["total"] == pytest.approx(671e9, rel=0.001)
    assert counts["active"] - counts["embedding"] == pytest.approx(36.6e9, rel=0.001)
    assert model.cache_bytes(2, 1, 10) == model.cache_bytes(2, 8, 10) == 10 * 2 * 61 * 4.5 * 128
    model, vocabulary = SHAPES["Kimi K2"]
    counts = model.parameters(vocabulary)
    assert counts["total"] == pytest.approx(1.026e12, rel=0.001)
    assert counts["active"] - counts["embedding"] == pytest.approx(32e9, rel=0.01)


def test_flops_are_those_that_were_published() -> None:
    """GFLOP of a token, by TFLOP/s and tokens/s of NVIDIA's tables; with multi-token prediction where they have it."""
    errors = {}
    for row in published.anchors():
        if (name := row["model"]) in ("DeepSeek-V3 without MTP", "Kimi K2"):
            model, vocabulary = SHAPES[name.removesuffix(" without MTP")]
            stated = 1e12 * float(row["tflops"]) / float(row["tokens_per_s"])
            errors[name] = model.flops_per_token(vocabulary, int(row["sequence_length"])) / stated - 1
    assert len(errors) == 2 and max(map(abs, errors.values())) < 0.005


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim = 5 is odd, but rotary embedding turns pairs; nearest: 4 or 6"),
        ({"n_group": 3}, "n_group = 3 does not divide experts = 8 into groups of at least 2; nearest: 2"),
        ({"topk_group": 5}, "topk_group = 5 is more than n_group = 4; lower it"),
        ({"topk_group": 1}, "topk_group = 1 does not fit num_experts_per_tok = 4"),
        ({"topk_group": 2, "num_experts_per_tok": 5}, "is more than the experts of topk_group = 2 groups of 2"),
        ({"kv_heads": 2}, "kv_heads"),
    ],
)
def test_impossible_settings_get_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as error:
        registry.parse({**MODEL, **change})
    assert sentence in str(error.value)


def test_what_is_not_possible_is_refused_in_one_sentence() -> None:
    model = DeepseekV3Config(**MODEL)
    assert problem(Layout(ranks=8, tp=8), model, VOCAB, [8]) == (
        "parallelism.tp = 8 does not divide heads = 4; nearest: 4"
    )
    assert "ep = 3 does not divide experts = 8" in str(problem(Layout(ranks=3, ep=3), model, VOCAB, [3]))
    assert variants.obstacle("gguf-f16", model) == (
        "GGUF files of the architecture deepseek_v3 are not known here; leave gguf-f16 out"
    )
    assert variants.obstacle("fp8", model) is None and model.export_obstacle() is None
    other = DeepseekV3Config(**{**MODEL, "norm_eps": 1e-5})
    assert str(other.export_obstacle()).startswith("model.norm_eps = 1e-05 cannot be exported: DeepseekV3ForCausalLM")


@pytest.mark.parametrize("layout", [
    Layout(ranks=8, tp=2, pp=2, ep=2), Layout(ranks=4, tp=4, ep=4, etp=1), Layout(ranks=4, pp=2, ep=2),
])  # fmt: skip
def test_parameters_of_a_rank_are_those_that_megatron_builds(layout: Layout) -> None:
    model = DeepseekV3Config(**{**MODEL, "layers": 4})
    for rank in range(0, layout.ranks, 3):
        place, part = fake_rank_fixtures.part(model, VOCAB, layout, rank, "bf16")
        expected = memory_share(model, VOCAB, layout, place.pipeline)
        experts = sum(math.prod(shape) for name, shape in part.shapes.items() if ".experts." in name)
        assert (part.trained, experts) == (expected.all, expected.experts)


@pytest.mark.parametrize("change", [{}, {"q_lora_rank": None, "v_head_dim": 12}])
def test_activations_are_what_autograd_saves(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests/integration/models/test_costs.py has it, in fp32."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 64, "intermediate_size": 320, "q_lora_rank": 192}
    model = DeepseekV3Config(**{**MODEL, **sizes, "kv_lora_rank": 128, "balance": "batch", **change})
    rows, saved = Rows(2, 256, packed=True), {}
    monkeypatch.setattr(layer_spec.RMSNorm, "forward", lambda self, x: _Norm.apply(x, self.weight))
    with parallel.session(0):
        torch.use_deterministic_algorithms(False)  # sums of tokens then keep nothing, as a GPU's
        (gpt,) = build(model, VOCAB, packed=True)
        for parameter in gpt.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        weights = {p.untyped_storage().data_ptr() for p in gpt.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        ids = torch.randint(VOCAB, (rows.rows, rows.length), generator=torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gpt(ids, torch.arange(rows.length).expand_as(ids), torch.zeros_like(ids), labels=ids,
                padding_mask=torch.zeros_like(ids, dtype=torch.bool))  # fmt: skip
    measured, tokens = sum(size for size, _ in saved.values()), rows.rows * rows.length
    saved.clear()
    predicted = Activations(model, VOCAB, Layout(), "fp32", rows, 1, 0).saved()
    assert measured == pytest.approx(predicted, rel=0.01, abs=64 * tokens)


def test_memory_of_a_simulated_rank_is_planned() -> None:
    """All that a rank of four allocates in a step, TP2 and EP2, in bf16."""
    sizes = dict(
        hidden_size=1024, heads=8, q_lora_rank=384, kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, moe_intermediate_size=512, intermediate_size=2048, context_length=1024, balance="batch",
    )  # fmt: skip
    row = {"sequence_length": 1024, "pack": True, "precision": "bf16", "parallelism": {"ranks": 4, "tp": 2, "ep": 2}}
    config = train_fixtures.config(batch={"micro_tokens": 1024, "global_tokens": 8 * 1024}, **row)
    settings = {**config, "model": {**MODEL, **sizes}, "padded_vocab_size": 8192}
    with mock.patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", None):
        result = rank_simulation.simulate(TrainConfig.model_validate(settings), 0)
    assert result.parameters == result.planned_parameters
    assert result.peak_bytes == pytest.approx(result.planned_peak_bytes, rel=0.02)


class _Norm(torch.autograd.Function):
    """An RMSNorm that saves its input, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.rms_norm(x, (x.shape[-1],)) * weight


def test_every_matrix_is_rounded() -> None:
    small = DeepseekV3Config(**MODEL)
    with parallel.session(0):
        chunks = build(small, VOCAB)
        roundings = attach(chunks, RECIPES["fp8-tensorwise"])
    kinds = {name for layer, name in roundings if layer == 1}
    matrices = [name for name, shape in small.attention_shapes().items() if len(shape) > 1]
    of_attention = {f"self_attention.{name.removesuffix('.weight')}" for name in matrices}
    assert kinds == of_attention | {
        f"mlp.{part}.linear_fc{n}" for part in ("experts", "shared_experts") for n in (1, 2)
    }


@at_length("training", 70)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_layouts_train_alike(corpora: dict[bool, Path], packed: bool, tmp_path: Path) -> None:
    config = settings(batch=layout_fixtures.BATCH, pack=packed)
    config["model"] |= {"layers": 4, "intermediate_size": 40}
    layout_fixtures.axes_agree(corpora[packed], config, tmp_path)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    train_fixtures.make(folder)
    train_fixtures.pack(folder, {})
    return {False: folder, True: folder / "packed"}


def test_it_learns_and_its_export_is_the_trained_model(corpora: dict[bool, Path], tmp_path: Path) -> None:
    """In packed rows; the export is compared at all distances of the context, and read from its card."""
    train_fixtures.pretrain(corpora[True], tmp_path / "work", tmp_path / "trained", settings(pack=True))
    lines = [json.loads(line) for line in (tmp_path / "trained/training.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    inputs = {
        "checkpoint": write_manifest(tmp_path / "trained", "pretrain-latent"),
        "tokenizer": train_fixtures.tokenizer(tmp_path / "tokenizer"),
    }
    (tmp_path / "out").mkdir()
    config = hf.ExportConfig(model=settings()["model"], padded_vocab_size=VOCAB)
    hf.run(config, inputs, tmp_path, tmp_path / "out", train_fixtures.Reporter())  # type: ignore[arg-type]
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert parity["max_abs_logit_delta"] < 1e-5 and parity["tensors_compared"] == len(config.model.shapes(VOCAB))
    biases = release_checkpoint.Tensors(tmp_path / "out/model")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert float(biases.abs().max()) > 0.01  # they were trained

    facts = read_model_facts(tmp_path / "out/model")
    counts = config.model.parameters(VOCAB)
    assert facts.has_experts and facts.architecture == "DeepseekV3ForCausalLM"
    assert (facts.parameters.total, facts.parameters.active) == (counts["total"], counts["active"])
    sizes = {"kv_lora_rank": 16, "n_routed_experts": 8, "qk_rope_head_dim": 4}
    assert sizes.items() <= facts.config.items()
