"""A phase that computes with weights in MXFP4: its gradients, its resumption, its export, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pipeline.core.errors import RecipeError
from pipeline.core.store import write_manifest
from pipeline.core.yaml_text import parse_yaml
from pipeline.graph import recipe as recipes
from stages.export import hf
from stages.graph import problems
from stages.mcore.model import named_tensors
from stages.mcore.quantize import FORMATTED, RECIPES, quantize, to_weight_format
from stages.models import registry
from stages.train import parallel
from stages.train.config import TrainConfig
from stages.train.engine import Engine
from stages.train.rank_simulation import simulate
from tests.fixtures import ROOT, train_fixtures
from tests.fixtures.fp4_fixtures import scalar
from tests.fixtures.quantize_fixtures import spread_out
from tests.fixtures.train_fixtures import VOCAB

pytestmark = pytest.mark.numeric


def test_the_format_is_that_of_the_simulation() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = spread_out(40, 70, 2, dtype)
        assert torch.equal(to_weight_format(x), quantize(x, RECIPES["mxfp4"], "weight").values)


def test_a_simulated_rank_needs_what_the_plan_says() -> None:
    """The unrounded weights, one copy more than without the format."""
    peaks = {}
    for kind in (None, "mxfp4"):
        result = simulate(TrainConfig.model_validate(train_fixtures.config(weight_format=kind)), 0)
        peaks[kind] = result.peak_bytes, result.planned_peak_bytes
    (without, plan_without), (within, plan_within) = peaks.values()
    assert plan_within > plan_without and within > without
    assert within - without == pytest.approx(plan_within - plan_without, rel=0.25), peaks


def names(tensors: Any) -> set[str]:
    return {name for name in tensors if FORMATTED.fullmatch(name)}


@pytest.mark.parametrize("architecture", ["", "-dense", "-mla", "-window", "-hybrid"])
def test_the_format_holds_for_all_linear_layers(architecture: str) -> None:
    path = ROOT / f"pipeline/recipes/atom-smoke{architecture}.yaml"
    shapes = registry.parse(parse_yaml(path.read_bytes(), path.name)["model"]).shapes(320)
    matrices = {name for name, shape in shapes.items() if name.startswith("decoder.layers.") and len(shape) == 2}
    rest = {name.partition(".mlp.")[2] for name in matrices - names(matrices)}
    assert names(matrices) and rest <= {"router.weight", "shared_experts.gate_weight"}


def test_gradients_at_rounded_weights_move_the_unrounded_ones(corpus: Path) -> None:
    """One step of plain gradient descent by hand: the straight-through estimator."""
    from stages.train.precision_simulation.runner import byte_windows

    text = bytes(range(2, 50)) * 20
    batch = byte_windows(text, 4, 32, "a")
    results: dict[str, Any] = {}
    with parallel.session(0) as ranks:
        for kind in (None, "mxfp4"):
            engine = Engine(TrainConfig.model_validate(train_fixtures.config(weight_format=kind)), ranks, VOCAB)
            engine.initialize()
            weights = {name: tensor.detach().clone() for name, tensor in named_tensors(engine.chunks)}
            if kind is None:  # the reference: a model whose weights are rounded for good
                for name, tensor in named_tensors(engine.chunks):
                    if FORMATTED.fullmatch(name):
                        tensor.data.copy_(to_weight_format(tensor.data))
            loss = engine.evaluate(batch)
            figures = engine.step(batch, 0.0, lambda *_: None)
            grads = {name: tensor.main_grad.clone() for name, tensor in named_tensors(engine.chunks)}
            after = {name: tensor.detach().clone() for name, tensor in named_tensors(engine.chunks)}
            results[str(kind)] = loss, figures.loss, figures.grad_norm, grads
            if kind:
                assert names(weights) and all(torch.equal(after[name], weights[name]) for name in weights)
    (loss, trained, norm, grads), (loss_, trained_, norm_, grads_) = results.values()
    assert (loss, trained, norm) == (loss_, trained_, norm_)
    assert all(torch.equal(grads[name], grads_[name]) for name in grads)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mxfp4")
    settings = train_fixtures.config(weight_format="mxfp4", precision="bf16")
    train_fixtures.pretrain(corpus, folder / "work", folder / "out", settings)
    return folder / "out"


def test_checkpoints_keep_the_unrounded_weights_and_resume_bit_by_bit(
    corpus: Path, trained: Path, tmp_path: Path
) -> None:
    last = load_file(trained / "step-000012/model.safetensors")
    assert all(not torch.equal(to_weight_format(last[name]), last[name]) for name in names(last))
    settings = train_fixtures.config(weight_format="mxfp4", precision="bf16")
    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", settings, train_fixtures.Reporter(7, 15))
    train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out2", settings)
    assert train_fixtures.digest(tmp_path / "out2") == train_fixtures.digest(trained)


def test_the_export_holds_numbers_of_mxfp4(trained: Path, tmp_path: Path) -> None:
    """Every block of 32 inputs, after the mapping to transformers' tensors, by the second implementation."""
    config = {"model": train_fixtures.MODEL, "padded_vocab_size": VOCAB, "dtype": "bfloat16", "weight_format": "mxfp4"}
    inputs = {
        "checkpoint": write_manifest(trained, "pretrain-test"),
        "tokenizer": train_fixtures.tokenizer(tmp_path / "t"),
    }
    (tmp_path / "out").mkdir()
    hf.run(hf.ExportConfig.model_validate(config), inputs, tmp_path, tmp_path / "out", train_fixtures.Reporter())
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert parity["weight_format"] == "mxfp4" and parity["max_abs_logit_delta"] < 1e-4
    written = load_file(tmp_path / "out/model/model.safetensors")
    linear = {name for name in written if name.endswith("_proj.weight")}
    assert len(linear) == 2 * (4 + 3 * 4)
    for name in linear:
        exact = torch.from_numpy(scalar(written[name], "mxfp4", "weight", 1))
        assert torch.equal(exact, written[name].double()), name
    last = load_file(trained / "step-000012/model.safetensors")
    table = "embedding.word_embeddings.weight"
    assert torch.equal(written["model.embed_tokens.weight"], last[table].bfloat16()[:VOCAB])


def test_what_is_refused() -> None:
    with pytest.raises(ValidationError, match="parallelism.overlap_weights gathers them during it"):
        TrainConfig.model_validate(
            train_fixtures.config(weight_format="mxfp4", parallelism={"ranks": 2, "overlap_weights": True})
        )
    recipe = recipes.load("atom-tiny")
    config = recipe.config

    def wrong(**sections: Any) -> list[str]:
        changed = config.model_copy(update=sections)
        return [x for x in problems(recipe.__class__(**{**vars(recipe), "config": changed})) if "weight_format" in x]

    formatted = {
        name: getattr(config, name).model_copy(update={"weight_format": "mxfp4"}) for name in ("midtrain", "sft")
    }
    assert len(wrong(midtrain=formatted["midtrain"])) == 1
    (sentence,) = wrong(sft=formatted["sft"])
    assert sentence.startswith("sft.weight_format = mxfp4, but rlvr trains on without it")
    later = {"rlvr": None, "dpo": None, "reward_model": None, "online_rlhf": None}
    assert not wrong(**formatted, **later)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"precision": "nvfp4"}, "nvfp4 needs it"),
        ({"precision": "bf16", "bf16_layers": 1}, "no other precision has it"),
        ({"precision": "nvfp4", "bf16_layers": 2}, "leaves none of the model's 2 layers in nvfp4; use at most 1"),
    ],
)
def test_the_layers_in_bf16_are_stated(phase: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate(train_fixtures.config(**phase))


def test_the_card_states_them() -> None:
    from release.cards import training_tables

    facts: Any = SimpleNamespace(training={"pretrain": None, "sft": None})
    recipe = {"pretrain": {"precision": "nvfp4", "bf16_layers": 8}, "sft": {"weight_format": "mxfp4"}}
    table = training_tables.settings(recipe, facts)
    assert "| last layers in bf16, the others in NVFP4 | 8 |  |" in table
    assert "| format of published weights |  | mxfp4 |" in table


def test_nvfp4_without_its_hardware_is_one_sentence(corpus: Path, tmp_path: Path) -> None:
    settings = train_fixtures.config(precision="nvfp4", bf16_layers=1)
    with pytest.raises(RecipeError, match="precision = nvfp4 needs a GPU of the Blackwell generation or newer"):
        train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", settings)
