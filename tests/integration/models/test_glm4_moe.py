"""GLM-4.5's shape behind the same interface: built, counted, trained in several layouts, exported, planned."""

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
from stages.export.variants import registry as variants
from stages.mcore.hf_mapping import from_hf, hf_config, to_hf
from stages.mcore.layout_check import problem
from stages.mcore.memory import memory_share
from stages.mcore.model import Initial, build, named_buffers, named_tensors
from stages.models import registry
from stages.models.mixture import Glm4MoeConfig
from stages.models.parallel_layout import Layout
from stages.train import parallel, rank_simulation
from stages.train.checkpoint import release_checkpoint
from stages.train.config import TrainConfig
from tests.fixtures import layout_fixtures, rl_fixtures, train_fixtures
from tests.fixtures.architecture_fixtures import GLM4_MOE as MODEL
from tests.fixtures.model_fixtures import load_tensors
from tests.fixtures.run_fixtures import at_length

# isort: split
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

VOCAB = train_fixtures.VOCAB
ONE_GROUP = {"n_group": 1, "topk_group": 1}
CHANGES: list[dict[str, Any]] = [
    {},
    {**ONE_GROUP, "use_qk_norm": True, "attention_bias": False, "partial_rotary_factor": 0.25, "n_shared_experts": 2},
    {**ONE_GROUP, "use_qk_norm": True, "yarn": {"factor": 4, "original_length": 64}},
    {"yarn": {"factor": 4, "original_length": 64}, "partial_rotary_factor": 1.0},
]
PUBLISHED = {"GLM-4.5": published.GLM_45, "GLM-4.5-Air": published.GLM_45_AIR}


def varied(model: Glm4MoeConfig, vocabulary: int = VOCAB) -> dict[str, torch.Tensor]:
    """Initial tensors with norms that differ from one and biases that differ from zero."""
    generator = torch.Generator().manual_seed(1)
    tensors = dict(Initial(model.shapes(vocabulary), model, 0))
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    return tensors


@pytest.mark.parametrize("change", CHANGES)
def test_what_megatron_builds_has_the_stated_tensors_and_the_logits_of_transformers(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """In rows of one and of several documents."""
    from transformers import AutoModelForCausalLM

    model = Glm4MoeConfig(**{**MODEL, **change})
    tensors, ids = varied(model), torch.randint(VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))
    places, lengths = torch.arange(200)[None], (130, 9, 61)
    starts = torch.cat([torch.full((n,), at) for n, at in zip(lengths, (0, 130, 139), strict=True)])[None]
    with parallel.session(0), torch.no_grad():
        chunks = build(model, VOCAB, packed=True)
        built = {n: tuple(t.shape) for n, t in [*named_tensors(chunks), *named_buffers(chunks).items()]}
        assert built == model.shapes(VOCAB)
        total = sum(math.prod(shape) for shape in built.values())
        experts = sum(math.prod(shape) for name, shape in built.items() if ".experts." in name)
        counts = model.parameters(VOCAB)
        assert (counts["total"], counts["active"]) == (total, total - experts // 2)
        load_tensors(chunks, model, VOCAB, tensors)
        alone, packed = (chunks[0].eval()(ids, places, documents) for documents in (None, starts))
    exported = dict(to_hf(tensors, model, VOCAB))
    release_checkpoint.save_tensors(tmp_path / "model.safetensors", exported)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model, VOCAB, 1, 0, "float32")))
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "Glm4MoeForCausalLM" and not any(loading.values())
    with torch.no_grad():
        parts = [theirs.eval()(part).logits for part in (ids, *ids.split(lengths, 1))]
    for ours, expected in ((alone, parts[0]), (packed, torch.cat(parts[1:], 1))):
        assert float((ours - expected).abs().max()) < 1e-5 and float(ours.std()) > 0.05
        assert float((ours.log_softmax(-1) - expected.log_softmax(-1)).abs().max()) < 1e-5
    assert theirs.config.num_nextn_predict_layers == 0
    back = dict(from_hf(exported, model))
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    with pytest.raises(ValueError, match=r"glm4_moe does not have: model\.layers\.2"):
        list(from_hf({**exported, "model.layers.2.extra": torch.zeros(1)}, model))


@pytest.mark.parametrize(("name", "total", "active"), [("GLM-4.5", 355, 32), ("GLM-4.5-Air", 106, 12)])
def test_the_published_models(name: str, total: int, active: int) -> None:
    """The parameters that transformers builds; the rounded counts of arXiv:2508.06471, table 1, which are those without
    table and head, of the larger model with the layer that predicts a further token; the cache of a long text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model, vocabulary = PUBLISHED[name], published.GLM_VOCABULARY
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**hf_config(model, vocabulary, 1, 0, "bfloat16"))
        )
    counts, biases = model.parameters(vocabulary), len(model.routing.layers) * model.experts  # buffers there
    assert counts["total"] == sum(p.numel() for p in theirs.parameters()) + biases
    assert memory_share(model, vocabulary, Layout(), 0).all == counts["total"] - biases
    further = 2 * model.hidden_size**2 + model.layer_memory(Layout(), model.layers - 1).all
    stated = counts["total"] - 2 * counts["embedding"] + (name == "GLM-4.5") * further
    assert (round(stated / 1e9), round((counts["active"] - 2 * counts["embedding"]) / 1e9)) == (total, active)
    assert model.cache_bytes(2, 1, 131_072) == 2 * 2 * 8 * 128 * model.layers * 131_072


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor = 0.3 gives 2.4 of head_dim = 8"),
        ({"tie_embeddings": True}, "class of the architecture glm4_moe without an output head; set it to false"),
        ({"n_group": 3}, "n_group = 3 does not divide experts = 8 into groups of at least 2; nearest: 2"),
        ({"kv_heads": 3}, "kv_heads = 3 does not divide heads = 4; nearest: 2 or 4"),
        ({"q_lora_rank": 8}, "q_lora_rank"),
    ],
)
def test_impossible_settings_get_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as error:
        registry.parse({**MODEL, **change})
    assert sentence in str(error.value)


def test_what_is_not_possible_is_refused_in_one_sentence() -> None:
    model = Glm4MoeConfig(**MODEL)
    assert "ep = 3 does not divide experts = 8" in str(problem(Layout(ranks=3, ep=3), model, VOCAB, [3]))
    assert "tp = 4 does not divide kv_heads = 2" in str(problem(Layout(ranks=4, tp=4), model, VOCAB, [4]))
    assert "GGUF files of the architecture glm4_moe" in str(variants.obstacle("gguf-f16", model))
    assert variants.obstacle("fp8", model) is None and model.export_obstacle() is None


def test_memory_of_a_simulated_rank_is_planned() -> None:
    """All that a rank of four allocates in a step, TP2 and EP2, in bf16."""
    sizes = dict(
        hidden_size=1024, heads=16, kv_heads=4, head_dim=64, moe_intermediate_size=512, intermediate_size=2048,
        context_length=1024, balance="batch",
    )  # fmt: skip
    row = {"sequence_length": 1024, "pack": True, "precision": "bf16", "parallelism": {"ranks": 4, "tp": 2, "ep": 2}}
    config = train_fixtures.config(batch={"micro_tokens": 1024, "global_tokens": 8 * 1024}, **row)
    settings = {**config, "model": {**MODEL, **sizes}, "padded_vocab_size": 8192}
    with mock.patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", None):
        result = rank_simulation.simulate(TrainConfig.model_validate(settings), 0)
    assert result.parameters == result.planned_parameters
    assert result.peak_bytes == pytest.approx(result.planned_peak_bytes, rel=0.02)


def test_a_policy_computes_what_its_sampler_drew(tmp_path: Path) -> None:
    """Answers behind a shared question, packed. The sampler is transformers' model."""
    model = Glm4MoeConfig(**MODEL)
    assert rl_fixtures.largest_gap(model, varied(model, rl_fixtures.PADDED), tmp_path) < 1e-4


@at_length("training", 70)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_layouts_train_alike(corpora: dict[bool, Path], packed: bool, tmp_path: Path) -> None:
    model = {**MODEL, "layers": 4, "use_qk_norm": packed}
    config = {**train_fixtures.config(batch=layout_fixtures.BATCH, pack=packed), "model": model}
    layout_fixtures.axes_agree(corpora[packed], config, tmp_path)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    train_fixtures.make(folder)
    train_fixtures.pack(folder, {})
    return {False: folder, True: folder / "packed"}


def test_it_learns_and_its_export_is_the_trained_model(corpora: dict[bool, Path], tmp_path: Path) -> None:
    """In packed rows; the export is read from its card."""
    settings = {**train_fixtures.config(pack=True), "model": MODEL}
    train_fixtures.pretrain(corpora[True], tmp_path / "work", tmp_path / "trained", settings)
    lines = [json.loads(line) for line in (tmp_path / "trained/training.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    inputs = {
        "checkpoint": write_manifest(tmp_path / "trained", "pretrain-glm"),
        "tokenizer": train_fixtures.tokenizer(tmp_path / "tokenizer"),
    }
    (tmp_path / "out").mkdir()
    config = hf.ExportConfig(model=MODEL, padded_vocab_size=VOCAB)
    hf.run(config, inputs, tmp_path, tmp_path / "out", train_fixtures.Reporter())  # type: ignore[arg-type]
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert parity["max_abs_logit_delta"] < 1e-5 and parity["tensors_compared"] == len(config.model.shapes(VOCAB))
    trained = release_checkpoint.Tensors(tmp_path / "out/model")
    for bias in ("mlp.gate.e_score_correction_bias", "self_attn.q_proj.bias"):
        assert float(trained[f"model.layers.1.{bias}"].abs().max()) > 1e-3, bias

    facts = read_model_facts(tmp_path / "out/model")
    counts, unused = (
        config.model.parameters(VOCAB),
        VOCAB - json.loads((tmp_path / "out/model/config.json").read_text())["vocab_size"],
    )
    padding = 2 * unused * config.model.hidden_size
    assert facts.has_experts and facts.architecture == "Glm4MoeForCausalLM"
    stated = facts.parameters.total, facts.parameters.active
    assert stated == (counts["total"] - padding, counts["active"] - padding)
    assert facts.config["n_routed_experts"] == 8 and facts.config["topk_group"] == 2
