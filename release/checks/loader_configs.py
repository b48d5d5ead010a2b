"""Checks config.json and adapter_config.json, by which loaders choose the code that they run: each has the keys that
this tool writes, and no others.

A key such as `attn_implementation` names a kernel on the Hub, which transformers would download and run. Numbers are
not compared here: `--deep` loads the model and compares its outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.text import escaped
from release.facts.published_tables import read_json
from release.layout import LOSS
from stages.export.variants.registry import STACKED, VARIANTS, adapter_config, quantization_config
from stages.train.imported_weights import NAME as BASE

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
QUANTIZATION = "quantization_config"
COMMON = """
    architectures attention_bias attention_dropout bos_token_id dtype eos_token_id hidden_act hidden_size
    initializer_range intermediate_size max_position_embeddings model_type num_attention_heads num_hidden_layers
    num_key_value_heads pad_token_id rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings
    torch_dtype transformers_version use_cache vocab_size
"""
GROUPED_QUERY = "head_dim max_window_layers sliding_window use_sliding_window"
EXPERTS = "moe_intermediate_size num_experts num_experts_per_tok output_router_logits router_aux_loss_coef"
QWEN3_MOE = f"{GROUPED_QUERY} {EXPERTS} decoder_sparse_step mlp_only_layers norm_topk_prob"
SIGMOID_EXPERTS = """
    first_k_dense_replace moe_intermediate_size n_group n_routed_experts n_shared_experts norm_topk_prob
    num_experts_per_tok num_nextn_predict_layers routed_scaling_factor topk_group
"""
KEYS = {
    "qwen3": ("Qwen3ForCausalLM", GROUPED_QUERY),
    "qwen3_moe": ("Qwen3MoeForCausalLM", QWEN3_MOE),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        f"""
        {QWEN3_MOE} full_attention_interval layer_types linear_conv_kernel_dim linear_key_head_dim
        linear_num_key_heads linear_num_value_heads linear_value_head_dim partial_rotary_factor
        shared_expert_intermediate_size
        """,
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", f"{GROUPED_QUERY} {SIGMOID_EXPERTS} partial_rotary_factor use_qk_norm"),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        f"""
        {SIGMOID_EXPERTS} kv_lora_rank moe_layer_freq q_lora_rank qk_nope_head_dim qk_rope_head_dim rope_interleave
        scoring_func topk_method v_head_dim
        """,
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        f"{EXPERTS} head_dim layer_types num_local_experts sliding_window swiglu_limit",
    ),
}
"""{model_type: (the class in transformers, the keys beside COMMON)} of the architectures that this tool exports, as
`tests/unit/test_loader_configs.py` compares with the exporters."""
ROPE = """
    rope_theta rope_type factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim
    attention_factor partial_rotary_factor
"""
"""Keys of `rope_parameters` and `rope_scaling`."""
WORD = re.compile(r"[A-Za-z0-9_.]+")
"""A string in config.json. Names of repositories have a slash."""


def problems(folder: Path) -> Iterator[str]:
    """Sentences about the configs in the folder of a model or of a variant."""
    if (folder / CONFIG).is_file():
        yield from _config_problems(read_json(folder / CONFIG), _quantization(folder))
    if (folder / ADAPTER_CONFIG).is_file() and not _is_adapter_config(
        read_json(folder / ADAPTER_CONFIG), read_json(folder / BASE)["repo"]
    ):
        yield f"{ADAPTER_CONFIG} is not what this atom writes for an adapter of the model that {BASE} names"


def _quantization(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` that a folder's config.json should have; None: none."""
    if not (folder / LOSS).is_file():
        return None
    variant = VARIANTS.get(read_json(folder / LOSS)["variant"])
    return quantization_config(variant.encoding) if variant and variant.writer == "compressed-tensors" else None


def _config_problems(config: dict[str, Any], quantization: dict[str, Any] | None) -> Iterator[str]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in KEYS:
        yield f"{CONFIG} states model_type {escaped(str(model_type))}, and this atom exports no such model"
        return
    architecture, further = KEYS[model_type]
    if config.get("architectures") != [architecture]:
        yield f"{CONFIG} states other architectures than {architecture}, the class of {model_type}"
    if config.get(QUANTIZATION) != quantization:
        yield f"{CONFIG} has another {QUANTIZATION} than this atom writes for the weights"
    known = {*COMMON.split(), *further.split(), QUANTIZATION}
    for key, value in sorted(config.items()):
        if key not in known:
            yield f"{CONFIG} has the key {escaped(key)}, which this atom does not write for {model_type}"
        elif key != QUANTIZATION and not _is_plain(value, key in ("rope_parameters", "rope_scaling")):
            yield f"{CONFIG} has a value of {key} that this atom does not write"


def _is_plain(value: Any, is_rope: bool) -> bool:
    """Returns True for numbers, words, and lists of them; of the rotary embedding also for its table."""
    if isinstance(value, dict):
        return is_rope and value.keys() <= set(ROPE.split()) and all(_is_scalar(part) for part in value.values())
    return all(map(_is_scalar, value)) if isinstance(value, list) else _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return WORD.fullmatch(value) is not None
    return value is None or isinstance(value, int | float)


def _is_adapter_config(config: dict[str, Any], repo: str) -> bool:
    """Returns True if an adapter's config is what this tool writes for any rank, scale and linear layers."""
    rank, alpha, modules = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    parameters = config.get("target_parameters")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        return False
    if modules is not None and not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
        return False
    if any(not WORD.fullmatch(name) for name in modules or ()) or parameters not in (None, list(STACKED)):
        return False
    return config == adapter_config(repo, rank, alpha, modules, parameters)
