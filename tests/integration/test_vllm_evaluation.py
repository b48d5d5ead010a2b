"""Evaluation by a real vLLM server: the same answers and log-probabilities as in the stage's process, up to rounding.

vLLM wants an environment of its own: `make test-vllm` makes one and names its interpreter in ATOM_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact, write_manifest
from stages.evaluation import benchmarks, harness, long_context, model_evaluation, pass_at_k, win_rate
from stages.evaluation.engine import Engine, open_model
from stages.evaluation.transformers_model import TransformersModel
from stages.evaluation.vllm_model import Client
from tests.fixtures import chat_fixtures, release_fixtures

pytestmark = pytest.mark.skipif(
    "ATOM_VLLM_PYTHON" not in os.environ, reason="vLLM needs an environment of its own; see `make test-vllm`"
)
VLLM = {"kind": "vllm"}
BITS = 1e-5
"""Largest difference of bits per byte, absolute; measured: 2e-7."""


def save_model(folder: Path, seed: int) -> None:
    """A random model of heads that vLLM's kernels for the CPU know, with the release's tokenizer."""
    release_fixtures.save_model(folder, seed)
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 32, "initializer_range": 0.3}
    torch.manual_seed(seed)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**config, **sizes})).save_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("inputs")
    made = chat_fixtures.make(folder)
    for seed, role in ((1, "model"), (2, "before")):
        save_model(folder / role / "model", seed)
        made[role] = write_manifest(folder / role, f"export-{role}")
    return made
