"""Settings that variants have for loaders: the contents of adapter_config.json, and of `quantization_config` in
config.json. No torch: `atom verify` imports this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

HEAD, ROUTERS, FEED_FORWARD = "lm_head", r"re:.*mlp\.gate$", r"re:.*\.mlp\..*"
STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Stacked tensors of a layer's experts. PEFT wraps a module once for each; the first one is inside."""


class Form(NamedTuple):
    """An encoding as compressed-tensors names it.

    Attributes:
        name: The format.
        type: The type of its numbers.
        ignore: Patterns of the linear layers that are not quantized.
    """

    name: str
    type: str
    ignore: tuple[str, ...]


FORMS = {
    "fp8": Form("float-quantized", "float", (HEAD, ROUTERS)),
    "fp8-attention": Form("float-quantized", "float", (HEAD, FEED_FORWARD)),
    "int8": Form("int-quantized", "int", (HEAD, ROUTERS)),
}
"""{encoding of a variant: its form}"""


def quantization_config(encoding: str) -> dict[str, Any]:
    """Returns `quantization_config` of config.json for an encoding."""
    form = FORMS[encoding]
    eight_bits = {
        "num_bits": 8,
        "type": form.type,
        "symmetric": True,
        "group_size": None,
        "actorder": None,
        "block_structure": None,
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False, "observer": "minmax"},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True, "observer": None},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form.name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(form.ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


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
