"""Low-rank adapters (LoRA; Hu et al., 2021, arXiv:2106.09685): their settings, names and shapes. No torch here.

A target matrix W [out, in] of the frozen base is computed with as W + alpha / rank * B A; training changes A [rank, in]
and B [out, rank] alone. B begins at zero, so the first step computes the base. Queries, keys and values are one matrix
in Megatron, and so are gate and up: they share A and have rows of B of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.core.bounds import Range
from pipeline.core.stage import Config
from stages.models.base import MemoryShare, ModelConfig, Precision
from stages.models.parallel_layout import Layout
from stages.models.param_names import is_cut

A, B = ".lora_A", ".lora_B"
"""Endings of the names of an adapter's tensors."""
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (".self_attention.linear_qkv.weight", ".self_attention.linear_proj.weight"),
    "mlp": (".linear_fc1.weight", ".linear_fc2.weight"),
}
"""Endings of the names of a target's matrices. `mlp` are the feed-forward matrices, those of each expert among them."""
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
"""The beginning of the name of a layer's tensor, with the number of the layer."""
ARCHITECTURES = ("qwen3", "qwen3_moe")
"""The architectures whose matrices have the names of TARGETS."""


class Lora(Config):
    """Low-rank adapters on a frozen base."""

    rank: Annotated[int, Range(1, 1024, "usual: 4 to 64")]
    """columns of B and rows of A"""
    alpha: Annotated[float, Range(0, 1e4, "usual: rank or twice the rank", above=True)]
    """the product B A is multiplied by alpha / rank"""
    targets: Annotated[tuple[Literal["attention", "mlp"], ...], Field(min_length=1, max_length=2)] = ("attention",)
    """matrices with an adapter: attention (queries, keys, values, output), mlp (gate, up and down of dense layers
    and of each expert; routers never)"""

    @field_validator("targets")
    @classmethod
    def _sorted(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(targets)))

    @property
    def scale(self) -> float:
        """The factor of the product B A."""
        return self.alpha / self.rank

    def is_target(self, name: str) -> bool:
        """Returns True if the tensor of that global name gets an adapter."""
        return name.endswith(tuple(ending for target in self.targets for ending in TARGETS[target]))

    def shapes(self, base: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Returns the full shapes of the adapters' tensors by global name. base: those of the model."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in base.items():
            if self.is_target(name):
                shapes[factor(name, A)] = (self.rank, shape[1])
                shapes[factor(name, B)] = (shape[0], self.rank)
        return shapes

    def sums(self, model: ModelConfig, layout: Layout) -> dict[int, list[float]]:
        """Returns by layer how many numbers of each sum W + alpha / rank * B A one rank has.

        The matrices of every expert are among them, each at 1 / ep of its size, as a rank has that part of the experts.
        """
        sizes: dict[int, list[float]] = {}
        for name, shape in model.shapes(1).items():
            if self.is_target(name) and (match := LAYER.match(name)):
                ranks = layout.ep * layout.split_experts if ".experts." in name else layout.tp
                sizes.setdefault(int(match[1]), []).append(math.prod(shape) / ranks)
        return sizes

    def memory_share(self, model: ModelConfig, layout: Layout, layers: Collection[int]) -> MemoryShare:
        """Returns the parameters of the adapters of these layers on one rank."""
        dense = experts = 0
        for name, shape in self.shapes(model.shapes(1)).items():
            match = LAYER.match(name)
            if match is None or int(match[1]) not in layers:
                continue

            is_expert = ".experts." in name
            size = math.prod(shape)
            if is_cut(name):
                size //= layout.split_experts if is_expert else layout.tp
            if is_expert:
                experts += size
            else:
                dense += size
        return MemoryShare(dense, experts // layout.ep)

    def problem(self, layout: Layout, precision: Precision, model: ModelConfig) -> str | None:
        """Returns the reason why these adapters cannot be trained in this way; None if they can.

        It is a sentence that starts with a field.
        """
        if precision not in ("fp32", "bf16"):
            return f"precision = {precision} does not train lora, whose matrices are sums of two; use fp32 or bf16"
        if model.architecture not in ARCHITECTURES:
            known = " or ".join(ARCHITECTURES)
            return f"lora has no rules for the matrices of model.architecture = {model.architecture}; use {known}"

        widths = [min(shape) for name, shape in model.shapes(1).items() if self.is_target(name)]
        if not widths:
            return f"lora.targets = {', '.join(self.targets)} names no matrix of this architecture; name other ones"
        if self.rank > min(widths):
            return f"lora.rank = {self.rank} is more than the {min(widths)} of the narrowest target; lower it"
        if "mlp" in self.targets and model.routing is not None and layout.split_experts > 1:
            return (
                f"parallelism.etp = {layout.split_experts} splits each expert, whose adapters would be summed over no "
                f"rank; set etp to 1 with ep = {layout.tp}, or leave mlp out of lora.targets"
            )
        return None


def factor(name: str, kind: str) -> str:
    """Returns the global name of an adapter's tensor. name: of the matrix. kind: A or B."""
    return name.removesuffix(".weight") + kind
