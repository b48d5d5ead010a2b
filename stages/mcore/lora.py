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
from stages.mcore.param_names import CUT_FACTORS
from stages.models.base import ModelConfig, Precision
from stages.models.costs import MemoryShare
from stages.models.parallel_layout import Layout

A, B = ".lora_A", ".lora_B"
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (".self_attention.linear_qkv.weight", ".self_attention.linear_proj.weight"),
    "mlp": (".linear_fc1.weight", ".linear_fc2.weight"),
}
"""Endings of the names of a target's matrices. `mlp` are the feed-forward matrices, those of each expert among them."""


LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
ARCHITECTURES = ("qwen3", "qwen3_moe")
"""Those whose matrices have the names above."""


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
        return self.alpha / self.rank

    def is_target(self, name: str) -> bool:
        """Returns True if the tensor of that global name gets an adapter."""
        return name.endswith(tuple(ending for target in self.targets for ending in TARGETS[target]))

    def shapes(self, base: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The adapters' tensors by global name, and their full shapes. base: those of the model."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in base.items():
            if self.is_target(name):
                shapes |= {factor(name, A): (self.rank, shape[1]), factor(name, B): (shape[0], self.rank)}
        return shapes

    def sums(self, model: ModelConfig, layout: Layout) -> dict[int, list[float]]:
        """The numbers of each sum W + alpha / rank * B A on one rank, by layer."""
        sizes: dict[int, list[float]] = {}
        for name, shape in model.shapes(1).items():
            if self.is_target(name) and (match := LAYER.match(name)):
                ranks = layout.ep * layout.split_experts if ".experts." in name else layout.tp
                sizes.setdefault(int(match[1]), []).append(math.prod(shape) / ranks)
        return sizes

    def memory_share(self, model: ModelConfig, layout: Layout, layers: Collection[int]) -> MemoryShare:
        """The parameters of the adapters of these layers on one rank."""
        dense = experts = 0
        for name, shape in self.shapes(model.shapes(1)).items():
            if (match := LAYER.match(name)) and int(match[1]) in layers:
                is_expert = ".experts." in name
                split = layout.split_experts if is_expert else layout.tp
                size = math.prod(shape) // (split if name.endswith(CUT_FACTORS) else 1)
                dense += 0 if is_expert else size
                experts += size if is_expert else 0
        return MemoryShare(dense, experts // layout.ep)

    def problem(self, layout: Layout, precision: Precision, model: ModelConfig) -> str | None:
        """The reason why these adapters cannot be trained in this way; None if they can.

        It is a sentence that starts with a field.
        """
        if precision not in ("fp32", "bf16"):
            return f"precision = {precision} does not train lora, whose matrices are sums of two; use fp32 or bf16"
        if model.architecture not in ARCHITECTURES:
            known = " or ".join(ARCHITECTURES)
            return f"lora has no rules for the matrices of model.architecture = {model.architecture}; use {known}"
        shapes = model.shapes(1)
        if not (narrow := [min(shape) for name, shape in shapes.items() if self.is_target(name)]):
            return f"lora.targets = {', '.join(self.targets)} names no matrix of this architecture; name other ones"
        if self.rank > min(narrow):
            return f"lora.rank = {self.rank} is more than the {min(narrow)} of the narrowest target; lower it"
        if "mlp" in self.targets and model.routing is not None and layout.split_experts > 1:
            return (
                f"parallelism.etp = {layout.split_experts} splits each expert, whose adapters would be summed over no "
                f"rank; set etp to 1 with ep = {layout.tp}, or leave mlp out of lora.targets"
            )
        return None


def factor(name: str, kind: str) -> str:
    """The global name of an adapter's tensor. name: of the matrix. kind: A or B."""
    return name.removesuffix(".weight") + kind
