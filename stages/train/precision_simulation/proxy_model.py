"""The small proxy (twin) of a recipe's model for the FP8 simulation: the recipe's ratios at the smallest size whose
matrix products consist of several quantization blocks, as a large model's do. No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.core.errors import RecipeError
from stages.models.qwen3_moe.config import ModelConfig

VOCABULARY = 256
"""Bytes."""
UNIT = 32
"""Widths are multiples of this: what Transformer Engine demands of MXFP8, and more than the other recipes need."""
LAYERS, EXPERTS = 2, 32
"""At most."""
TOLERANCE = 0.05
"""Largest relative deviation of a ratio."""
CONTEXT = 128
"""The longest row, since attention's own products stay as they are."""
MAX_WIDTH = 4096
"""A wider twin is not small."""
SPARE = 3
"""Mean tokens of an expert over the minimum that it must see: routers are uneven, mostly at the beginning."""
MIN_TOKENS = 1024
"""Minimum tokens of a step, so that noise does not dominate its loss."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of the proxy and of the recipe's model."""

    name: str
    recipe: float
    twin: float


def build_proxy(model: ModelConfig, smallest: int, hidden: int | None = None) -> ModelConfig:
    """A small model with the ratios of this one.

    smallest: the minimum of both dimensions of every linear layer. hidden: use this width instead, without that
    minimum. Raises RecipeError if there is no such model.

    Kept are the ratios of all widths to the hidden size, of query to key heads, of experts to experts a token visits
    (as far as EXPERTS allows), and what the router is trained by. Weights begin with `init_std` x
    sqrt(hidden / hidden of the twin), so that what a layer gives out is as large as in the recipe's model.
    """
    if hidden is not None:
        proxy = _scaled_model(model, hidden) if hidden % UNIT == 0 and hidden > 0 else None
        if proxy is None:
            unit = UNIT * model.heads // model.kv_heads
            raise RecipeError(f"--hidden {hidden} cannot be divided into heads of a size that FP8 takes; use {unit}")
        return proxy
    for width in range(math.ceil(smallest / UNIT) * UNIT, MAX_WIDTH + 1, UNIT):
        proxy = _scaled_model(model, width)
        if proxy and min(dimensions(proxy)) >= smallest and all(_is_close(r) for r in widths(model, proxy)):
            return proxy
    raise RecipeError(
        f"no twin of up to {MAX_WIDTH} wide has the proportions of the model; name a width by --hidden, such as "
        f"{MAX_WIDTH}"
    )


def _is_close(ratio: Ratio) -> bool:
    return abs(ratio.twin / ratio.recipe - 1) <= TOLERANCE


def _scaled_model(model: ModelConfig, hidden: int) -> ModelConfig | None:
    """The twin of that hidden size; None if its attention cannot be divided into heads."""

    def scaled(size: int) -> int:
        return max(1, round(size * hidden / model.hidden_size / UNIT)) * UNIT

    attention, group = scaled(model.heads * model.head_dim), model.heads // model.kv_heads
    choices = [n for n in range(1, model.kv_heads + 1) if attention % (2 * n * group) == 0]
    if not choices:
        return None
    kv_heads = min(choices, key=lambda n: abs(attention / (n * group) - model.head_dim))
    experts, active_experts = _experts(model.experts, model.num_experts_per_tok)
    changes: dict[str, object] = {
        "layers": min(model.layers, LAYERS),
        "hidden_size": hidden,
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": attention // (kv_heads * group),
        "experts": experts,
        "num_experts_per_tok": active_experts,
        "moe_intermediate_size": scaled(model.moe_intermediate_size),
        "context_length": CONTEXT,
        "init_std": min(1.0, model.init_std * (model.hidden_size / hidden) ** 0.5),  # the most that a model may have
        "dense_layers": min(model.dense_layers, 1),
        "intermediate_size": model.intermediate_size and scaled(model.intermediate_size),
        "shared_expert_intermediate_size": model.shared_expert_intermediate_size
        and scaled(model.shared_expert_intermediate_size),
        "yarn": None,
        "stated_parameters": None,
    }
    return ModelConfig.model_validate({**model.model_dump(), **changes})


def _experts(experts: int, active_experts: int) -> tuple[int, int]:
    """At most EXPERTS experts, of which a token visits a share as near to the recipe's as can be, and the fewest."""
    if experts <= EXPERTS:
        return experts, active_experts
    pairs = [
        (max(k, min(EXPERTS, round(k * experts / active_experts))), k)
        for k in range(2, min(active_experts, EXPERTS) + 1)
    ]
    return min(pairs, key=lambda pair: (abs(pair[0] / pair[1] - experts / active_experts), pair[1]))


def dimensions(model: ModelConfig) -> list[int]:
    """The width in and the width out of every kind of linear layer."""
    sizes = [size for name, shape in model.shapes(VOCABULARY).items() if "linear_" in name for size in shape]
    return sorted(set(sizes))


def widths(model: ModelConfig, proxy: ModelConfig) -> list[Ratio]:
    """Every inner width by the hidden size, in both."""

    def inner(m: ModelConfig) -> dict[str, int]:
        sizes = {"attention": m.heads * m.head_dim, "expert": m.moe_intermediate_size}
        sizes |= {"dense": m.intermediate_size or 0, "shared expert": m.shared_expert_intermediate_size or 0}
        return {name: size for name, size in sizes.items() if size}

    proxy_widths = inner(proxy)
    return [
        Ratio(f"{name} width / hidden", size / model.hidden_size, proxy_widths[name] / proxy.hidden_size)
        for name, size in inner(model).items()
    ]


def ratios(model: ModelConfig, proxy: ModelConfig) -> list[Ratio]:
    """All ratios that the proxy should share with the model."""
    pairs = [(m.heads / m.kv_heads, m.experts / m.num_experts_per_tok) for m in (model, proxy)]
    return [
        *widths(model, proxy),
        Ratio("query heads / key heads", pairs[0][0], pairs[1][0]),
        Ratio("experts / experts a token visits", pairs[0][1], pairs[1][1]),
    ]


def step_tokens(proxy: ModelConfig, smallest: int, sequence_length: int) -> int:
    """Tokens of a step, in whole rows: SPARE times what it takes for an average expert to see `smallest`, at least."""
    tokens = max(MIN_TOKENS, SPARE * smallest * proxy.experts / proxy.num_experts_per_tok)
    return math.ceil(tokens / sequence_length) * sequence_length
