"""config.json of an exported model."""

from __future__ import annotations

from typing import Any

from pipeline.core.errors import AtomError
from stages.mcore.row_tables import frequencies
from stages.models.base import ModelConfig


def hf_config(model: ModelConfig, vocab_size: int, eos_token_id: int, pad_token_id: int, dtype: str) -> dict[str, Any]:
    """The content of config.json, with the entries of the architecture and the common ones.

    The rotary embedding has two forms: transformers 5 reads `rope_parameters`, older programs read `rope_theta` and
    `rope_scaling`. Raises AtomError for a property that the class in transformers cannot express.
    """
    if problem := model.export_obstacle():
        raise AtomError(problem)
    entries = model.spec().hf_config(model)
    rope = hf_rope(model) | entries.get("rope_parameters", {})
    return entries | {
        "bos_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
        "eos_token_id": eos_token_id,
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "max_position_embeddings": model.context_length,
        "num_hidden_layers": model.layers,
        "pad_token_id": pad_token_id,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        # The entries of transformers 4, which other readers of config.json still look for.
        "rope_scaling": None if model.yarn is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def hf_rope(model: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, which vLLM reads as well."""
    if model.yarn is None:
        return {"rope_theta": model.rope_theta, "rope_type": "default"}
    factor = frequencies(model)[1]
    return {
        "rope_theta": model.rope_theta,
        "rope_type": "yarn",
        "factor": model.yarn.factor,
        "original_max_position_embeddings": model.yarn.original_length,
        "beta_fast": model.yarn.beta_fast,
        "beta_slow": model.yarn.beta_slow,
        # vLLM scales complete heads only if no attention_factor is stated
        **({"mscale": 1.0, "mscale_all_dim": 1.0} if model.yarn_scales_heads else {"attention_factor": factor}),
    }
