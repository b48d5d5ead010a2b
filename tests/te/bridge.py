"""Loads the project's export with Megatron-Bridge, and compares it with the project's own model.

    python -m tests.te hopper tests.te.bridge '{"name": [{...model section...}, "provider.SETTING = VALUE"]}' FOLDER

For each model: exports random weights, loads the folder by AutoBridge, runs these lines on what it provides, and writes
FOLDER/report.json.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from safetensors.torch import load_file

from stages.export import comparison, hf
from stages.formats.tokenizer import END, PAD
from stages.mcore.hf_mapping import hf_config, to_hf
from stages.mcore.model import Initial
from stages.models import registry
from stages.models.base import ModelConfig
from stages.models.param_names import BUFFERS, global_name
from stages.train import parallel
from stages.train.checkpoint import release_checkpoint
from tests.fixtures import train_fixtures

VOCAB = train_fixtures.VOCAB
CPU: dict[str, Any] = {
    # no initialization: it draws from CUDA's generators, and the bridge fills every tensor anyway
    "use_cpu_initialization": True, "perform_initialization": False,
    "bf16": False, "fp16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32,
    "gradient_accumulation_fusion": False, "apply_rope_fusion": False, "bias_activation_fusion": False,
    "moe_permute_fusion": False,
}  # fmt: skip
"""What a machine without a GPU needs of a provider: no fused kernels, and fp32 to compare with."""


def random_weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights of which none is 0 or 1, as after training."""
    generator = torch.Generator().manual_seed(0)
    initial = Initial(model.shapes(VOCAB), model, 0)
    return {name: x + 0.05 * torch.randn(x.shape, generator=generator) for name, x in initial.items()}


def export(model: ModelConfig, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """What the export stage writes. Its gate, which compares with transformers, is not run here."""
    ids = hf.write_tokenizer(train_fixtures.tokenizer(folder.with_name("tokenizer")), folder, model.context_length)
    mapped = to_hf(tensors, model, VOCAB)
    release_checkpoint.write_shards(folder, release_checkpoint.MODEL, mapped)
    config = hf_config(model, VOCAB, ids[END], ids[PAD], "float32")
    (folder / "config.json").write_text(json.dumps(config))


def project_logits(
    model: ModelConfig, tensors: Mapping[str, torch.Tensor], rows: list[list[int]]
) -> list[torch.Tensor]:
    """Those of this project's layers without Transformer Engine."""
    engine = os.environ.pop("ATOM_TE_ON_CPU")
    try:
        return list(comparison.megatron_logits(tensors, model, VOCAB, rows, VOCAB))
    finally:
        os.environ["ATOM_TE_ON_CPU"] = engine


def load(folder: Path, section: dict[str, Any], lines: str) -> dict[str, Any]:
    """What the bridge makes of the export, compared with this project's model. lines: change `provider`."""
    model = registry.parse(section)
    expected = random_weights(model)
    export(model, expected, folder)
    rows = comparison.parity_rows(VOCAB, model.context_length)
    ours = project_logits(model, expected, rows)
    bridge = AutoBridge.from_hf_pretrained(str(folder))
    provider = bridge.to_megatron_provider(load_weights=True)
    exec(lines, {"bridge": bridge, "provider": provider})  # noqa: S102 - lines of tests/te/test_bridge.py
    for name, value in CPU.items():
        setattr(provider, name, value)
    with parallel.session(0), torch.no_grad():
        provider.finalize()
        (gpt,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        named = [*gpt.named_parameters(), *((n, x) for n, x in gpt.named_buffers() if n.endswith(BUFFERS))]
        theirs = {_name(name): tensor.detach() for name, tensor in named}
        gpt.eval()
        logits = [gpt(torch.tensor([row]), torch.arange(len(row))[None], None)[0].float() for row in rows]
        written = dict(bridge.export_hf_weights([gpt], cpu=True, show_progress=False))
    published = load_file(folder / "model.safetensors")
    return {
        "provider": type(provider).__name__,
        "tensors": len(expected),
        "different": sorted(n for n in expected if n not in theirs or not _equal(theirs[n], expected[n])),
        "unexpected": sorted(theirs.keys() - expected.keys()),
        "logits": max(float((a[:, :VOCAB] - b).abs().max()) for a, b in zip(logits, ours, strict=True)),
        "largest": max(float(x.abs().max()) for x in ours),
        "written back differently": sorted(n for n in published if n not in written or not torch.equal(written[n], published[n])),
        "written back in addition": sorted(written.keys() - published.keys()),
    }  # fmt: skip


def _name(name: str) -> str:
    """The global name. Only the bridge has Transformer Engine's norms of latents inside the matrix that follows."""
    return re.sub(r"linear_(q|kv)_up_proj\.layer_norm_weight", r"\1_layernorm.weight", global_name(name))


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether tensors are equal, but for rows of the vocabulary that only pad it."""
    return torch.equal(a[:VOCAB] if a.shape[1:] == b.shape[1:] and len(a) > len(b) == VOCAB else a, b)


def main(models: dict[str, tuple[dict[str, Any], str]], folder: Path) -> None:
    report = {}
    for number, (name, (section, lines)) in enumerate(models.items()):
        place = folder / str(number) / "model"
        place.mkdir(parents=True)
        report[name] = load(place, section, lines)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
