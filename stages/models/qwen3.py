"""A dense decoder of the Qwen3 shape. No torch here.

It has grouped-query attention with normalized queries and keys, and one SwiGLU in each layer. transformers loads its
export as Qwen3ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from stages.models.base import Precision, Width
from stages.models.grouped_query import GroupedQueryConfig, swiglu_activations, swiglu_gradients, swiglu_shapes
from stages.models.parallel_layout import Layout


class Qwen3Config(GroupedQueryConfig):
    """A dense decoder: `architecture: qwen3`."""

    spec_module: ClassVar[str] = "stages.mcore.architectures.qwen3"
    architecture: Literal["qwen3"]
    """qwen3: a dense decoder"""
    intermediate_size: Width
    """inner width of the SwiGLU of each layer"""

    def mlp_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        return swiglu_shapes(self.hidden_size, self.intermediate_size)

    def mlp_parameters(self) -> tuple[int, int]:
        return self.mlp_matrices(), self.mlp_matrices()

    def mlp_matrices(self) -> int:
        return self.layers * 3 * self.hidden_size * self.intermediate_size

    def mlp_memory(self, layout: Layout, layer: int) -> tuple[int, int, int]:
        return 0, 3 * self.hidden_size * self.intermediate_size, 0

    def mlp_activations(self, layout: Layout, size: int, layer: int, fused: bool) -> dict[str, float]:
        return swiglu_activations(size, self.intermediate_size, fused)

    def mlp_working_set(self, layout: Layout, precision: Precision, layer: int) -> float:
        return swiglu_gradients(self.hidden_size, self.intermediate_size, layout, precision)

    def split_sizes(self) -> list[tuple[str, str, int]]:
        return [*super().split_sizes(), ("tp", "intermediate_size", self.intermediate_size)]

    def describe(self) -> str:
        return f"{super().describe()}, SwiGLU of {self.intermediate_size}"

    def inner_widths(self) -> dict[str, int]:
        return {**super().inner_widths(), "dense": self.intermediate_size}

    def scaled(self, hidden_size: int, width: Callable[[int], int]) -> dict[str, Any] | None:
        changes = super().scaled(hidden_size, width)
        return changes and {**changes, "intermediate_size": width(self.intermediate_size)}
