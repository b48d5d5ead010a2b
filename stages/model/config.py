"""The `model` section of a recipe: a decoder of the Qwen3-MoE shape, told in numbers.

Every layer is grouped-query attention with normalised queries and keys, followed by a mixture of SwiGLU experts of
which a token visits `experts_per_token`. No torch here: `atom plan` reads this file.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.stage import Config

PositiveInt = Annotated[int, Field(gt=0, lt=2**31, strict=True)]
"""A size: above zero, and small enough for every index that Megatron keeps."""


class ModelConfig(Config):
    """Sizes and constants of the model; the vocabulary's padded size stands in the tokenizer section."""

    layers: PositiveInt = Field(description="number of transformer layers")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    heads: PositiveInt = Field(description="query heads")
    kv_heads: PositiveInt = Field(description="key and value heads; a divisor of heads")
    head_dim: PositiveInt = Field(description="width of one head; even, since rotary embedding turns pairs")
    experts: PositiveInt = Field(description="experts in each layer")
    experts_per_token: PositiveInt = Field(description="experts that one token visits (top-k)")
    expert_ffn_size: PositiveInt = Field(description="inner width of one expert")
    context_length: PositiveInt = Field(description="longest sequence the model is made for")
    rope_base: float = Field(10000.0, gt=1, description="base of the rotary frequencies")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of every RMSNorm")
    tie_embeddings: bool = Field(True, description="output head = input embedding")
    aux_loss: float = Field(
        1e-3, ge=0, description="weight of the load-balancing loss, summed over layers as Megatron-core defines it"
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            nearest = _nearest([n for n in range(1, min(self.heads, 4096) + 1) if self.heads % n == 0], self.kv_heads)
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}; nearest: {nearest}")
        if self.head_dim % 2:
            near = f"{self.head_dim - 1} or {self.head_dim + 1}" if self.head_dim > 1 else "2"
            raise ValueError(f"head_dim = {self.head_dim} is odd, but rotary embedding turns pairs; nearest: {near}")
        if self.experts_per_token == 1:
            raise ValueError(
                "experts_per_token = 1 gives the router no gradient from the loss, since the one weight is always 1; "
                "nearest: 2"
            )
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} is more than experts = {self.experts}; "
                f"nearest: experts_per_token {self.experts} or experts {self.experts_per_token}"
            )
        return self

    def shapes(self, padded_vocab_size: int) -> dict[str, tuple[int, ...]]:
        """Every tensor's global name and full shape, in Megatron's own words and layout.

        `linear_qkv` holds, for each key/value head, its query heads, its key and its value; an expert's `linear_fc1`
        holds gate above up.
        """
        hidden, head, ffn = self.hidden_size, self.head_dim, self.expert_ffn_size
        out: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (padded_vocab_size, hidden)}
        for layer in range(self.layers):
            at = f"decoder.layers.{layer}."
            out[at + "input_layernorm.weight"] = (hidden,)
            out[at + "self_attention.linear_qkv.weight"] = ((self.heads + 2 * self.kv_heads) * head, hidden)
            out[at + "self_attention.q_layernorm.weight"] = (head,)
            out[at + "self_attention.k_layernorm.weight"] = (head,)
            out[at + "self_attention.linear_proj.weight"] = (hidden, self.heads * head)
            out[at + "pre_mlp_layernorm.weight"] = (hidden,)
            out[at + "mlp.router.weight"] = (self.experts, hidden)
            for expert in range(self.experts):
                out[at + f"mlp.experts.local_experts.{expert}.linear_fc1.weight"] = (2 * ffn, hidden)
                out[at + f"mlp.experts.local_experts.{expert}.linear_fc2.weight"] = (hidden, ffn)
        out["decoder.final_layernorm.weight"] = (hidden,)
        if not self.tie_embeddings:
            out["output_layer.weight"] = (padded_vocab_size, hidden)
        return out

    def parameters(self, padded_vocab_size: int) -> dict[str, int]:
        """Parameter counts in closed form: total, active (what one token uses), embedding (the input table)."""
        embedding = padded_vocab_size * self.hidden_size
        attention = 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)
        norms = 2 * self.hidden_size + 2 * self.head_dim
        router = self.hidden_size * self.experts
        expert = 3 * self.hidden_size * self.expert_ffn_size
        shared = embedding * (1 if self.tie_embeddings else 2) + self.hidden_size
        layer = attention + norms + router
        return {
            "total": shared + self.layers * (layer + self.experts * expert),
            "active": shared + self.layers * (layer + self.experts_per_token * expert),
            "embedding": embedding,
        }

    def flops_per_token(self, padded_vocab_size: int, sequence_length: int) -> float:
        """Training FLOPs of one token: 6 per active matrix parameter (the output head counts, the input table does
        not), and attention's two products over half a sequence on average, forward and twice that backward."""
        counts = self.parameters(padded_vocab_size)
        matrices = counts["active"] - (0 if self.tie_embeddings else counts["embedding"])
        attention = 6 * self.layers * sequence_length * self.heads * self.head_dim
        return 6.0 * matrices + attention


def _nearest(choices: list[int], value: int) -> str:
    """The choices just below and just above `value`, as words."""
    below = [n for n in choices if n < value][-1:]
    above = [n for n in choices if n > value][:1]
    return " or ".join(str(n) for n in below + above)
