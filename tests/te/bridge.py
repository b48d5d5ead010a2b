"""Loads the project's export with Megatron-Bridge, and compares it with the project's own Megatron model.

    python -m tests.te hopper tests.te.bridge '{"name": {...model section...}}' FOLDER

For each model: exports random weights, loads the folder by AutoBridge, and writes FOLDER/report.json.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from safetensors.torch import load_file

from stages.export import comparison, hf
from stages.mcore.param_names import BUFFERS, global_name
from stages.mcore.weight_init import full_tensor
from stages.train import parallel
from tests.fixtures import train_fixtures

SEED = 3
CPU: dict[str, Any] = {
    # no initialization: it draws from CUDA's generators, and the bridge fills every tensor anyway
    "use_cpu_initialization": True, "perform_initialization": False,
    "bf16": False, "fp16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32,
    "gradient_accumulation_fusion": False, "apply_rope_fusion": False, "bias_activation_fusion": False,
    "moe_permute_fusion": False,
}  # fmt: skip
"""What a machine without a GPU needs of a provider: no fused kernels, and fp32 to compare with."""


def export(section: dict[str, Any], folder: Path) -> hf.ExportConfig:
    """The export stage on random weights, into folder/model; its own parity gate has passed."""
    tokenizer = train_fixtures.tokenizer(folder / "tokenizer")
    config = hf.ExportConfig.model_validate({"model": section, "padded_vocab_size": train_fixtures.VOCAB, "seed": SEED})
    hf.run(config, {"tokenizer": tokenizer}, folder, folder, train_fixtures.Reporter())  # type: ignore[arg-type]
    return config


def load(folder: Path, config: hf.ExportConfig) -> dict[str, Any]:
    """What the bridge makes of the export, compared with this project's model."""
    model, vocab = config.model, config.padded_vocab_size
    expected = {name: full_tensor(name, shape, model, SEED) for name, shape in model.shapes(vocab).items()}
    rows = comparison.parity_rows(vocab, model.context_length)
    ours = list(comparison.megatron_logits(expected, config.model, config.padded_vocab_size, rows, vocab))
    bridge = AutoBridge.from_hf_pretrained(str(folder / "model"))
    provider = bridge.to_megatron_provider(load_weights=True)
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
    published = load_file(folder / "model" / "model.safetensors")
    return {
        "provider": type(provider).__name__,
        "tensors": len(expected),
        "different": sorted(n for n in expected if n not in theirs or not _equal(theirs[n], expected[n], vocab)),
        "unexpected": sorted(theirs.keys() - expected.keys()),
        "logits": max(float((a[:, :vocab] - b).abs().max()) for a, b in zip(logits, ours, strict=True)),
        "largest": max(float(x.abs().max()) for x in ours),
        "written back differently": sorted(n for n in published if n not in written or not torch.equal(written[n], published[n])),
        "written back in addition": sorted(written.keys() - published.keys()),
    }  # fmt: skip


def _name(name: str) -> str:
    """The global name. Only the bridge has Transformer Engine's norms of latents, inside the matrix that follows."""
    return re.sub(r"linear_(q|kv)_up_proj\.layer_norm_weight", r"\1_layernorm.weight", global_name(name))


def _equal(a: torch.Tensor, b: torch.Tensor, vocab: int) -> bool:
    """Whether tensors are equal, but for rows of the vocabulary that only pad it."""
    return torch.equal(a[:vocab] if a.shape[1:] == b.shape[1:] and len(a) > len(b) == vocab else a, b)


def main(sections: dict[str, Any], folder: Path) -> None:
    report = {}
    for number, (name, section) in enumerate(sections.items()):
        place = folder / str(number)
        place.mkdir()
        report[name] = load(place, export(section, place))
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
