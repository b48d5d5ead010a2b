"""The interface of every architecture: the settings that all models share, and the methods of a `model` section.

An architecture is a file beside this one, with its settings and costs in closed form, and a file of the same name in
stages/mcore/architectures with its ModelSpec: its construction in Megatron, and the names of its tensors in
transformers. docs/extending.md shows one. No torch here: `atom plan` reads this file.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import model_validator

from pipeline.core.bounds import Context, Flag, Range
from pipeline.core.stage import Config, LongContext, added, operational
from stages.models.costs import AttentionCost, MemoryShare, Rows, training_flops
from stages.models.parallel_layout import Layout

if TYPE_CHECKING:
    import torch

PositiveInt = Annotated[int, Range(1, 2**31 - 1)]
"""A size: above zero, and small enough for every index that Megatron keeps."""
Layers = Annotated[int, Range(1, 1024, "Llama 3 405B: 126")]
Width = Annotated[int, Range(1, 2**17, "Llama 3 405B: 16384, inside its feed-forward layers 53248")]
RopeBase = Annotated[float, Range(1, 1e12, "Llama 3: 5e5, Qwen2.5-1M: 1e7", above=True)]
LossWeight = Annotated[float, Range(0, 100, "DeepSeek-V3: 1e-4, OLMoE: 0.01")]
Precision = Literal["fp32", "bf16", "fp8-tensorwise", "fp8-blockwise", "mxfp8", "nvfp4"]
"""The precision of matrix products. Weights of the optimizer, reductions, router, norms and losses are fp32 in all."""
BF16_SHARE = 0.15
"""Share of the layers, from the last one backwards, whose products stay in bf16 under FP4.

The NVFP4 paper (arXiv:2509.25149) keeps about as many linear layers in bf16, and finds the last layers to be enough.
"""
PositiveCount = Annotated[int, Range(1, 1e15)]
MOST_PARAMETERS = 10**14
"""Maximum parameters of a model; the largest published ones have 2e12."""
LONG_CONTEXT = 2**17
"""Tokens for which `atom plan` states the cache."""
CACHE_WIDTH = 2
"""Bytes of a number in that cache: bf16."""


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


class StatedParameters(Config):
    """Expected parameter counts. A recipe whose model has other counts is refused."""

    total: PositiveCount
    """all parameters, with embeddings"""
    active: PositiveCount
    """parameters that one token uses, with embeddings"""


@dataclass(frozen=True)
class Routing:
    """The routers of a mixture of experts."""

    experts: int  # in each of these layers
    top_k: int  # experts that a token visits
    layers: Sequence[int]  # that have experts
    z_loss: bool  # whether the routers have a z-loss


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
    stated_parameters: StatedParameters | None = operational(None)
    """expected parameter counts; null: not checked"""

    zero_centered_norms: ClassVar[bool] = False
    """True if the norms around and in an attention layer multiply by 1 + weight, so that weights start as zeros."""
    spec_module: ClassVar[str]
    """The module that defines SPEC, the architecture's ModelSpec."""
    yarn_scales_heads: ClassVar[bool] = False
    """True if YaRN's factor scales whole queries and keys, though a part of them has no rotary embedding.

    The architecture's class in transformers decides it.
    """
    if TYPE_CHECKING:  # each architecture declares the field with its name as the only value
        architecture: str

    # -- methods that an architecture defines -------------------------------------------------------------------------

    @property
    @abstractmethod
    def rotary_dim(self) -> int:
        """Width of the part of a head with rotary embedding."""

    @property
    def routing(self) -> Routing | None:
        """The routers, or None if no layer has experts."""
        return None

    @abstractmethod
    def shapes(self, padded_vocab_size: int) -> dict[str, tuple[int, ...]]:
        """The global name and full shape of every tensor, as stages/mcore/param_names.py names them."""

    @abstractmethod
    def parameters(self, padded_vocab_size: int) -> dict[str, int]:
        """Parameter counts in closed form: total, active (used by one token), embedding (the input table)."""

    @abstractmethod
    def matrices(self, padded_vocab_size: int) -> int:
        """Matrix parameters that one token uses: active ones with the output head, without input table and norms."""

    @abstractmethod
    def attention(self) -> list[AttentionCost]:
        """The attention layers, equal ones together."""

    @abstractmethod
    def layer_memory(self, layout: Layout, layer: int) -> MemoryShare:
        """The parameters of a layer on one rank of a layout."""

    @abstractmethod
    def layer_activations(
        self, layout: Layout, precision: Precision, rows: Rows, layer: int, fused: bool = False
    ) -> dict[str, float]:
        """Bytes by tensor that a layer keeps for the backward pass, for each of a rank's tokens.

        fused: SwiGLU as one kernel that keeps its input only, and attention with sinks in plain rows as one
        that keeps no scores.
        """

    def layer_working_set(self, layout: Layout, precision: Precision, rows: Rows, layer: int) -> float:
        """Bytes that a layer has at one time beyond what it keeps, for each of a rank's tokens."""
        return 0.0

    def layer_moved(self, layout: Layout, precision: Precision, layer: int) -> float:
        """Bytes of temporary tensors that a forward pass of a layer writes, for each of a rank's tokens.

        SwiGLU counts as one kernel.
        """
        return 0.0

    def masked_windows(
        self, layout: Layout, precision: Precision, rows: Rows, fused: bool = False
    ) -> tuple[int | None, ...]:
        """The windows of attention by slices of queries, whose masks all layers of a window share; None: the whole row.

        The default: fp32 has no kernel for rows of several documents, or for parts of a row, on a GPU.
        """
        by_slices = precision == "fp32" and rows.targets is None and (rows.packed or layout.cp > 1)
        return (None,) if by_slices else ()

    @abstractmethod
    def split_sizes(self) -> list[tuple[str, str, int]]:
        """(setting of the layout, name, size) of each dimension that a layout splits: the setting must divide it."""

    @abstractmethod
    def proportions(self) -> dict[str, float]:
        """The characteristic ratios of the model, which a small proxy keeps, by name."""

    @abstractmethod
    def scaled(self, hidden_size: int, width: Callable[[int], int]) -> dict[str, Any] | None:
        """The changed settings of a small proxy of that hidden size; width: an inner width, scaled.

        None if there is no such proxy.
        """

    @abstractmethod
    def describe(self) -> str:
        """The sizes in words."""

    def cache_bytes(self, size: int, ranks: int, tokens: int) -> int:
        """Bytes that the model keeps of a text of so many tokens on each of so many tensor ranks while it generates.

        They are keys and values, or what stands for them. `size` is the bytes of a number.
        """
        return size * sum(a.cached(tokens, ranks) for a in self.attention())

    def full_attention(self) -> list[AttentionCost]:
        """The attention layers if each kept keys and values of all its heads and tokens.

        `long_context` compares with these. The default leaves out windows.
        """
        return [replace(a, window=None) for a in self.attention()]

    def inner_widths(self) -> dict[str, int]:
        """The widths inside of a layer, by name."""
        return {}

    def layout_obstacle(self, layout: Layout) -> str | None:
        """The setting of a layout in which the model cannot be trained; None without one.

        It is a sentence that starts with the setting. Obstacles that `split_sizes` states are not repeated.
        """
        return None

    def export_obstacle(self) -> str | None:
        """A sentence on the property of the model that its class in transformers cannot express; None without one."""
        return None

    # -- derived methods ----------------------------------------------------------------------------------------------

    def flops_per_token(self, padded_vocab_size: int, sequence_length: int) -> float:
        """Training FLOPs of one token in rows of that length, by `stages.models.costs.training_flops`."""
        return training_flops(self.matrices(padded_vocab_size), self.attention(), sequence_length)

    def long_context(self, padded_vocab_size: int) -> LongContext:
        """The cost of a text of LONG_CONTEXT tokens, compared with that of the same matrices with `full_attention`."""
        full = self.full_attention()
        return LongContext(
            LONG_CONTEXT,
            self.cache_bytes(CACHE_WIDTH, 1, LONG_CONTEXT),
            self.flops_per_token(padded_vocab_size, LONG_CONTEXT),
            CACHE_WIDTH * sum(a.cached(LONG_CONTEXT, 1) for a in full),
            training_flops(self.matrices(padded_vocab_size), full, LONG_CONTEXT),
        )

    def with_rope(self, rope: Rope | None, context_length: int) -> Self:
        """The same tensors with the rotary embedding of a phase, for rows of up to `context_length` tokens."""
        changes: dict[str, object] = {"context_length": max(self.context_length, context_length)}
        if rope is not None:
            # YaRN of an earlier phase does not carry over: its factor counts from the original length.
            changes |= {"rope_theta": rope.theta or self.rope_theta, "yarn": rope.yarn}
        return self.model_copy(update=changes)

    def spec(self) -> ModelSpec:
        """The construction of the model in Megatron and transformers. Imports torch."""
        spec: ModelSpec = importlib.import_module(self.spec_module).SPEC
        return spec


class UntiedConfig(ModelConfig):
    """An architecture whose class in vLLM does not share the table with the head."""

    tie_embeddings: Flag = False
    """always false: vLLM's class of the architecture has a head of its own"""

    @model_validator(mode="after")
    def _possible_head(self) -> UntiedConfig:
        if self.tie_embeddings:
            raise ValueError(
                f"tie_embeddings = true leaves vLLM's class of the architecture {self.architecture} without an output "
                "head; set it to false"
            )
        return self


@dataclass(frozen=True)
class ModelSpec:
    """An architecture for Megatron and for transformers.

    Tensors are full tensors by name; a mapping of them may read each on access, so a model of any size passes
    through these functions one tensor at a time.

    megatron: (model) -> keyword arguments of Megatron's TransformerConfig that are the architecture's own
    (stages/mcore/model.py adds those of size, layout and precision).
    layer_spec: (Megatron's TransformerConfig, virtual pipeline stage or None, whether rows are packed) -> the layers
    from which Megatron's model is built (stages/mcore/layer_spec.py for attention with our kernels). They may be of
    several kinds.
    to_hf: (Megatron's tensors by global name, model, vocabulary size) -> transformers' names and tensors one after the
    other, layer by layer; rows of the vocabulary beyond that size are padding and left out. from_hf: its inverse;
    raises KeyError at a tensor that is missing and, at the end, ValueError, naming them, if some are left over.
    hf_config: (model) -> the architecture's own entries of config.json; `architectures` and `model_type` name its class
    in transformers (stages/export/hf.py adds the common ones).
    language_model: gets the keyword arguments of Megatron's GPTModel, among them the result of layer_spec as
    `transformer_layer_spec`, and gives one chunk of the model, which takes the arguments of
    stages.mcore.language_model.TokenLosses; None: Megatron's GPTModel.
    layer_of: (Megatron's layer, from 0) -> the layer of the model of which it is a part. Megatron's HybridModel counts
    attention and feed-forward parts as layers of their own; global names have the model's.
    stacks_experts: whether a tensor of transformers is made of those of all experts of a layer, which one rank then has
    to hand over.
    """

    megatron: Callable[[Any], dict[str, Any]]
    layer_spec: Callable[[Any, int | None, bool], Any]
    to_hf: Callable[[Mapping[str, torch.Tensor], Any, int], Iterator[tuple[str, torch.Tensor]]]
    from_hf: Callable[[Mapping[str, torch.Tensor], Any], Iterator[tuple[str, torch.Tensor]]]
    hf_config: Callable[[Any], dict[str, Any]]
    language_model: Callable[..., Any] | None = None
    layer_of: Callable[[int], int] = int
    stacks_experts: bool = False
