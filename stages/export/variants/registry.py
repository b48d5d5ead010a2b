"""The variants that a recipe's `release.variants` may name (variants.yaml), and their settings for loaders.

The settings are the contents of adapter_config.json, and of `quantization_config` in config.json. No torch: `atom plan`
and `atom verify` import this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.yaml_text import read_trusted
from stages.models.base import ModelConfig

VariantName = Literal["bf16", "gguf-f16", "gguf-q8_0", "gguf-q4_0", "fp8", "adapter", "distilled"]
Writer = Literal["safetensors", "gguf", "compressed-tensors", "peft"]
ADAPTER: VariantName = "adapter"
"""The variant of a model that is an adapter on an earlier one."""
DISTILLED: VariantName = "distilled"
"""The variant that is another model: a smaller one, into which the final model was distilled."""
GGUF_MODEL_TYPES = ("qwen3", "qwen3_moe")
"""The `model_type` in config.json of models for which llama.cpp's names are known (gguf_file.py)."""
STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Stacked tensors of a layer's experts. PEFT wraps a module once for each; the first one is inside."""


@dataclass(frozen=True)
class Variant:
    """A form of the released weights, as variants.yaml describes it."""

    writer: Writer
    encoding: str
    bits: float
    title: str
    serving: str


_CONTENT = read_trusted(Path(__file__).with_name("variants.yaml"))
VARIANTS: dict[VariantName, Variant] = {name: Variant(**row) for name, row in _CONTENT["variants"].items()}
QUANTIZATION_CONFIG: dict[str, Any] = _CONTENT["quantization_config"]


def obstacle(name: VariantName, model: ModelConfig) -> str | None:
    """The reason why a model has no such variant, in one sentence; None if it has."""
    if name == ADAPTER:
        return f"{name} is of a model whose sft has lora, and needs no mention; leave it out"
    if name == DISTILLED:
        return f"{name} is of a recipe with the section distillation, and needs no mention; leave it out"
    if VARIANTS[name].writer != "gguf":
        return None
    if model.architecture not in GGUF_MODEL_TYPES:
        return f"GGUF files of the architecture {model.architecture} are not known here; leave {name} out"
    if getattr(model, "dense_layers", 0):
        return f"llama.cpp's class of the architecture has experts in every layer; leave {name} out, or dense_layers"
    return None


def adapter_config(
    repo: str, rank: int, alpha: float, modules: Sequence[str] | None, parameters: Sequence[str] | None
) -> dict[str, Any]:
    """Returns adapter_config.json.

    Args:
        repo: The repository of the base on the Hub.
        rank: Of the adapter.
        alpha: Its scale, times the rank.
        modules: Last names of the adapted linear layers; None without any.
        parameters: Names of the adapted stacked tensors; None without any.
    """
    return {
        "base_model_name_or_path": repo,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": modules,
        "target_parameters": parameters,
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
