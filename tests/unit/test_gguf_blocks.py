"""Each encoding of a GGUF file gives back what it was given, as far as its bits go; the package `gguf` decodes it."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from pipeline.core.errors import AtomError
from stages.export.variants import gguf_file
from stages.export.variants.registry import VARIANTS, obstacle
from stages.models.mixture import Qwen3MoeConfig
from tests.fixtures import train_fixtures

RANDOM = np.random.default_rng(0)
LARGEST = {
    Kind.F32: 0.0,
    Kind.F16: 3e-4,
    Kind.Q8_0: 6e-3,
    Kind.Q4_0: 0.1,
}
"""Root mean square of the error of normal weights, by their own; measured, with a tenth to spare."""


@pytest.mark.parametrize("kind", LARGEST, ids=lambda kind: kind.name)
def test_what_is_decoded_is_near_what_was_encoded(kind: Kind) -> None:
    matrix = (RANDOM.standard_normal((3, 16, 512)) * 0.05).astype(np.float32)
    matrix[0, 3] = 0  # a row without weights
    matrix[1, 2] = np.abs(matrix[1, 2]) + 1  # one without zeros: its minimum is no part of it
    decoded = gguf_file.decode(gguf_file.encode(matrix, kind), kind)
    assert decoded.shape == matrix.shape and not decoded[0, 3].any()
    assert np.abs(decoded[1, 2] - matrix[1, 2]).max() < 0.12
    rest = np.delete(matrix[1:], 2, axis=1), np.delete(decoded[1:], 2, axis=1)
    error = np.sqrt(np.mean((rest[1] - rest[0]) ** 2) / np.mean(rest[0] ** 2))
    assert error <= LARGEST[kind]


def test_a_number_that_fp16_does_not_hold_is_refused() -> None:
    with pytest.raises(AtomError, match="a weight is larger than any number in fp16; take bf16 for this variant"):
        gguf_file.encode(np.full((1, 32), 1e6, np.float32), Kind.F16)


def test_vectors_routers_and_odd_rows_get_encodings_that_hold_them() -> None:
    def kind(encoding: str, name: str, *shape: int) -> Kind:
        return gguf_file.kind_of(encoding, name, shape)

    assert kind("Q4_0", "blk.0.attn_norm.weight", 256) == Kind.F32
    assert kind("Q4_0", "blk.0.ffn_gate_inp.weight", 8, 256) == Kind.F32
    assert kind("Q4_0", "blk.0.attn_q.weight", 64, 48) == Kind.F16
    assert kind("Q4_0", "blk.1.ffn_down_exps.weight", 4, 64, 96) == Kind.Q4_0


CONFIG = {"model_type": "qwen3_moe", "num_hidden_layers": 11}


def test_names_of_tensors() -> None:
    names = [f"model.layers.10.mlp.experts.{n}.up_proj.weight" for n in (10, 2, 0)]
    tensors = gguf_file.tensors_of([*names, "model.layers.2.input_layernorm.weight", "lm_head.weight"], CONFIG)
    assert [tensor.name for tensor in tensors] == [
        "output.weight",
        "blk.2.attn_norm.weight",
        "blk.10.ffn_up_exps.weight",
    ]
    assert [source.split(".")[5] for source in tensors[2].sources] == ["0", "2", "10"]
    with pytest.raises(AtomError, match=r"the tensor model.layers.0.mixer.A has no name in GGUF files"):
        gguf_file.tensors_of(["model.layers.0.mixer.A"], CONFIG)


def test_a_pre_tokenizer_that_llama_cpp_does_not_have_is_refused() -> None:
    other = {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated"}}
    for tokenizer in (other, {"pre_tokenizer": None}):
        with pytest.raises(AtomError, match="llama.cpp has no name for the pre-tokenizer in tokenizer.json"):
            gguf_file.pre_tokenizer(tokenizer)


def test_variants_that_a_model_cannot_have_are_refused_before_anything_runs() -> None:
    model = Qwen3MoeConfig(**train_fixtures.MODEL)
    dense = model.model_copy(update={"dense_layers": 1})
    assert "experts in every layer" in str(obstacle("gguf-f16", dense)) and obstacle("fp8", dense) is None
    assert [name for name in VARIANTS if obstacle(name, model)] == ["adapter", "distilled"], "which phases train"
