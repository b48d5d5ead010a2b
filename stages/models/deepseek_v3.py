"""A mixture of experts of the DeepSeek-V3 shape (arXiv:2412.19437), which Kimi K2 and Moonlight share.

Every layer is multi-head latent attention: queries, and keys with values, are computed from two narrow latents of a
token, and a part of each head turns with the position. The feed-forward part is a mixture of SwiGLU experts with shared
ones, chosen by sigmoid scores with a bias, within the best groups of experts; the first `dense_layers` have one SwiGLU.
Without multi-token prediction. transformers loads its export as DeepseekV3ForCausalLM. No torch here.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import model_validator

from pipeline.core.bounds import Range
from stages.models.base import AttentionCost, Precision, Rows, Shapes, bytes_of, has_engine_attention, keys_of_tokens
from stages.models.grouped_query import Heads
from stages.models.mixture import SigmoidMixtureConfig
from stages.models.parallel_layout import Layout

HeadPart = Annotated[int, Range(1, 1024, "DeepSeek-V3: 128, of which the rotary part has 64 more")]
Rank = Annotated[int, Range(1, 2**16, "DeepSeek-V3: 1536 for queries, 512 for keys and values")]
LATENT_EPS = 1e-6
"""Epsilon of the norms of latents in transformers' class, which no setting changes."""


class DeepseekV3Config(SigmoidMixtureConfig):
    """A mixture of experts with multi-head latent attention: `architecture: deepseek_v3`."""

    yarn_scales_heads: ClassVar[bool] = True
    architecture: Literal["deepseek_v3"]
    """deepseek_v3: a mixture of experts with latent attention and shared experts"""
    heads: Heads
    """attention heads"""
    q_lora_rank: Rank | None = None
    """width of the latent of queries; null: queries have none"""
    kv_lora_rank: Rank
    """width of the latent of keys and values, which a cache keeps"""
    qk_nope_head_dim: HeadPart
    """width of the part of a query or key without rotary embedding"""
    qk_rope_head_dim: HeadPart
    """width of the part with rotary embedding; must be even. All heads share that of the key"""
    v_head_dim: HeadPart
    """width of a head's values"""

    @model_validator(mode="after")
    def _possible_attention(self) -> DeepseekV3Config:
        if self.qk_rope_head_dim % 2:
            near = f"{self.qk_rope_head_dim - 1} or {self.qk_rope_head_dim + 1}" if self.qk_rope_head_dim > 1 else "2"
            raise ValueError(
                f"qk_rope_head_dim = {self.qk_rope_head_dim} is odd, but rotary embedding turns pairs; nearest: {near}"
            )
        return self

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    def export_obstacle(self) -> str | None:
        if self.norm_eps != LATENT_EPS:
            return (
                f"model.norm_eps = {self.norm_eps:g} cannot be exported: DeepseekV3ForCausalLM normalizes latents "
                f"with {LATENT_EPS:g}, whatever its config says; use {LATENT_EPS:g}"
            )
        return None

    def attention_shapes(self) -> Shapes:
        """The shapes of a layer's attention tensors by name.

        A head of `linear_q_up_proj` is its part without rotary embedding and the one with it. A head of
        `linear_kv_up_proj` is its key and its value.
        """
        hidden, q, kv, queries = self.hidden_size, self.q_lora_rank, self.kv_lora_rank, self.heads * self.qk_head_dim
        of_queries: Shapes = {"linear_q_proj.weight": (queries, hidden)}
        if q is not None:
            of_queries = {"linear_q_down_proj.weight": (q, hidden), "linear_q_up_proj.weight": (queries, q)}
        return {
            **of_queries,
            "linear_kv_down_proj.weight": (kv + self.qk_rope_head_dim, hidden),
            "linear_kv_up_proj.weight": (self.heads * (self.qk_nope_head_dim + self.v_head_dim), kv),
            "linear_proj.weight": (hidden, self.heads * self.v_head_dim),
            **({} if q is None else {"q_layernorm.weight": (q,)}),
            "kv_layernorm.weight": (kv,),
        }

    def attention(self) -> AttentionCost:
        return AttentionCost(self.layers, self.heads, self.qk_head_dim, self.v_head_dim)

    def cache_bytes(self, size: int, ranks: int, tokens: int) -> int:
        """The latent of keys and values, and the part of the key that heads share: each rank holds a copy."""
        return self.layers * (self.kv_lora_rank + self.qk_rope_head_dim) * tokens * size

    def attention_activations(self, layout: Layout, precision: Precision, rows: Rows, fused: bool) -> dict[str, float]:
        """Bytes by tensor that the attention of a layer keeps for each of the rank's tokens.

        A latent is kept before and after its norm; this project's attention widens the narrower ones of queries, keys
        and values, and narrows its output again.
        """
        size = bytes_of(precision)
        qk, v = self.heads * self.qk_head_dim, self.heads * self.v_head_dim
        keys, copied, wide = keys_of_tokens(layout, rows), self._copies_output(precision, rows), max(qk, v)
        if has_engine_attention(layout, precision, rows, fused):
            keys, copied, wide = 1.0, False, 0
        q_wide, v_wide = max(qk, wide), max(v, wide)
        return {
            "latents, and normed": 2 * size * ((self.q_lora_rank or 0) + self.kv_lora_rank),
            "rotary part of the key, as projected": size * self.qk_rope_head_dim,
            "queries, keys (turned) and values": size * (q_wide + (q_wide + v_wide) * keys),
            "attention's output": size * v_wide,
            "attention's output, narrowed or by rows": size * v if copied else 0,
            "log-sum-exp of the scores": 4 * self.heads,
        }

    def attention_inputs(self) -> int:
        """Normed latents. The two matrices that give latents quantize their input each, which gains nothing."""
        return (self.q_lora_rank or 0) + self.kv_lora_rank

    def attention_working_set(self, layout: Layout, precision: Precision, rows: Rows) -> float:
        """Bytes that the attention of a layer has at one time beyond what it keeps, for each of the rank's tokens.

        In bf16 these are the gradients of queries, keys, values and output. In fp32, which goes by slices of queries,
        they are those of keys and values of this slice, of the slices before, and their sum. The narrowed output is
        gone.
        """
        if has_engine_attention(layout, precision, rows, False):
            return 0.0
        size, gradients = (4, 6) if precision == "fp32" else (2, 4)
        qk, v = self.heads * self.qk_head_dim, self.heads * self.v_head_dim
        return size * (gradients * max(qk, v) - v * self._copies_output(precision, rows))

    def _copies_output(self, precision: Precision, rows: Rows) -> bool:
        """Returns True if attention's output is kept in two forms: by rows or slices, or wide and narrowed."""
        return rows.rows > 1 or precision == "fp32" or self.v_head_dim < self.qk_head_dim

    def split_sizes(self) -> list[tuple[str, str, int]]:
        return [("tp", "heads", self.heads), *super().split_sizes()]
