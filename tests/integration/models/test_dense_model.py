"""A dense decoder behind the same interface: built, counted, trained in several layouts, resumed, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import RecipeError
from pipeline.core.store import write_manifest
from release.cards import tables
from release.facts import training
from release.facts.model_facts import read_model_facts
from stages.export import hf
from stages.mcore.hf_mapping import hf_config
from stages.mcore.layout_check import problem
from stages.mcore.memory import memory_share, state_bytes
from stages.mcore.model import build, named_tensors
from stages.mcore.optimizer import Adam
from stages.models.grouped_query import Qwen3Config
from stages.models.parallel_layout import Layout
from stages.train import parallel
from stages.train.checkpoint import release_checkpoint
from stages.train.config import TrainConfig
from stages.train.estimate import estimate
from tests.fixtures import layout_fixtures, train_fixtures
from tests.fixtures.run_fixtures import at_length

MODEL = {k: v for k, v in train_fixtures.MODEL.items() if k not in ("experts", "num_experts_per_tok", "aux_loss")}
MODEL = {name: value for name, value in MODEL.items() if name != "moe_intermediate_size"}
MODEL |= {"architecture": "qwen3", "intermediate_size": 48}
QWEN3_8B = Qwen3Config(
    architecture="qwen3", layers=36, hidden_size=4096, heads=32, kv_heads=8, head_dim=128, intermediate_size=12288,
    context_length=40960, rope_theta=1e6, tie_embeddings=False,
)  # fmt: skip
VOCABULARY = 151936


def settings(**phase: Any) -> dict[str, Any]:
    return {**train_fixtures.config(**phase), "model": MODEL}


@pytest.mark.parametrize("change", [{}, {"tie_embeddings": False}, {"kv_heads": 1, "layers": 3}])
def test_counts_and_shapes_are_those_that_megatron_builds(change: dict[str, Any]) -> None:
    model = Qwen3Config(**{**MODEL, **change})
    with parallel.session(0):
        built = {name: tuple(p.shape) for name, p in named_tensors(build(model, train_fixtures.VOCAB))}
    assert built == model.shapes(train_fixtures.VOCAB)
    counts = model.parameters(train_fixtures.VOCAB)
    assert counts["total"] == counts["active"] == sum(torch.Size(s).numel() for s in built.values())


def test_the_published_8b_model_has_the_parameters_that_transformers_builds() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**hf_config(QWEN3_8B, VOCABULARY, 1, 0, "bfloat16"))
        )
    total = QWEN3_8B.parameters(VOCABULARY)["total"]
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert total == sum(p.numel() for p in theirs.parameters()) == 8_190_735_360
    whole = memory_share(QWEN3_8B, VOCABULARY, Layout(), 0)
    assert whole.all == total and state_bytes(whole, Layout(), "bf16", Adam) == 18 * total
    halves = [memory_share(QWEN3_8B, VOCABULARY, Layout(ranks=4, tp=2, pp=2), rank).all for rank in (0, 1)]
    norms = 36 * (2 * 4096 + 2 * 128) + 4096  # whole on both tensor ranks
    assert 2 * sum(halves) == total + norms


def test_a_layout_that_splits_experts_is_refused() -> None:
    model = Qwen3Config(**MODEL)
    sentence = problem(Layout(ranks=2, ep=2), model, train_fixtures.VOCAB, [4])
    assert sentence == "parallelism.ep = 2 splits experts, and the model has none; leave it out"


@at_length("training", 15)
def test_layouts_train_alike(corpus: Path, tmp_path: Path) -> None:
    config = {**settings(batch=layout_fixtures.BATCH), "model": {**MODEL, "layers": 4}}
    (one,) = layout_fixtures.compare(corpus, {"one": {}}, 1, config, tmp_path / "one.json").values()
    layouts = {"TP2": {"tp": 2}, "PP2": {"pp": 2}, "DP2": {}}
    for name, curve in layout_fixtures.compare(corpus, layouts, 2, config, tmp_path / "two.json").items():
        layout_fixtures.agree(curve, one, 1e-5, name)
    assert one[0].keys() == {"loss", "grad_norm"} and one[4]["loss"] < one[0]["loss"]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    train_fixtures.pretrain(corpus, folder / "work", folder / "out", settings())
    return folder / "out"


def test_it_learns_and_its_log_states_nothing_about_experts(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "training.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert all(line.keys() == {"step", "tokens", "loss", "grad_norm", "lr"} for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] and not any("experts" in line for line in lines)
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["dead_experts"] == [] and summary["dropped_tokens"] == 0


def test_a_resumed_run_ends_in_the_same_bytes(corpus: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(
            corpus, tmp_path / "work", tmp_path / "first", settings(), train_fixtures.Reporter(7, 15)
        )
    train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "second", settings())
    assert train_fixtures.digest(tmp_path / "second") == train_fixtures.digest(trained)


def test_the_export_is_the_trained_model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "WHOLE_BYTES", 0)  # transformers loads one layer at a time, as of a large model
    inputs = {
        "checkpoint": write_manifest(trained, "pretrain-dense"),
        "tokenizer": train_fixtures.tokenizer(tmp_path / "tokenizer"),
    }
    (tmp_path / "out").mkdir()
    config = hf.ExportConfig(model=MODEL, padded_vocab_size=train_fixtures.VOCAB)
    hf.run(config, inputs, tmp_path, tmp_path / "out", train_fixtures.Reporter())  # type: ignore[arg-type]
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert parity["max_abs_logit_delta"] < 1e-5 and parity["tensors_compared"] == len(config.model.shapes(64))
    written = json.loads((tmp_path / "out/model/config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM"] and written["intermediate_size"] == 48


def test_its_card_shows_its_width_and_nothing_about_experts(tmp_path: Path) -> None:
    config = hf_config(Qwen3Config(**MODEL), 60, 1, 0, "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"model.norm.weight": torch.ones(32), "model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}
    release_checkpoint.save_tensors(tmp_path / "model.safetensors", tensors)
    facts = read_model_facts(tmp_path)
    assert not facts.has_experts and facts.parameters.total == facts.parameters.active == 32 + 48 * 32
    assert facts.config["intermediate_size"] == 48
    facts.training = {"pretrain": training.PhaseLog(1, 12, None, [], {}, [])}
    assert tables.verdict(facts) == []


def test_a_plan_states_its_cost() -> None:
    config = TrainConfig.model_validate(settings())
    cost = estimate(config)
    assert cost.parameters["total"] == cost.parameters["active"] and cost.training is not None
    assert cost.training.gflop_per_token * 1e9 == pytest.approx(
        6 * config.model.matrices(train_fixtures.VOCAB), rel=0.3
    )


def test_an_unknown_architecture_gets_one_sentence(tmp_path: Path) -> None:
    from pipeline.graph import recipe

    text = Path(recipe.__file__).parents[1].joinpath("recipes/atom-smoke-dense.yaml").read_text()
    path = tmp_path / "wrong.yaml"
    path.write_text(text.replace("architecture: qwen3 ", "architecture: qwen4 "))
    with pytest.raises(RecipeError) as error:
        recipe.load(str(path))
    assert "model.architecture = 'qwen4' is unknown; did you mean qwen3? Known: qwen3_moe, qwen3" in str(error.value)
    path.write_text(text.replace("  intermediate_size: 128", "  intermediate_size: 0"))
    with pytest.raises(RecipeError, match=r"model\.intermediate_size = 0"):
        recipe.load(str(path))
