"""The small proxy of a recipe's model for the FP8 simulation: the recipe's ratios at the smallest size whose
matrix products consist of several quantization blocks, as a large model's do. No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.core.errors import RecipeError
from stages.models.base import ModelConfig

VOCABULARY = 256
"""Bytes."""
UNIT = 32
"""Widths are multiples of this: the requirement of Transformer Engine for MXFP8, above those of the other recipes."""
LAYERS = 2
"""At most."""
TOLERANCE = 0.05
"""Largest relative deviation of a ratio."""
CONTEXT = 128
"""The longest row: attention's own products are not rounded."""
MAX_WIDTH = 4096
"""A wider proxy is not small."""
SPARE = 3
"""Mean tokens of an expert over the minimum that it must see: routers are uneven, mostly at the beginning."""
MIN_TOKENS = 1024
"""Minimum tokens of a step, so that noise does not dominate its loss."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of the proxy and of the recipe's model."""

    name: str
    recipe: float
    proxy: float


def build_proxy(model: ModelConfig, smallest: int, hidden: int | None = None) -> ModelConfig:
    """A small model with the ratios of this one.

    smallest: the minimum of both dimensions of every linear layer. hidden: use this width instead, without that
    minimum. Raises RecipeError if there is no such model.

    The proxy keeps the ratios of all widths to the hidden size, of query to key heads and of experts to experts per
    token (as far as a small model allows), and the losses of the router. Weights start with `init_std` x sqrt(hidden /
    hidden of the proxy), so that the output of a layer is as large as in the recipe's model.
    """
    if hidden is not None:
        proxy = _scaled_model(model, hidden) if hidden % UNIT == 0 and hidden > 0 else None
        if proxy is None:
            widths_up = range(math.ceil(max(hidden, 1) / UNIT) * UNIT, 2 * MAX_WIDTH, UNIT)
            near = next((width for width in widths_up if _scaled_model(model, width)), MAX_WIDTH)
            raise RecipeError(f"--hidden {hidden} cannot be divided into heads of a size that FP8 takes; use {near}")
        return proxy
    for width in range(math.ceil(smallest / UNIT) * UNIT, MAX_WIDTH + 1, UNIT):
        proxy = _scaled_model(model, width)
        if proxy and min(dimensions(proxy)) >= smallest and all(_is_close(r) for r in widths(model, proxy)):
            return proxy
    raise RecipeError(
        f"no proxy of up to {MAX_WIDTH} wide has the proportions of the model; name a width by --hidden, such as "
        f"{MAX_WIDTH}"
    )


def _is_close(ratio: Ratio) -> bool:
    return abs(ratio.proxy / ratio.recipe - 1) <= TOLERANCE


def _scaled_model(model: ModelConfig, hidden: int) -> ModelConfig | None:
    """The proxy of that hidden size; None if its attention cannot be divided into heads."""

    def scaled(size: int) -> int:
        return max(1, round(size * hidden / model.hidden_size / UNIT)) * UNIT

    changes = model.scaled(hidden, scaled)
    if changes is None:
        return None
    changes |= {
        "layers": min(model.layers, LAYERS),
        "context_length": CONTEXT,
        "init_std": min(1.0, model.init_std * (model.hidden_size / hidden) ** 0.5),  # the maximum of a model
        "yarn": None,
        "stated_parameters": None,
    }
    return type(model).model_validate({**model.model_dump(), **changes})


def dimensions(model: ModelConfig) -> list[int]:
    """The input and output width of every kind of linear layer."""
    shapes = {name: shape for name, shape in model.shapes(VOCABULARY).items() if "linear_" in name or "_proj." in name}
    return sorted({size for shape in shapes.values() for size in shape})


def widths(model: ModelConfig, proxy: ModelConfig) -> list[Ratio]:
    """Every inner width by the hidden size, in both."""
    proxy_widths = proxy.inner_widths()
    return [
        Ratio(f"{name} width / hidden", size / model.hidden_size, proxy_widths[name] / proxy.hidden_size)
        for name, size in model.inner_widths().items()
    ]


def ratios(model: ModelConfig, proxy: ModelConfig) -> list[Ratio]:
    """All ratios that the proxy should share with the model."""
    proxy_proportions = proxy.proportions()
    proportions = [Ratio(name, value, proxy_proportions[name]) for name, value in model.proportions().items()]
    return [*widths(model, proxy), *proportions]


def step_tokens(proxy: ModelConfig, smallest: int, sequence_length: int) -> int:
    """Tokens of a step, in complete rows: at least SPARE times the number with which an average expert sees
    `smallest`."""
    routing = proxy.routing
    tokens = max(MIN_TOKENS, SPARE * smallest * routing.experts / routing.top_k) if routing else MIN_TOKENS
    return math.ceil(tokens / sequence_length) * sequence_length
