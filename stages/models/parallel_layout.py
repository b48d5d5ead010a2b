"""The parallel layout of a phase: its section `parallelism`. It never enters a key. No torch here.

The terms are Megatron-core's. A rank is one process with one device. Dense tensors are on a grid of tensor x context x
data x pipeline ranks, experts on one of expert_tensor x expert x expert data x pipeline ranks; both grids cover the
same ranks.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.bounds import Flag, Range
from pipeline.core.stage import Config

Fusion = Literal["permute", "router", "cross_entropy", "bias_activation", "gradient_accumulation", "rope"]
Split = Annotated[int, Range(1, 4096)]
Module = Literal["layernorm", "moe_act", "mlp", "shared_experts"]
WITHOUT_PRODUCTS: tuple[Module, ...] = ("layernorm", "moe_act")
"""Modules whose recomputation costs no matrix product and no exchange."""

LOSS_SLICE = 1024
"""Tokens of a slice of the loss: enough for matrix products at full speed on a GPU."""
MOST_LOGITS = 2**22
"""Logits of a micro-batch on a rank that are computed at once: 16 MiB in fp32."""


def deal(layers: int, chunks: int, loss: int = 1) -> tuple[int, ...]:
    """Deals layers to the chunks of a pipeline as evenly as possible, the first ones getting one more.

    The embedding, on the first one, counts as a layer, and the loss, on the last one, as `loss` layers. A number below
    1 means that it is impossible.
    """
    each, more = divmod(layers + 1 + loss, chunks)
    counts = [each + (number < more) for number in range(chunks)]
    counts[0] -= 1
    counts[-1] -= loss
    return tuple(counts)


class Layout(Config):
    """The ranks of a phase and their parallel layout. All layouts give the same loss within rounding."""

    ranks: Annotated[int, Range(1, 1e6, "Llama 3: 16384")] = Field(default=1)
    """number of processes, one per device"""
    tp: Split = Field(default=1)
    """tensor-parallel ranks, with sequence parallelism of the activations"""
    pp: Split = Field(default=1)
    """pipeline-parallel ranks, which split the layers"""
    vpp: Split = Field(default=1)
    """model chunks per pipeline rank; above 1: interleaved 1F1B schedule"""
    pp_layers: tuple[Annotated[int, Range(1, 1024)], ...] | None = Field(default=None, min_length=2, max_length=1024)
    """layers of each chunk of the pipeline, pp x vpp in the order of the model; null: equally many, or, if that is not
    possible, dealt with the embedding and the loss as a layer each"""
    cp: Split = Field(default=1)
    """context-parallel ranks, which split each sequence"""
    ep: Split = Field(default=1)
    """expert-parallel ranks, which split the experts of a layer"""
    etp: Split | None = Field(default=None)
    """tensor-parallel ranks of each expert; null: as tp"""
    dispatcher: Literal["alltoall", "flex"] = Field(default="alltoall")
    """how tokens are sent to their experts; flex: by DeepEP's kernels, only with GPUs"""
    recompute: Literal["none", "selective", "layer"] = Field(default="none")
    """what the backward pass computes again; layer: a layer from its input; selective: its recompute_modules"""
    recompute_modules: tuple[Module, ...] | None = Field(default=None, min_length=1, max_length=4)
    """modules that recompute = selective computes again; layernorm: a layer's two norms; moe_act: the experts' SwiGLU;
    mlp: a dense SwiGLU; shared_experts: all of them; null: layernorm and moe_act, which cost no matrix product"""
    overlap_gradients: Flag | None = Field(default=None)
    """overlap the reduction of gradients with the backward pass; null: if there are GPUs"""
    overlap_weights: Flag = Field(default=False)
    """overlap the gathering of updated weights with the next step's forward pass, and gradients"""
    fusions: tuple[Fusion, ...] | None = Field(default=None, max_length=6)
    """fused kernels, only with GPUs; null: all that the machine has"""
    cuda_graphs: Flag = Field(default=False)
    """only with GPUs: replay the kernels of a layer as one CUDA graph; for dense models in plain rows"""
    deterministic: Flag = Field(default=False)
    """only with GPUs, slower: kernels and collectives that add in one order, for equal bits of a repeated step (CPU
    ranks always have; not yet shown on a GPU)"""

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.ranks // (self.tp * self.pp * self.cp)

    @property
    def split_experts(self) -> int:
        """Ranks that split each expert."""
        return self.etp or self.tp

    def chunk_layers(self, layers: int) -> tuple[int, ...]:
        """Returns the layers of each chunk of the pipeline, in the order of a model with so many layers.

        Chunk n is on pipeline rank n modulo pp.
        """
        chunks = self.pp * self.vpp
        return self.pp_layers or ((layers // chunks,) * chunks if layers % chunks == 0 else deal(layers, chunks))

    @property
    def recomputed(self) -> tuple[Module, ...]:
        """The modules of a layer that are computed again, if not the whole layer is."""
        return (self.recompute_modules or WITHOUT_PRODUCTS) if self.recompute == "selective" else ()

    @property
    def group_sizes(self) -> dict[str, int | None]:
        """The sizes of the groups of ranks, as Megatron's `initialize_model_parallel` names them."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp if self.vpp > 1 else None,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.split_experts,
        }

    @property
    def width_unit(self) -> int:
        """The unit of a row's width in tokens, to a multiple of which rows are padded.

        It is two slices for each context rank (the zigzag that evens out causal attention), each cut again by sequence
        parallelism.
        """
        return self.tp * (2 * self.cp if self.cp > 1 else 1)

    @property
    def needs_engine(self) -> bool:
        """True if it names a kernel of Transformer Engine, without which its phase is refused."""
        return not {"permute", "router", "cross_entropy", "rope"}.isdisjoint(self.fusions or ())

    def slices_loss(self, tokens: float, hidden_size: int, padded_vocab_size: int, has_z_loss: bool = False) -> bool:
        """Returns True if the loss of a micro-batch is computed by slices of tokens.

        It is if all logits take more memory than a slice and the fp32 sum of the head's gradients, and with a z-loss of
        the logits, which the other losses do not have. `tokens` are those on one context rank.
        """
        if has_z_loss:
            return True
        by_engine = "cross_entropy" in (self.fusions or ())
        is_large = tokens * padded_vocab_size > MOST_LOGITS * self.tp
        return not by_engine and is_large and tokens >= LOSS_SLICE + hidden_size
