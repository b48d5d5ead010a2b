"""GPT-OSS for Megatron, and as transformers' GptOssForCausalLM.

transformers' experts of a layer are stacked, their matrices transposed, and gate and up alternate in the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stages.mcore import layer_spec as kernels
from stages.mcore.architectures.grouped_query import map_from_hf, map_to_hf, megatron_attention
from stages.mcore.architectures.mixture import megatron_experts
from stages.mcore.megatron_compat import submodules_of
from stages.mcore.megatron_imports import RowParallelLinear, quick_gelu
from stages.models.base import ModelSpec
from stages.models.gpt_oss import GptOssConfig

LIMIT = 7.0
"""Where gate and up of an expert are cut off."""
SAME = {
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "self_attention.core_attention.softmax_offset": "self_attn.sinks",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.bias",
}
EXPERT = "mlp.experts.local_experts.{}."
GATE_UP, GATE_UP_BIAS = "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"
DOWN, DOWN_BIAS = "mlp.experts.down_proj", "mlp.experts.down_proj_bias"


def megatron(model: GptOssConfig) -> dict[str, Any]:
    return megatron_attention(model) | {
        "add_bias_linear": True,
        "activation_func": quick_gelu,
        "activation_func_clamp_value": LIMIT,
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
        "window_size": (model.sliding_window - 1, 0),
        "window_attn_skip_freq": 2,  # every second layer sees all
        "ffn_hidden_size": model.moe_intermediate_size,
        **megatron_experts(model),
        "moe_router_pre_softmax": False,  # softmax over the chosen experts
    }


def layer_spec(config: Any, virtual_stage: int | None = None, packed: bool = False) -> Any:
    block = kernels.layer_spec(config, virtual_stage, packed)
    if not kernels.uses_transformer_engine(config.params_dtype):
        # Layers of one kind share a spec, which is changed once.
        for layer in {id(layer): layer for layer in block.layer_specs}.values():
            experts = submodules_of(layer.submodules.mlp).experts
            submodules_of(experts).linear_fc2 = ExpertOutput
    return block


class ExpertOutput(RowParallelLinear):  # type: ignore[misc]
    """The second matrix of an expert.

    Megatron's MLP weights its bias and adds it in place, to a view that autograd does not let it change; and would
    sum its gradient over tensor ranks, which have experts of their own.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.bias.sequence_parallel = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output, bias = super().forward(x)
        return output.clone(), bias


def to_hf(tensors: Mapping[str, Tensor], model: GptOssConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    def rest(read: Callable[[str], Tensor], layer: int) -> Iterator[tuple[str, Tensor]]:
        yield GATE_UP, _stacked(model, lambda e: _alternating(read(EXPERT.format(e) + "linear_fc1.weight")).T)
        yield GATE_UP_BIAS, _stacked(model, lambda e: _alternating(read(EXPERT.format(e) + "linear_fc1.bias")))
        yield DOWN, _stacked(model, lambda e: read(EXPERT.format(e) + "linear_fc2.weight").T)
        yield DOWN_BIAS, _stacked(model, lambda e: read(EXPERT.format(e) + "linear_fc2.bias"))

    return map_to_hf(tensors, model, vocab_size, lambda layer: SAME, lambda layer: (), rest)


def from_hf(tensors: Mapping[str, Tensor], model: GptOssConfig) -> Iterator[tuple[str, Tensor]]:
    def rest(read: Callable[[str], Tensor], layer: int) -> Iterator[tuple[str, Tensor]]:
        for name, kind in (
            (GATE_UP, "linear_fc1.weight"),
            (GATE_UP_BIAS, "linear_fc1.bias"),
            (DOWN, "linear_fc2.weight"),
            (DOWN_BIAS, "linear_fc2.bias"),
        ):
            for e, tensor in enumerate(read(name)):
                full = tensor.T if tensor.dim() == 2 else tensor
                # Rows of gate and up take turns in transformers, and Megatron has gate above up.
                full = torch.cat((full[::2], full[1::2])) if kind.startswith("linear_fc1") else full
                yield EXPERT.format(e) + kind, full.contiguous()

    return map_from_hf(tensors, model, lambda layer: SAME, lambda layer: (), rest)


def _alternating(gate_above_up: Tensor) -> Tensor:
    """Rows of gate and of up in turns."""
    return torch.stack(gate_above_up.chunk(2), 1).flatten(0, 1)


def _stacked(model: GptOssConfig, read: Callable[[int], Tensor]) -> Tensor:
    """The tensors of all experts as one; each is read once."""
    first = read(0)
    out = first.new_empty((model.experts, *first.shape))
    for expert in range(model.experts):
        out[expert] = read(expert) if expert else first
    return out


def hf_config(model: GptOssConfig) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "intermediate_size": model.moe_intermediate_size,
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(model.layers)],
        "moe_intermediate_size": model.moe_intermediate_size,
        "num_attention_heads": model.heads,
        "num_experts": model.experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "num_key_value_heads": model.kv_heads,
        "num_local_experts": model.experts,
        "output_router_logits": False,
        # Megatron divides its balance by num_experts_per_tok and sums it over layers; Hugging Face does neither
        "router_aux_loss_coef": model.aux_loss * model.layers / model.num_experts_per_tok,
        "sliding_window": model.sliding_window,
        "swiglu_limit": LIMIT,
    }


SPEC = ModelSpec(megatron, layer_spec, to_hf, from_hf, hf_config, stacks_experts=True)
