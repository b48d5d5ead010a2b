"""Bytes that a layer of Transformer Engine keeps for the backward pass in bf16, and how many fewer in 8 bits; prints the
measured and the planned difference a token as JSON, by model and precision.

    python -m tests.te hopper tests.te.saved fp8-tensorwise fp8-blockwise

Attention is TE's in PyTorch's operations here, which keeps scores: it cancels in the difference.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from stages.mcore.megatron_imports import Float16Module
from stages.mcore.model import build
from stages.models.base import ModelConfig, Precision, Rows
from stages.models.parallel_layout import Layout
from stages.models.registry import parse
from stages.train import parallel

TOKENS, VOCABULARY = 640, 128
COMMON = dict(hidden_size=256, heads=4, kv_heads=2, head_dim=64, context_length=TOKENS, tie_embeddings=False)
EXPERTS = dict(experts=4, num_experts_per_tok=2, moe_intermediate_size=384)
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"architecture": "qwen3", "intermediate_size": 512},
    "experts": EXPERTS,
    "sigmoid experts": {"architecture": "glm4_moe", **EXPERTS},
}


def saved(model: ModelConfig, precision: Precision) -> int:
    """Bytes of all distinct tensors that a forward pass saves, without weights."""
    sizes: dict[int, tuple[int, torch.Tensor]] = {}
    with parallel.session(0):
        (gpt,) = build(model, VOCABULARY, Layout(), precision)
        for parameter in gpt.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        net = Float16Module(gpt.config, gpt)
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in {0, *weights}:  # quantized weights are tensors without a storage
                sizes[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address is used again
            return tensor

        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(ids, torch.arange(TOKENS)[None], None, labels=ids, padding_mask=torch.zeros_like(ids, dtype=torch.bool))
    return sum(size for size, _ in sizes.values())


def main(precisions: list[Any]) -> None:
    differences = {}
    for name, settings in MODELS.items():
        one, two = (parse({**COMMON, **settings, "layers": layers}) for layers in (1, 2))
        layer = {precision: saved(two, precision) - saved(one, precision) for precision in ("bf16", *precisions)}
        planned = {
            precision: sum(two.layer_activations(Layout(), precision, Rows(1, TOKENS), 1, True).values())
            for precision in layer
        }
        for precision in precisions:
            measured = (layer["bf16"] - layer[precision]) / TOKENS
            differences[f"{name}, {precision}"] = (measured, planned["bf16"] - planned[precision])
    print(json.dumps(differences))


if __name__ == "__main__":
    main(sys.argv[1:])
