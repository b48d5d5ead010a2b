"""What a phase multiplies in: Megatron's words for each precision, bf16 training, and its export."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.errors import RecipeError
from pipeline.core.store import write_manifest
from stages.export import hf
from stages.mcore import model
from stages.mcore.hf_mapping import from_hf
from stages.mcore.megatron_imports import gpt_layer_specs
from stages.train.config import TrainConfig
from tests.fixtures import train_fixtures

pytestmark = pytest.mark.numeric

BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("fp32", {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}),
        ("bf16", BF16),
        ("fp8-tensorwise", {**BF16, "fp8": "hybrid", "fp8_recipe": "tensorwise"}),
        ("fp8-blockwise", {**BF16, "fp8": "e4m3", "fp8_recipe": "blockwise"}),
        ("mxfp8", {**BF16, "fp8": "e4m3", "fp8_recipe": "mxfp8"}),
        ("nvfp4", {**BF16, "fp4": "e2m1", "fp4_recipe": "nvfp4", "first_last_layers_bf16": True,
                   "num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 2}),
    ],
)  # fmt: skip
def test_megatrons_words(kind: Any, expected: dict[str, Any]) -> None:
    assert model.keywords(kind, 10) == expected
    from megatron.core.enums import Fp4Recipe, Fp8Recipe
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert set(expected) <= set(TransformerConfig.__dataclass_fields__)
    if "fp4_recipe" in expected:
        assert Fp4Recipe.nvfp4 == "nvfp4"
    if "fp8_recipe" in expected:
        assert expected["fp8_recipe"] in {
            str(getattr(x, "value", x)) for x in vars(Fp8Recipe).values() if isinstance(x, str)
        }


@pytest.mark.parametrize(
    ("kind", "gpu", "engine", "message"),
    [
        ("fp8-tensorwise", None, None, "needs a GPU of the Ada or Hopper generation or newer and Transformer Engine"),
        ("mxfp8", None, (True, ""), "this machine has no GPU; `atom simulate-precision`"),
        ("fp8-blockwise", (9, 0), None, "needs Transformer Engine, which cannot be imported here"),
        (
            "mxfp8",
            (9, 0),
            (False, "Device compute capability 10.0 or higher required."),
            "10.0 or higher required; cho",
        ),
        (
            "fp8-blockwise",
            (9, 0),
            (False, "CUDA version 12.9 or higher required."),
            "says Transformer Engine: CUDA ver",
        ),
        ("nvfp4", None, None, "needs a GPU of the Blackwell generation or newer and Transformer Engine"),
        (
            "nvfp4",
            (9, 0),
            (False, "Device compute capability 10.0 or higher required."),
            "lacks, says Transformer Engine",
        ),
        ("nvfp4", (10, 0), (True, ""), None),
        ("bf16", (7, 5), None, "Ampere generation or newer"),
        ("fp8-tensorwise", (8, 9), (True, ""), None),
        ("fp8-blockwise", (10, 0), (True, ""), None),
        ("mxfp8", (10, 0), (True, ""), None),
        ("bf16", None, None, None),
        ("bf16", (8, 0), None, None),
        ("fp32", (7, 0), None, None),
    ],
)
def test_what_a_machine_lacks(
    monkeypatch: Any, kind: Any, gpu: Any, engine: tuple[bool, str] | None, message: str | None
) -> None:
    """engine: what an installed Transformer Engine answers when asked for the format."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", engine is not None)
    questions = {question: lambda return_reason: engine for _, question in model.QUANTIZED.values()}
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", types.SimpleNamespace(**questions))
    problem = model.missing_requirement(kind)
    assert (
        problem is None
        if message is None
        else message in str(problem) and str(problem).startswith(f"precision = {kind} needs")
    )


def test_fp8_without_its_hardware_is_one_sentence(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="precision = mxfp8 needs a GPU .* `atom simulate-precision` shows here"):
        train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", train_fixtures.config(precision="mxfp8"))


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    train_fixtures.pretrain(corpus, folder / "work", folder / "out", train_fixtures.config(precision="bf16"))
    return folder / "out"


def test_bf16_trains_with_fp32_weights(trained: Path, undisturbed: Path) -> None:
    ours, exact = train_fixtures.losses(trained), train_fixtures.losses(undisturbed)
    assert ours != exact and ours == pytest.approx(exact, rel=5e-3)
    first = load_file(trained / "step-000000/model.safetensors")
    fp32 = load_file(undisturbed / "step-000000/model.safetensors")
    assert all(torch.equal(first[n], fp32[n]) for n in fp32), "the initial weights are not rounded"
    last = load_file(trained / "step-000012/model.safetensors")
    assert all(t.dtype == torch.float32 for t in last.values())
    count = sum(int((t != t.bfloat16().float()).sum()) for t in last.values())
    assert count > 0.9 * sum(t.numel() for t in last.values()), "the optimizer's weights have more than bf16's bits"
    for name in ("exp_avg", "exp_avg_sq"):
        moments = load_file(trained / "step-000012/optimizer.safetensors")
        assert all(moments[f"{name}.{n}"].dtype == torch.float32 for n in last)


def test_bf16_resumes_bit_by_bit(corpus: Path, trained: Path, tmp_path: Path) -> None:
    settings = train_fixtures.config(precision="bf16")
    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", settings, train_fixtures.Reporter(7, 15))
    train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out2", settings)
    assert train_fixtures.digest(tmp_path / "out2") == train_fixtures.digest(trained)


def test_gradients_are_summed_in_fp32(corpus: Path) -> None:
    from stages.train import parallel
    from stages.train.engine import Engine

    with parallel.session(0) as ranks:
        engine = Engine(
            TrainConfig.model_validate(train_fixtures.config(precision="bf16")), ranks, train_fixtures.VOCAB
        )
        parameters = list(engine.chunks[0].parameters())
        assert {p.dtype for p in parameters} == {torch.bfloat16}
        assert {p.main_grad.dtype for p in parameters} == {torch.float32}


def test_a_bf16_model_is_exported_as_it_computed(trained: Path, tmp_path: Path) -> None:
    """The file holds the optimizer's weights rounded once, which are those that the phase computed with."""

    config = {"model": train_fixtures.MODEL, "padded_vocab_size": train_fixtures.VOCAB, "dtype": "bfloat16"}
    inputs = {
        "checkpoint": write_manifest(trained, "pretrain-test"),
        "tokenizer": train_fixtures.tokenizer(tmp_path / "t"),
    }
    (tmp_path / "out").mkdir()
    hf.run(hf.ExportConfig.model_validate(config), inputs, tmp_path, tmp_path / "out", train_fixtures.Reporter())
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert parity["dtype"] == "bfloat16" and parity["max_abs_logit_delta"] == pytest.approx(0, abs=1e-4)
    assert json.loads((tmp_path / "out/model/config.json").read_text())["dtype"] == "bfloat16"
    written = load_file(tmp_path / "out/model/model.safetensors")
    restored = dict(from_hf(written, hf.ExportConfig.model_validate(config).model))
    last = load_file(trained / "step-000012/model.safetensors")
    assert all(torch.equal(restored[n], last[n].bfloat16()) for n in last)


def test_nvfp4_without_its_hardware_is_one_sentence(corpus: Path, tmp_path: Path) -> None:
    settings = train_fixtures.config(precision="nvfp4")
    with pytest.raises(RecipeError, match="precision = nvfp4 needs a GPU of the Blackwell generation or newer"):
        train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", settings)
