"""Rotary frequencies, their scaling and their export: three implementations that must agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.export import comparison, hf, streamed_model
from stages.mcore.hf_mapping import from_hf, hf_config, to_hf
from stages.mcore.model import full_tensor, transformer_config
from stages.mcore.row_tables import frequencies
from stages.models.base import Rope, Yarn
from stages.models.mixture import Qwen3MoeConfig
from stages.models.parallel_layout import Layout
from stages.train import parallel
from tests.fixtures import train_fixtures
from tests.fixtures.run_fixtures import SOAK, at_length

pytestmark = pytest.mark.numeric

PLAIN = Qwen3MoeConfig(**train_fixtures.MODEL)
YARN = Yarn(factor=4.0, original_length=64)
SHAPES = [
    (128, 1e6, Yarn(factor=4.0, original_length=32768)),
    (64, 1e4, Yarn(factor=16.0, original_length=4096)),
    (32, 5e5, Yarn(factor=8.0, original_length=512)),
    (8, 1e4, YARN),
    (32, 1e4, None),
]


@pytest.mark.parametrize(("dim", "base", "yarn"), SHAPES)
def test_frequencies_are_those_of_transformers_and_megatron(dim: int, base: float, yarn: Yarn | None) -> None:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        YarnRotaryEmbedding,
        _yarn_get_concentration_factor_from_config,
    )
    from transformers import Qwen3MoeConfig as HfConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    model = PLAIN.model_copy(update={"head_dim": dim, "rope_theta": base, "yarn": yarn, "context_length": 2048})
    computed, factor = frequencies(model)
    theirs = Qwen3MoeRotaryEmbedding(HfConfig(**hf_config(model, 64, 1, 0, "float32")))
    torch.testing.assert_close(computed, theirs.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    if yarn is not None:
        with parallel.session(0):
            config = transformer_config(model, Layout())
            rope = YarnRotaryEmbedding(
                dim, rotary_base=base, use_cpu_initialization=True, scaling_factor=yarn.factor,
                original_max_position_embeddings=yarn.original_length, beta_fast=yarn.beta_fast, beta_slow=yarn.beta_slow,
            )  # fmt: skip
            angles, _ = rope.get_emb(3)
            torch.testing.assert_close(angles[1, 0, 0, : dim // 2], computed, rtol=1e-6, atol=0)
            assert _yarn_get_concentration_factor_from_config(config) == pytest.approx(factor, rel=1e-12)


def test_the_next_phase_takes_over_the_base() -> None:
    longer = PLAIN.with_rope(Rope(theta=1e6), 256)
    assert (longer.rope_theta, longer.yarn, longer.context_length) == (1e6, None, 256)
    scaled = longer.with_rope(Rope(yarn=YARN), 1024)
    assert (scaled.rope_theta, scaled.yarn, scaled.context_length) == (1e6, YARN, 1024)
    assert scaled.with_rope(None, 512) == scaled, "a phase that says nothing changes nothing, and never shortens"
    assert scaled.shapes(64) == PLAIN.shapes(64)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return {"tokenizer": train_fixtures.tokenizer(tmp_path_factory.mktemp("t") / "tokenizer")}


LONG = {
    "yarn": {"context_length": 1024, "rope_theta": 5e4, "yarn": Yarn(factor=16.0, original_length=64)},
    "base": {"context_length": 1024, "rope_theta": 1e6},
    "dense first layer": {"dense_layers": 1, "intermediate_size": 48},
}


def test_a_row_spread_over_the_context_shows_its_rotary_embedding(inputs: dict, tmp_path: Path) -> None:
    """A short row stands for one of the whole context: it agrees, and a wrong scaling of far positions shows in it."""
    model = PLAIN.model_copy(update=LONG["yarn"])
    config = hf.ExportConfig(model=model, padded_vocab_size=train_fixtures.VOCAB, seed=3, parity_tokens=64)
    (tmp_path / "out").mkdir()
    hf.run(config, inputs, tmp_path, tmp_path / "out", train_fixtures.Reporter())  # type: ignore[arg-type]
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert (parity["longest_row"], parity["spread_over"], parity["tokens_compared"]) == (64, 1009, 64 + 32 + 12 + 8 + 4)
    assert parity["max_abs_logit_delta"] == pytest.approx(0, abs=1e-4)
    assert hf.estimate(config).flops < hf.estimate(config.model_copy(update={"parity_tokens": None})).flops / 16

    folder = tmp_path / "out/model"
    rows = comparison.parity_rows(train_fixtures.VOCAB, config.longest_row)[:1]
    stated, states = json.loads((folder / "config.json").read_text()), []
    for factor in (16.0, 12.0):
        stated["rope_parameters"]["factor"] = factor
        (folder / "config.json").write_text(json.dumps({**stated, "rope_scaling": None}))
        states += streamed_model.hidden_states(streamed_model.Whole(str(folder)), rows, [config.position_steps[64]])
    assert (states[0] - states[1]).abs().max() > 1e-3


@at_length("training", 30)
@pytest.mark.parametrize("change", LONG if SOAK else ["yarn"])
def test_transformers_gives_the_logits_at_full_length(
    change: str, inputs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exported folder in a fresh interpreter, on a row of the whole context (stages/export/streamed_model.py)."""
    if change != "base":
        monkeypatch.setattr(hf, "WHOLE_BYTES", 0)  # one layer at a time, as in a large model
    model = PLAIN.model_copy(update=LONG[change])
    config = hf.ExportConfig(model=model, padded_vocab_size=train_fixtures.VOCAB, seed=3)
    (tmp_path / "out").mkdir()
    hf.run(config, inputs, tmp_path, tmp_path / "out", train_fixtures.Reporter())  # type: ignore[arg-type]
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert parity["longest_row"] == model.context_length and parity["max_abs_logit_delta"] == pytest.approx(0, abs=1e-4)
    config_json = json.loads((tmp_path / "out/model/config.json").read_text())
    assert config_json["max_position_embeddings"] == model.context_length
    assert config_json["mlp_only_layers"] == list(range(model.dense_layers))
    if model.yarn:
        assert config_json["rope_parameters"]["rope_type"] == config_json["rope_scaling"]["rope_type"] == "yarn"
        config_json["rope_parameters"] = {
            "rope_theta": 5e4,
            "rope_type": "default",
        }  # as if the scaling had been forgotten
        (tmp_path / "out/model/config.json").write_text(json.dumps({**config_json, "rope_scaling": None}))
        code = (
            "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
            "m = A.from_pretrained(sys.argv[1]); torch.manual_seed(0)\n"
            "torch.save(m(torch.randint(6, 64, (1, 1024))).logits.detach(), sys.argv[2])\n"
        )
        logits = []
        for name in ("forgotten", "kept"):
            target = str(tmp_path / name)
            subprocess.run([sys.executable, "-c", code, str(tmp_path / "out/model"), target], check=True)
            logits.append(torch.load(target, weights_only=True))
            full = hf_config(model, train_fixtures.VOCAB, 1, 0, "float32")
            (tmp_path / "out/model/config.json").write_text(json.dumps(full))
        assert (logits[0] - logits[1]).abs().max() > 1e-2, "the comparison would notice"


def test_dense_layers_map_back() -> None:
    model = PLAIN.model_copy(update={"dense_layers": 1, "intermediate_size": 48})
    tensors = {n: full_tensor(n, s, model, 0) for n, s in model.shapes(train_fixtures.VOCAB).items()}
    restored = dict(from_hf(dict(to_hf(tensors, model, train_fixtures.VOCAB)), model))
    assert restored.keys() == tensors.keys() and all(torch.equal(restored[n], tensors[n]) for n in restored)
