"""From the recipe's sizes to Megatron's GPTModel, and its tensors by their global names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F

from pipeline.errors import AtomError
from stages.model.config import ModelConfig
from stages.model.init import full_tensor
from stages.model.mcore import GPTModel, TransformerConfig, parallel_state
from stages.model.names import global_name
from stages.model.spec import layer_spec


def transformer_config(model: ModelConfig) -> TransformerConfig:
    """Megatron's configuration of the model: Qwen3-MoE's architecture in fp32, without dropout or biases."""
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.expert_ffn_size,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=model.experts,
        moe_ffn_hidden_size=model.expert_ffn_size,
        moe_router_topk=model.experts_per_token,
        moe_router_pre_softmax=False,  # softmax over the chosen experts = Hugging Face's norm_topk_prob
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=model.aux_loss,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=on_gpu,
        perform_initialization=False,  # `initialise` below
        use_cpu_initialization=not on_gpu,
        # kernels of Apex and Transformer Engine
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def build(model: ModelConfig, padded_vocab_size: int) -> GPTModel:
    """This rank's part of the model; its weights are not initialised yet. Needs `stages.train.parallel.session`."""
    config = transformer_config(model)
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config),
        vocab_size=padded_vocab_size,
        max_sequence_length=model.context_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
    )


def named_tensors(gpt: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(global name, parameter) of this rank's tensors, in the model's order."""
    layers = gpt.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    experts = gpt.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
    first_expert = parallel_state.get_expert_model_parallel_rank() * experts
    for local, parameter in gpt.named_parameters():
        yield global_name(local, first_layer, first_expert), parameter


def initialise(gpt: GPTModel, model: ModelConfig, padded_vocab_size: int, seed: int) -> None:
    """Fills this rank's tensors with the initial weights, which are the same in every layout."""
    shapes = model.shapes(padded_vocab_size)
    for name, parameter in named_tensors(gpt):
        parameter.data.copy_(full_tensor(name, shapes[name], model, seed))


def load_tensors(gpt: GPTModel, tensors: Mapping[str, torch.Tensor], origin: str) -> None:
    """Fills this rank's tensors from full tensors by global name.

    Raises AtomError, naming `origin`, if a tensor is missing, left over, or of another shape.
    """
    own = dict(named_tensors(gpt))
    for name in sorted(set(own) | set(tensors)):
        have = tuple(tensors[name].shape) if name in tensors else None
        want = tuple(own[name].shape) if name in own else None
        if have != want:
            raise AtomError(f"{origin} does not fit the model section of the recipe: {name} is {have}, not {want}")
        own[name].data.copy_(tensors[name])
