"""The `model` section of a recipe: a decoder of the Qwen3-MoE shape, told in numbers.

Every layer is grouped-query attention with normalized queries and keys, followed by a mixture of SwiGLU experts of
which a token visits `num_experts_per_tok`; the first `dense_layers` have one SwiGLU instead. No torch here: `atom plan`
reads this file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import Context, Flag, Range
from pipeline.core.stage import Config, Renamed, added, operational
from stages.models.qwen3_moe.costs import AttentionCost, training_flops

PositiveInt = Annotated[int, Range(1, 2**31 - 1)]
"""A size: above zero, and small enough for every index that Megatron keeps."""
Layers = Annotated[int, Range(1, 1024, "Llama 3 405B: 126")]
Width = Annotated[int, Range(1, 2**17, "Llama 3 405B: 16384, inside its feed-forward layers 53248")]
Heads = Annotated[int, Range(1, 1024, "DeepSeek-V3: 128")]
Experts = Annotated[int, Range(1, 4096, "Kimi K2: 384, Switch-C: 2048")]
RopeBase = Annotated[float, Range(1, 1e12, "Llama 3: 5e5, Qwen2.5-1M: 1e7", above=True)]
LossWeight = Annotated[float, Range(0, 100, "DeepSeek-V3: 1e-4, OLMoE: 0.01")]
Precision = Literal["fp32", "bf16", "fp8-tensorwise", "fp8-blockwise", "mxfp8"]
"""What matrices are multiplied in. Weights of the optimizer, reductions, router, norms and losses are fp32 in all."""
PositiveCount = Annotated[int, Range(1, 1e15)]
MOST_PARAMETERS = 10**14
"""Of a model; the largest that were published have 2e12."""


Turns = Annotated[float, Range(0, 1e4, above=True)]


class Yarn(Config):
    """YaRN (Peng et al., 2023, arXiv:2309.00071): divides slow rotary frequencies by `factor`, keeps fast ones, and
    scales queries and keys by 0.1 ln(factor) + 1 each."""

    factor: Annotated[float, Range(1, 4096, "DeepSeek-V3: 40", above=True)] = Field(
        description="ratio of the new context length to original_length"
    )
    original_length: Context = Field(description="context length in tokens for which the frequencies were trained")
    beta_fast: Turns = Field(32.0, description="rotations within original_length above which a frequency is kept")
    beta_slow: Turns = Field(1.0, description="rotations within original_length below which a frequency is divided")

    @model_validator(mode="after")
    def _possible(self) -> Yarn:
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow = {self.beta_slow} is not below beta_fast = {self.beta_fast}; use 1 and 32")
        return self


class Rope(Config):
    """Rotary embedding from a phase on, where it differs from before."""

    theta: Annotated[RopeBase | None, Renamed("base")] = Field(
        None, description="base of the rotary frequencies; null: as in the previous phase"
    )
    yarn: Yarn | None = Field(None, description="YaRN scaling; null: none")


class StatedParameters(Config):
    """Expected parameter counts. A recipe whose model has other counts is refused."""

    total: PositiveCount = Field(description="all parameters, with embeddings")
    active: PositiveCount = Field(description="parameters that one token uses, with embeddings")


class ModelConfig(Config):
    """Dimensions and constants of the model. The padded vocabulary size is in the tokenizer section."""

    layers: Layers = Field(description="number of transformer layers")
    hidden_size: Width = Field(description="width of the residual stream")
    heads: Heads = Field(description="query heads")
    kv_heads: Heads = Field(description="key and value heads; must divide heads")
    head_dim: Annotated[int, Range(1, 1024, "usual: 64 to 256")] = Field(
        description="width of one head; must be even for the rotary embedding"
    )
    experts: Experts = Field(description="experts in each layer")
    num_experts_per_tok: Annotated[Experts, Renamed("experts_per_token")] = Field(
        description="experts to which each token is routed (top-k)"
    )
    moe_intermediate_size: Annotated[Width, Renamed("expert_ffn_size")] = Field(description="inner width of one expert")
    context_length: Context = Field(description="maximum sequence length in tokens")
    rope_theta: Annotated[RopeBase, Renamed("rope_base")] = Field(10000.0, description="base of the rotary frequencies")
    norm_eps: Annotated[float, Range(1e-12, 1e-2, "usual: 1e-6 or 1e-5")] = Field(
        1e-6, description="epsilon of every RMSNorm"
    )
    tie_embeddings: Flag = Field(True, description="share the weights of input embedding and output head")
    aux_loss: LossWeight = Field(
        1e-3, description="weight of the load-balancing loss, summed over layers as in Megatron-Core"
    )
    init_std: Annotated[float, Range(0, 1, "usual: 0.006 to 0.1", above=True)] = Field(
        0.02, description="standard deviation of the initial weights"
    )
    balance: Literal["batch", "sequence"] = added(
        "batch", "tokens over which aux_loss balances experts: those of a micro-batch or of each row"
    )
    router_bias_update_rate: Annotated[float, Range(0, 1, "DeepSeek-V3: 0.001"), Renamed("bias_rate")] = added(
        0.0, "change of an expert's bias per step in auxiliary-loss-free balancing; 0: off"
    )
    z_loss: LossWeight = added(
        0.0, "weight of the router z-loss (ST-MoE), the squared log-sum-exp of its logits; 0: off"
    )
    dense_layers: Annotated[int, Range(0, 1023)] = added(
        0, "number of first layers with a dense SwiGLU instead of experts"
    )
    intermediate_size: Annotated[Width | None, Renamed("dense_ffn_size")] = added(
        None, "inner width of the SwiGLU in dense layers"
    )
    shared_expert_intermediate_size: Annotated[Width | None, Renamed("shared_expert_ffn_size")] = added(
        None, "inner width of a shared expert that every token uses; null: none"
    )
    yarn: Yarn | None = added(None, "YaRN scaling of the rotary frequencies; null: none")
    stated_parameters: StatedParameters | None = operational(None, "expected parameter counts; null: not checked")

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            nearest = _nearest([n for n in range(1, self.heads + 1) if self.heads % n == 0], self.kv_heads)
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}; nearest: {nearest}")
        if self.head_dim % 2:
            near = f"{self.head_dim - 1} or {self.head_dim + 1}" if self.head_dim > 1 else "2"
            raise ValueError(f"head_dim = {self.head_dim} is odd, but rotary embedding turns pairs; nearest: {near}")
        if self.num_experts_per_tok == 1:
            raise ValueError(
                "num_experts_per_tok = 1 gives the router no gradient from the loss, since the one weight is always 1; "
                "nearest: 2"
            )
        if self.num_experts_per_tok > self.experts:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is more than experts = {self.experts}; "
                f"nearest: num_experts_per_tok {self.experts} or experts {self.num_experts_per_tok}"
            )
        if self.dense_layers >= self.layers:
            raise ValueError(
                f"dense_layers = {self.dense_layers} leaves no layer of {self.layers} with experts; "
                f"use at most {self.layers - 1}"
            )
        if bool(self.dense_layers) != bool(self.intermediate_size):
            raise ValueError(
                f"dense_layers = {self.dense_layers} and intermediate_size = {self.intermediate_size} go "
                "together; set both or neither"
            )
        return self

    def beyond_qwen3(self) -> str | None:
        """What of the model transformers' Qwen3MoeForCausalLM cannot express, in one sentence; None: nothing."""
        for field, value, what in (
            ("router_bias_update_rate", self.router_bias_update_rate, "no bias of experts and no sigmoid scores"),
            ("shared_expert_intermediate_size", self.shared_expert_intermediate_size, "no shared expert"),
        ):
            if value:
                return (f"model.{field} = {value} cannot be exported: Qwen3MoeForCausalLM, which transformers, vLLM "
                        f"and others load unchanged, has {what}; leave it out, or stop before the export")  # fmt: skip
        return None

    def with_rope(self, rope: Rope | None, context_length: int) -> ModelConfig:
        """The same tensors with the rotary embedding of a phase, for rows of up to `context_length` tokens."""
        changes: dict[str, object] = {"context_length": max(self.context_length, context_length)}
        if rope is not None:
            changes |= {"rope_theta": rope.theta or self.rope_theta, "yarn": rope.yarn}
        return self.model_copy(update=changes)

    def shapes(self, padded_vocab_size: int) -> dict[str, tuple[int, ...]]:
        """Every tensor's global name and full shape, in Megatron's own words and layout.

        `linear_qkv` holds, for each key/value head, its query heads, its key and its value; an expert's `linear_fc1`
        holds gate above up.
        """
        hidden, head = self.hidden_size, self.head_dim
        out: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (padded_vocab_size, hidden)}

        def swiglu(at: str, ffn: int) -> None:
            out[at + "linear_fc1.weight"] = (2 * ffn, hidden)
            out[at + "linear_fc2.weight"] = (hidden, ffn)

        for layer in range(self.layers):
            at = f"decoder.layers.{layer}."
            out[at + "input_layernorm.weight"] = (hidden,)
            out[at + "self_attention.linear_qkv.weight"] = ((self.heads + 2 * self.kv_heads) * head, hidden)
            out[at + "self_attention.q_layernorm.weight"] = (head,)
            out[at + "self_attention.k_layernorm.weight"] = (head,)
            out[at + "self_attention.linear_proj.weight"] = (hidden, self.heads * head)
            out[at + "pre_mlp_layernorm.weight"] = (hidden,)
            if layer < self.dense_layers:
                swiglu(at + "mlp.", self.intermediate_size or 0)
                continue
            out[at + "mlp.router.weight"] = (self.experts, hidden)
            if self.router_bias_update_rate:
                out[at + "mlp.router.expert_bias"] = (self.experts,)
            if self.shared_expert_intermediate_size:
                swiglu(at + "mlp.shared_experts.", self.shared_expert_intermediate_size)
            for expert in range(self.experts):
                swiglu(at + f"mlp.experts.local_experts.{expert}.", self.moe_intermediate_size)
        out["decoder.final_layernorm.weight"] = (hidden,)
        if not self.tie_embeddings:
            out["output_layer.weight"] = (padded_vocab_size, hidden)
        return out

    def parameters(self, padded_vocab_size: int) -> dict[str, int]:
        """Parameter counts in closed form: total, active (what one token uses), embedding (the input table)."""
        hidden, sparse = self.hidden_size, self.layers - self.dense_layers
        embedding = padded_vocab_size * hidden
        attention = 2 * hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 2 * hidden + 2 * self.head_dim
        router = self.experts * (hidden + bool(self.router_bias_update_rate))
        expert, always = (
            3 * hidden * self.moe_intermediate_size,
            3 * hidden * (self.shared_expert_intermediate_size or 0),
        )
        dense = self.dense_layers * 3 * hidden * (self.intermediate_size or 0)
        rest = embedding * (1 if self.tie_embeddings else 2) + hidden + self.layers * layer + dense
        rest += sparse * (router + always)
        return {
            "total": rest + sparse * self.experts * expert,
            "active": rest + sparse * self.num_experts_per_tok * expert,
            "embedding": embedding,
        }

    def matrices(self, padded_vocab_size: int) -> int:
        """Matrix parameters that one token meets: active ones with the output head, without input table and norms."""
        hidden, sparse = self.hidden_size, self.layers - self.dense_layers
        attention = 2 * hidden * self.head_dim * (self.heads + self.kv_heads)
        shared = self.shared_expert_intermediate_size or 0
        expert = 3 * hidden * (self.num_experts_per_tok * self.moe_intermediate_size + shared)
        dense = 3 * hidden * (self.intermediate_size or 0)
        layers = self.layers * attention + sparse * (self.experts * hidden + expert) + self.dense_layers * dense
        return layers + padded_vocab_size * hidden

    def flops_per_token(self, padded_vocab_size: int, sequence_length: int) -> float:
        """Training FLOPs of one token in rows of that length, as `stages.models.qwen3_moe.costs.training_flops` counts
        them."""
        attention = AttentionCost(self.layers, self.heads, self.head_dim, self.head_dim)
        return training_flops(self.matrices(padded_vocab_size), [attention], sequence_length)


def _nearest(choices: list[int], value: int) -> str:
    """The choices just below and just above `value`, as words."""
    below = [n for n in choices if n < value][-1:]
    above = [n for n in choices if n > value][:1]
    return " or ".join(str(n) for n in below + above)
