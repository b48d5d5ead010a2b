"""Low-rank adapters on the matrices of Megatron's model, whose other tensors are frozen; and their sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from stages.mcore.lora import A, B, Lora, factor
from stages.models.param_names import is_cut


class Adapted(torch.nn.Module):
    """W -> W + scale * B A, of this tensor rank's part of W.

    A layer then computes with one matrix, as a merged model does, and its activations are those of the base.
    """

    def __init__(self, weight: torch.nn.Parameter, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = torch.nn.Parameter(weight.new_zeros(rank, weight.shape[1]))
        self.lora_B = torch.nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        if hasattr(weight, "allreduce"):  # Megatron's mark of tensors that belong to no expert rank alone
            # Without it, DDP would average an expert's factors over ranks that hold other experts.
            self.lora_A.allreduce = self.lora_B.allreduce = weight.allreduce  # type: ignore[attr-defined]

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scale)


def install(chunks: Sequence[torch.nn.Module], lora: Lora) -> None:
    """Freezes this rank's part of the model and gives its targets adapters, which alone require gradients."""
    # imported here: naming needs the chunks of `build`
    from stages.mcore.model import named_tensors

    names = {id(parameter): name for name, parameter in named_tensors(chunks)}
    for chunk in chunks:
        # Before the adapters are there, which alone shall require gradients.
        chunk.requires_grad_(False)
        config: Any = chunk.config
        config.moe_router_bias_update_rate = 0.0  # Megatron moves the biases of routers without a gradient
        if chunk.pre_process:
            embedding: Any = chunk.embedding
            embedding.register_forward_hook(_require_gradient)
        for module in list(chunk.modules()):
            weight = module._parameters.get("weight")
            if weight is not None and lora.is_target(names[id(weight)]):
                adapted = Adapted(weight, lora.rank, lora.scale)
                parametrize.register_parametrization(module, "weight", adapted, unsafe=True)
    for name, parameter in named_tensors(chunks):
        if parameter.requires_grad:
            # a factor that each tensor rank has whole gets a part of its gradient from each: Megatron sums those that
            # are marked. An expert, which no rank splits, is another one on each tensor rank.
            is_sharded = is_cut(name) or ".experts." in name
            parameter.tensor_model_parallel = is_sharded  # type: ignore[attr-defined]
            parameter.sequence_parallel = not is_sharded  # type: ignore[attr-defined]


def _require_gradient(embedding: Any, inputs: Any, output: Tensor) -> None:
    """A hook of the frozen embedding.

    A layer that is computed again has no gradients, without an error, unless its input requires one.
    """
    output.requires_grad_(torch.is_grad_enabled())


class Merged(Mapping[str, Tensor]):
    """Megatron's tensors of a base with an adapter in them, each computed on access."""

    def __init__(self, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], lora: Lora) -> None:
        self.base, self.adapter, self.lora = base, adapter, lora

    def __getitem__(self, name: str) -> Tensor:
        if not self.lora.is_target(name):
            return self.base[name]
        a, b = (self.adapter[factor(name, kind)] for kind in (A, B))
        return torch.addmm(self.base[name], b, a, alpha=self.lora.scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)
