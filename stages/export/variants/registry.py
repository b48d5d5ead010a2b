"""The variants that a recipe's `release.variants` may name, one line each, and the settings that they have for loaders.

The settings are the contents of adapter_config.json, and of `quantization_config` in config.json. No torch: `atom plan`
and `atom verify` import this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from stages.models.base import ModelConfig

VariantName = Literal[
    "bf16",
    "gguf-f32",
    "gguf-f16",
    "gguf-bf16",
    "gguf-q8_0",
    "gguf-q4_0",
    "gguf-q4_k_m",
    "fp8",
    "fp8-attention",
    "int8",
    "adapter",
]
Writer = Literal["safetensors", "gguf", "compressed-tensors", "peft"]
ADAPTER: VariantName = "adapter"
"""The variant of a model that is an adapter on an earlier one."""
GGUF_MODEL_TYPES = ("qwen3", "qwen3_moe")
"""The `model_type` in config.json of models for which llama.cpp's names are known (gguf_file.py)."""
SUPER_BLOCK = 256
"""Weights of a row that a K-quant of GGUF encodes together."""
LLAMA = "llama.cpp loads the file, with its tokenizer and chat template."
ACTIVATIONS = (
    "A server also rounds activations to 8 bits; the stated loss is of the weights alone. `evidence/runtimes.json` of "
    "the release says which programs ran it."
)
HEAD, ROUTERS, FEED_FORWARD = "lm_head", r"re:.*mlp\.gate$", r"re:.*\.mlp\..*"
STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Stacked tensors of a layer's experts. PEFT wraps a module once for each; the first one is inside."""


@dataclass(frozen=True)
class Variant:
    """A form of the released weights.

    writer: of its files. encoding: of the large matrices, as the writer knows it. bits: of a weight with its scales, at
    most. title: for people. serving: what serves it, and what of that was tried, in one or two sentences for its card.
    """

    writer: Writer
    encoding: str
    bits: float
    title: str
    serving: str


VARIANTS: dict[VariantName, Variant] = {
    "bf16": Variant(
        "safetensors", "bfloat16", 16, "bfloat16 safetensors", "transformers and vLLM load it as the original."
    ),
    "gguf-f32": Variant("gguf", "F32", 32, "GGUF F32", LLAMA),
    "gguf-f16": Variant("gguf", "F16", 16, "GGUF F16", LLAMA),
    "gguf-bf16": Variant("gguf", "BF16", 16, "GGUF BF16", LLAMA),
    "gguf-q8_0": Variant("gguf", "Q8_0", 8.5, "GGUF Q8_0", LLAMA),
    "gguf-q4_0": Variant("gguf", "Q4_0", 4.5, "GGUF Q4_0", LLAMA),
    "gguf-q4_k_m": Variant("gguf", "Q4_K_M", 4.9, "GGUF Q4_K_M", LLAMA),
    "fp8": Variant(
        "compressed-tensors",
        "fp8",
        8,
        "FP8 (compressed-tensors)",
        f"vLLM reads the format. Experts in FP8 need a GPU there, on which nothing was measured. {ACTIVATIONS}",
    ),
    "fp8-attention": Variant(
        "compressed-tensors",
        "fp8-attention",
        32,
        "FP8 attention (compressed-tensors)",
        f"vLLM reads the format. A CPU served a small model; no GPU was tried. {ACTIVATIONS}",
    ),
    "int8": Variant(
        "compressed-tensors",
        "int8",
        8,
        "INT8 (compressed-tensors)",
        f"vLLM reads the format. Experts in INT8 need a GPU there, or a processor with AMX. {ACTIVATIONS}",
    ),
    "adapter": Variant(
        "peft",
        "",
        32,
        "LoRA adapter (PEFT)",
        "PEFT puts it on its base, which `base.json` names by the digests of its weights.",
    ),
}
"""AWQ and GPTQ are not among them: both need calibration, and a GPU to be served (point 15 of the GPU kit)."""


def obstacle(name: VariantName, model: ModelConfig) -> str | None:
    """The reason why a model has no such variant, in one sentence; None if it has."""
    if name == ADAPTER:
        return f"{name} is of a model whose sft has lora, and needs no mention; leave it out"
    if VARIANTS[name].writer != "gguf":
        return None
    if model.architecture not in GGUF_MODEL_TYPES:
        return f"GGUF files of the architecture {model.architecture} are not known here; leave {name} out"
    if getattr(model, "dense_layers", 0):
        return f"llama.cpp's class of the architecture has experts in every layer; leave {name} out, or dense_layers"
    if name == "gguf-q4_k_m" and model.hidden_size % SUPER_BLOCK:
        return (
            f"{name} encodes {SUPER_BLOCK} weights of a row together, and model.hidden_size = {model.hidden_size} is "
            f"no multiple of it; leave {name} out"
        )
    return None


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
