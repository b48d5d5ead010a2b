"""The settings of Megatron-Bridge's recipes and of this project's, for the same shapes, in the classes of megatron-core.

    python -m tests.te.bridge_recipes theirs|ours OUT.json

Writes {recipe: {"class.field": value}}. Theirs need Transformer Engine's layers, with stand-ins for its kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import json
import math
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes

PUBLISHED: dict[str, dict[str, Any]] = {
    "atom-30b-a3b": dict(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32),
    "atom-235b-a22b": dict(hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=94, num_attention_heads=64),
}  # fmt: skip
"""The config.json of Qwen3-30B-A3B and Qwen3-235B-A22B, from which Megatron-Bridge makes its model."""
COMMON: dict[str, Any] = dict(
    vocab_size=151936, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    max_position_embeddings=40960, rope_theta=1000000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
    router_aux_loss_coef=0.001, initializer_range=0.02, decoder_sparse_step=1, architectures=["Qwen3MoeForCausalLM"],
)  # fmt: skip
PAIRS: dict[str, tuple[str, str, str, int]] = {
    "30B, H100": ("atom-30b-a3b", "h100", "qwen3_30b_a3b_pretrain_16gpu_h100_bf16_config", 16),
    "30B, GB200": ("atom-30b-a3b", "gb200", "qwen3_30b_a3b_pretrain_8gpu_gb200_bf16_config", 8),
    "235B, H100": ("atom-235b-a22b", "h100", "qwen3_235b_a22b_pretrain_256gpu_h100_bf16_config", 256),
    "235B, GB200": ("atom-235b-a22b", "gb200", "qwen3_235b_a22b_pretrain_64gpu_gb200_bf16_config", 64),
}
"""This project's recipe; the bridge's GPU, recipe and number of GPUs."""


def leave_out_other_recipes() -> None:
    """The packages of all recipes import each of them, also those that need packages of no use here."""
    bridge = importlib.import_module("megatron.bridge")
    for name in ("recipes", "perf_recipes"):
        package = types.ModuleType(f"megatron.bridge.{name}")
        package.__path__ = [f"{folder}/{name}" for folder in bridge.__path__]
        sys.modules[package.__name__] = package


class OfPictures(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules for data with pictures, which the bridge's recipes import and these do not use."""

    def find_spec(self, name: str, *_: Any) -> Any:
        is_one = name.startswith("megatron.energon")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_one else None

    def exec_module(self, module: Any) -> None:
        module.__getattr__ = lambda name: mock.MagicMock()


Settings = dict[str, Any]
"""By "class.field", as JSON."""


def theirs(name: str, device: str, function: str, ranks: int) -> Settings:
    """A recipe of the bridge as its training uses it: with its settings of precision and overlap."""
    from megatron.bridge import AutoBridge
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(**COMMON, **PUBLISHED[name])
    module = importlib.import_module(f"megatron.bridge.perf_recipes.qwen.{device}.qwen3_moe")
    with mock.patch.object(AutoBridge, "from_hf_pretrained", lambda *_, **__: AutoBridge.from_hf_config(config)):
        recipe = getattr(module, function)()
    recipe.mixed_precision.finalize()
    recipe.mixed_precision.setup(recipe.model, recipe.optimizer, recipe.ddp)
    model = recipe.model
    split = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    recipe.comm_overlap.data_parallel_size = ranks // split
    recipe.comm_overlap.finalize()
    recipe.comm_overlap.setup(recipe.model, recipe.optimizer, recipe.ddp)
    for part in (recipe.model, recipe.optimizer):
        part.finalize()  # what Megatron derives
    return values("model", recipe.model) | values("ddp", recipe.ddp) | values("optimizer", recipe.optimizer)


def ours(name: str) -> Settings:
    """Pre-training of a recipe as a rank with a GPU and all fused kernels but Apex's has it."""
    from stages.mcore import gpu
    from stages.mcore import model as models
    from stages.mcore.optimizer import parts_of
    from stages.mcore.simulated_rank import simulated
    from stages.train.engine import Engine
    from stages.train.parallel import Ranks
    from tests.fixtures.order_of_collectives import shrink

    graph = dag.compose(recipes.load(name), Store(Path("none")), without_data=True)
    config = graph.nodes["pretrain"].config
    phase = config.phase
    with contextlib.ExitStack() as stack:
        for target, attribute, replacement in (
            (torch.cuda, "is_available", lambda: True),
            (gpu, "device", lambda: torch.device("cuda", 0)),
            (models, "uses_transformer_engine", lambda dtype: True),
        ):
            stack.enter_context(mock.patch.object(target, attribute, replacement))
        # Megatron would refuse fused kernels that it cannot import here, so they are added to the values
        with mock.patch.object(models, "_is_there", lambda place: not place):
            model = values("model", models.transformer_config(config.model, phase.parallelism, phase.precision))
        with mock.patch.object(models, "_is_there", lambda place: "grad_accum" not in place):
            fused = models.fusion_keywords(phase.parallelism, True, True)
        model |= {f"model.{name}": value for name, value in fused.items()}
    small = shrink(config)
    layout = small.phase.parallelism
    with simulated(layout, 0):
        engine = Engine(small, Ranks(0, layout.ranks, layout, 0, layout.data, False), small.padded_vocab_size)
        ddp, optimizer = engine.ddp[0].ddp_config, parts_of(engine.optimizer)[0].config
        return model | values("ddp", ddp) | values("optimizer", optimizer)


def values(kind: str, config: Any) -> Settings:
    """The fields of a config that are plain values."""
    plain = (bool, int, float, str, type(None), list, tuple, dict, torch.dtype)
    settings = {f"{kind}.{field.name}": getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: json.loads(json.dumps(x, default=str)) for name, x in settings.items() if isinstance(x, plain)}


def differences(a: Settings, b: Settings) -> dict[str, tuple[Any, Any]]:
    """Fields of both with other values."""
    return {name: (a[name], b[name]) for name in sorted(a.keys() & b.keys()) if not same(a[name], b[name])}


def same(a: Any, b: Any) -> bool:
    """Numbers within a millionth."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def main(kind: str, out: Path) -> None:
    if kind == "theirs":
        from tests.te import stand_ins

        stand_ins.install(stand_ins.HOPPER)  # before the bridge imports Megatron and Transformer Engine
        sys.meta_path.append(OfPictures())
        leave_out_other_recipes()
        settings = {pair: theirs(*source) for pair, source in PAIRS.items()}
    else:
        settings = {name: ours(name) for name in PUBLISHED}
    out.write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
