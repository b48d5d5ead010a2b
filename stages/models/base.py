"""The base of all architectures: settings of a `model` section, its tensors, and its costs in closed form.

A model is a decoder whose layers are an attention and a feed-forward part, each behind a norm. An architecture states
its attention, and its feed-forward part if that is no SwiGLU; stages/mcore/architectures.py has its construction in
Megatron and its names in transformers. docs/extending.md shows one. No torch here: `atom plan` reads this file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pipeline.core.bounds import Context, Flag, Range
from pipeline.core.stage import Config, added
from stages.models.parallel_layout import Layout, Module
from stages.models.param_names import BUFFERS, EMBEDDING, is_cut

SLICE = 128
"""Queries in one call of attention by slices (stages/mcore/row_tables.py)."""


PositiveInt = Annotated[int, Range(1, 2**31 - 1)]
"""A size: above zero, and small enough for every index that Megatron keeps."""
Layers = Annotated[int, Range(1, 1024, "Llama 3 405B: 126")]
Width = Annotated[int, Range(1, 2**17, "Llama 3 405B: 16384, inside its feed-forward layers 53248")]
RopeBase = Annotated[float, Range(1, 1e12, "Llama 3: 5e5, Qwen2.5-1M: 1e7", above=True)]
LossWeight = Annotated[float, Range(0, 100, "DeepSeek-V3: 1e-4, OLMoE: 0.01")]
NEWTON_SCHULZ = 5
"""Iterations in which Muon orthogonalizes the update of a matrix."""
Precision = Literal["fp32", "bf16", "fp8-tensorwise", "fp8-blockwise", "mxfp8", "nvfp4"]
"""The precision of matrix products. Weights of the optimizer, reductions, router, norms and losses are fp32 in all."""
BF16_SHARE = 0.15
"""Share of the layers, from the last one backwards, whose products stay in bf16 under FP4.

The NVFP4 paper (arXiv:2509.25149) keeps about as many linear layers in bf16, and finds the last layers to be enough.
"""
MOST_PARAMETERS = 10**14
"""Maximum parameters of a model; the largest published ones have 2e12."""
EIGHT_BITS: tuple[Precision, ...] = ("fp8-tensorwise", "fp8-blockwise", "mxfp8")
EIGHT_BITS_BYTES = 1 + 1 / 32
"""Bytes of a number of these formats, with its part of a scale: 4 bytes for 128, or one for 32."""
EXPERT = "experts.local_experts.{}."
"""The beginning of the names of an expert's tensors after `mlp.`, with a place for its number."""
NORMS = ("its norm, input of the projections", "its norm")
"""The outputs of a layer's norms, by their names in `layer_activations`."""
MATRICES_AGAIN: dict[Module, tuple[str, ...]] = {
    "layernorm": (),
    "moe_act": (),
    "mlp": ("mlp.linear_",),
    "shared_experts": ("mlp.shared_experts.",),
}
"""The beginnings of the names of a layer's matrices that multiply again if a module is computed again."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class AttentionCost:
    """Equal attention layers: `qk` and `v` are the widths of one head's queries and keys, and of its values."""

    layers: int
    heads: int
    qk: int
    v: int

    def keys(self, sequence_length: int) -> float:
        """Keys that a causal query sees on average: half the row."""
        return sequence_length / 2


def training_flops(matrices: float, attention: AttentionCost, sequence_length: int) -> float:
    """Training FLOPs of one token, 2 forward and 4 backward for each matrix parameter that the token uses.

    The output head counts, but not the input table, which is a lookup. Each product of the token's query with a key and
    of a score with a value counts in the same way.

    NVIDIA's published tables count in the same way (docs/performance-summary.md of Megatron-Bridge); Chowdhery et al.
    (2022, appendix B) count attention without causality. Recomputation is not added: these are the model's FLOPs, not
    the machine's. Packed rows need fewer, because a document does not see the others of its row.
    """
    widths = attention.layers * attention.heads * (attention.qk + attention.v)
    # Two FLOPs a multiply-add, once forward and twice backward: of inputs and of weights (Kaplan et al., 2020).
    return 6.0 * (matrices + widths * attention.keys(sequence_length))


@dataclass(frozen=True)
class MemoryShare:
    """The parameters on one rank, by the group of ranks that shares their optimizer state.

    Experts lie on fewer ranks.
    """

    dense: int
    experts: int
    table: int = 0  # of the dense ones: embedding and output head, which stay in bf16 under FP8

    def __add__(self, other: MemoryShare) -> MemoryShare:
        return MemoryShare(self.dense + other.dense, self.experts + other.experts, self.table + other.table)

    @property
    def all(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class Rows:
    """One micro-batch: `rows` rows of `length` tokens.

    packed: several documents in a row. targets: tokens for which logits are computed; None: all. prefixed: keys
    that documents have in common, counted with each but the first.
    """

    rows: int
    length: int
    packed: bool = False
    targets: int | None = None
    prefixed: int = 0


def layers_in_bf16(precision: Precision, layers: int) -> int:
    """Returns the number of last layers whose products stay in bf16 although the precision is lower."""
    return math.ceil(BF16_SHARE * layers) if precision == "nvfp4" else 0


class Yarn(Config):
    """YaRN (Peng et al., 2023, arXiv:2309.00071), which changes rotary frequencies for a longer context.

    It divides slow frequencies by `factor`, keeps fast ones, and scales queries and keys by 0.1 ln(factor) + 1 each.
    """

    factor: Annotated[float, Range(1, 4096, "DeepSeek-V3: 40", above=True)]
    """ratio of the new context length to original_length"""
    original_length: Context
    """context length in tokens for which the frequencies were trained"""
    beta_fast: ClassVar[float] = 32.0
    """Rotations within original_length above which a frequency is kept."""
    beta_slow: ClassVar[float] = 1.0
    """Rotations within original_length below which a frequency is divided."""


class Rope(Config):
    """A changed rotary embedding from a phase on."""

    theta: RopeBase | None = None
    """base of the rotary frequencies; null: as in the previous phase"""
    yarn: Yarn | None = None
    """YaRN scaling; null: none"""


@dataclass(frozen=True)
class Routing:
    """The routers of a mixture of experts."""

    experts: int  # in each of these layers
    top_k: int  # experts that a token visits
    layers: Sequence[int]  # that have experts
    z_loss: bool  # whether the routers have a z-loss
    global_balance: bool = False  # whether the balance loss takes its load from all tokens of a step


class ModelConfig(Config, ABC):
    """The `model` section of a recipe: a decoder with rotary embedding.

    The padded vocabulary size is in the tokenizer section.
    """

    layers: Layers
    """number of transformer layers"""
    hidden_size: Width
    """width of the residual stream"""
    context_length: Context
    """maximum sequence length in tokens"""
    rope_theta: RopeBase = 10000.0
    """base of the rotary frequencies"""
    norm_eps: Annotated[float, Range(1e-12, 1e-2, "usual: 1e-6 or 1e-5")] = 1e-6
    """epsilon of every RMSNorm"""
    tie_embeddings: Flag = True
    """share the weights of input embedding and output head"""
    init_std: Annotated[float, Range(0, 1, "usual: 0.006 to 0.1", above=True)] = 0.02
    """standard deviation of the initial weights"""
    yarn: Yarn | None = added(None)
    """YaRN scaling of the rotary frequencies; null: none"""

    yarn_scales_heads: ClassVar[bool] = False
    """True if YaRN's factor scales whole queries and keys, though a part of them has no rotary embedding.

    The architecture's class in transformers decides it.
    """
    if TYPE_CHECKING:  # each architecture declares these fields
        architecture: str
        heads: int
        intermediate_size: int | None

    # -- the attention of a layer -------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def rotary_dim(self) -> int:
        """Width of the part of a head with rotary embedding."""

    @abstractmethod
    def attention_shapes(self) -> Shapes:
        """The tensors of a layer's attention, by their names after `self_attention.`."""

    @abstractmethod
    def attention(self) -> AttentionCost:
        """The attention of all layers."""

    @abstractmethod
    def cache_bytes(self, size: int, ranks: int, tokens: int) -> int:
        """Bytes that the model keeps of a text of so many tokens on each of so many tensor ranks while it generates.

        They are keys and values, or what stands for them. `size` is the bytes of a number.
        """

    @abstractmethod
    def attention_activations(self, layout: Layout, precision: Precision, rows: Rows, fused: bool) -> dict[str, float]:
        """Bytes by tensor that the attention of a layer keeps for each of the rank's tokens, without its input.

        fused: as in `layer_activations`.
        """

    @abstractmethod
    def attention_working_set(self, layout: Layout, precision: Precision, rows: Rows) -> float:
        """Bytes that the attention of a layer has at one time beyond what it keeps, for each of the rank's tokens."""

    def attention_inputs(self) -> int:
        """Numbers in the inputs of a layer's attention matrices that are kept quantized alone.

        Transformer Engine keeps these without a copy in bf16. The count is for each of the rank's tokens.
        """
        return self.hidden_size

    # -- the feed-forward part of a layer: one SwiGLU, unless an architecture has another -----------------------------

    @property
    def routing(self) -> Routing | None:
        """The routers, or None if no layer has experts."""
        return None

    def mlp_shapes(self, layer: int) -> Shapes:
        """The tensors of a layer's feed-forward part, by their names after `mlp.`; those of all experts once."""
        return swiglu_shapes(self.hidden_size, self.intermediate_size or 0)

    def mlp_activations(self, layout: Layout, size: int, layer: int, fused: bool) -> dict[str, float]:
        """Bytes by tensor that the feed-forward part of a layer keeps for each of the rank's tokens.

        They are gate and up, and, unless SwiGLU is one fused kernel, silu(gate), up, and their product. size: bytes of
        a value.
        """
        intermediate = self.intermediate_size or 0
        return {"gate and up": 2 * size * intermediate, "SwiGLU": (1 if fused else 3) * size * intermediate}

    def mlp_working_set(self, layout: Layout, precision: Precision, layer: int) -> float:
        """As `attention_working_set`, of the feed-forward part.

        The gradients of its backward pass are at one time of its output, which skips it too, and gathered over tensor
        ranks, and of the product. Later they are of the product and its two factors, without the product.
        """
        hidden, intermediate = self.hidden_size, self.intermediate_size or 0
        gathered = max(intermediate, layout.tp * hidden if layout.tp > 1 else 0)
        return bytes_of(precision) * (hidden + intermediate + gathered)

    def mlp_inputs(self, layout: Layout, layer: int) -> int:
        """Numbers in the inputs of the feed-forward matrices of a layer for each of the rank's tokens.

        They leave out the norm that a router and shared experts read too.
        """
        shapes = self.mlp_shapes(layer)
        if EXPERT + "linear_fc1.weight" not in shapes:
            return sum(shapes[f"{name}.weight"][1] for name in ("linear_fc1", "linear_fc2"))
        assert self.routing is not None
        inner, hidden = (shapes[f"{EXPERT}{name}.weight"][1] for name in ("linear_fc2", "linear_fc1"))
        shared = shapes.get("shared_experts.linear_fc2.weight", (0, 0))[1]
        return self.routing.top_k * (inner + hidden * layout.split_experts) + shared

    def mlp_recomputed(self, modules: Collection[Module], layer: int) -> Collection[str]:
        """The names in `mlp_activations` of what is not kept if these modules are computed again."""
        return ("gate and up", "SwiGLU") if "mlp" in modules else ()

    # -- limits and words ---------------------------------------------------------------------------------------------

    def split_sizes(self) -> list[tuple[str, str, int]]:
        """(setting of the layout, name, size) of each dimension that a layout splits: the setting must divide it."""
        return []

    def export_obstacle(self) -> str | None:
        """A sentence on the property of the model that its class in transformers cannot express; None without one."""
        return None

    # -- derived methods ----------------------------------------------------------------------------------------------

    def layer_shapes(self, layer: int) -> Shapes:
        """The tensors of a layer, by their names there; those of all experts once, with a place for the number."""
        hidden = self.hidden_size
        attention, mlp = self.attention_shapes(), self.mlp_shapes(layer)
        return {
            "input_layernorm.weight": (hidden,),
            **{f"self_attention.{name}": shape for name, shape in attention.items()},
            "pre_mlp_layernorm.weight": (hidden,),
            **{f"mlp.{name}": shape for name, shape in mlp.items()},
        }

    def shapes(self, padded_vocab_size: int) -> Shapes:
        """The global name and full shape of every tensor, as stages/models/param_names.py names them."""
        table = (padded_vocab_size, self.hidden_size)
        out: Shapes = {EMBEDDING: table}
        for layer in range(self.layers):
            at = f"decoder.layers.{layer}."
            expert: Shapes = {}
            for name, shape in self.layer_shapes(layer).items():
                (expert if EXPERT in name else out)[at + name] = shape
            for number in range(self.routing.experts if self.routing and expert else 0):
                out |= {name.format(number): shape for name, shape in expert.items()}
        out["decoder.final_layernorm.weight"] = (self.hidden_size,)
        if not self.tie_embeddings:
            out["output_layer.weight"] = table
        return out

    def parameters(self, padded_vocab_size: int) -> dict[str, int]:
        """Parameter counts: total, active (used by one token), embedding (the input table)."""
        embedding = padded_vocab_size * self.hidden_size
        total = active = embedding * (1 if self.tie_embeddings else 2) + self.hidden_size
        for layer in range(self.layers):
            for name, shape in self.layer_shapes(layer).items():
                experts, visited = self._copies(name)
                total += experts * math.prod(shape)
                active += visited * math.prod(shape)
        return {"total": total, "active": active, "embedding": embedding}

    def matrices(self, padded_vocab_size: int) -> int:
        """Matrix parameters that one token uses: active ones with the output head, without input table and norms."""
        return padded_vocab_size * self.hidden_size + sum(self._used(layer) for layer in range(self.layers))

    def matrices_again(self, modules: Collection[Module]) -> int:
        """Those of all layers that one token uses once more if the backward pass computes these modules again."""
        beginnings = tuple(name for module in modules for name in MATRICES_AGAIN[module])
        return sum(self._used(layer, beginnings) for layer in range(self.layers))

    def _used(self, layer: int, beginnings: tuple[str, ...] = ("",)) -> int:
        """Matrix parameters of a layer that one token uses, of those whose names begin so."""
        # Vectors, such as norms and biases, cost no product.
        matrices = ((name, shape) for name, shape in self.layer_shapes(layer).items() if len(shape) > 1)
        return sum(self._copies(name)[1] * math.prod(shape) for name, shape in matrices if name.startswith(beginnings))

    def _copies(self, name: str) -> tuple[int, int]:
        """The number of a layer's tensors that a name of `layer_shapes` stands for, and of those that a token uses."""
        routing = self.routing if EXPERT in name else None
        return (routing.experts, routing.top_k) if routing else (1, 1)

    def layer_memory(self, layout: Layout, layer: int) -> MemoryShare:
        """The parameters of a layer on one rank of a layout, without biases of experts: a few kilobytes."""
        dense = experts = 0
        for name, shape in self.layer_shapes(layer).items():
            size = math.prod(shape)
            if EXPERT in name:
                experts += self._copies(name)[0] // layout.ep * size // layout.split_experts
            elif not name.endswith(BUFFERS):
                dense += size // layout.tp if is_cut(name) else size
        return MemoryShare(dense, experts)

    def layer_activations(
        self, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool = False
    ) -> dict[str, float]:
        """Bytes by tensor that the backward pass of a layer needs, for each of a rank's tokens.

        A rank's tokens are its share of a micro-batch under context and sequence parallelism, rows * length / (context
        * tensor). Between the projections it works on `tensor` times as many tokens and 1/tensor of the heads, which
        comes to the same. fused: SwiGLU as one kernel that keeps its input only, and attention as Transformer Engine's.
        """
        size = bytes_of(precision)
        tokens = size * self.hidden_size
        quantized = self.attention_inputs() + self.mlp_inputs(layout, layer) if precision in EIGHT_BITS else 0
        return {
            "layer's input": tokens,
            NORMS[0]: tokens,
            **self.attention_activations(layout, precision, rows, fused),
            "input of the second half": tokens,
            NORMS[1]: tokens,
            **self.mlp_activations(layout, size, layer, fused),
            # Negative: these inputs are counted above in the model's type, and kept in 8 bits.
            "inputs of matrices in 8 bits": -(size - EIGHT_BITS_BYTES) * quantized,
        }

    def recomputed(self, modules: Collection[Module], layer: int) -> set[str]:
        """The names in `layer_activations` of what is not kept if these modules are computed again."""
        norms = NORMS if "layernorm" in modules else ()
        return {*norms, *self.mlp_recomputed(modules, layer)}

    def layer_working_set(self, layout: Layout, precision: Precision, rows: Rows, layer: int) -> float:
        """Bytes that a layer has at one time beyond what it keeps, for each of a rank's tokens: of one part at work.

        Beside attention, nothing of the second half is there: not yet in the forward pass, and no longer in the
        backward pass; it is counted without fusions.
        """
        size = bytes_of(precision)
        second_half = 2 * size * self.hidden_size + sum(self.mlp_activations(layout, size, layer, False).values())
        attention = self.attention_working_set(layout, precision, rows) - second_half
        return max(self.mlp_working_set(layout, precision, layer), attention)

    def flops_per_token(self, padded_vocab_size: int, sequence_length: int) -> float:
        """Training FLOPs of one token in rows of that length, by `stages.models.base.training_flops`."""
        return training_flops(self.matrices(padded_vocab_size), self.attention(), sequence_length)

    def with_rope(self, rope: Rope | None, context_length: int) -> Self:
        """The same tensors with the rotary embedding of a phase, for rows of up to `context_length` tokens."""
        changes: dict[str, object] = {"context_length": max(self.context_length, context_length)}
        if rope is not None:
            # YaRN of an earlier phase does not carry over: its factor counts from the original length.
            changes |= {"rope_theta": rope.theta or self.rope_theta, "yarn": rope.yarn}
        return self.model_copy(update=changes)


def bytes_of(precision: Precision) -> int:
    """Bytes of a value of the model: fp32, or bf16, which is also between the products of a lower precision."""
    return 4 if precision == "fp32" else 2


def swiglu_shapes(hidden: int, intermediate: int, at: str = "") -> Shapes:
    """The two matrices of a SwiGLU, with names that start with `at`; `linear_fc1` holds gate above up."""
    return {f"{at}linear_fc1.weight": (2 * intermediate, hidden), f"{at}linear_fc2.weight": (hidden, intermediate)}


def has_engine_attention(layout: Layout, precision: Precision, rows: Rows, fused: bool) -> bool:
    """Returns True if attention is surely Transformer Engine's; this project's attention keeps more.

    That is so in plain rows if the precision or the layout needs it, or if `fused` states it.
    """
    return not rows.packed and (fused or layout.needs_engine or precision not in ("fp32", "bf16"))


def keys_of_tokens(layout: Layout, rows: Rows) -> float:
    """The keys that this project's attention keeps for each token: of all context ranks, and copies of a prefix."""
    return layout.cp + rows.prefixed / (rows.rows * rows.length)
