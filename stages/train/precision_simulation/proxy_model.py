"""The small proxy of a recipe's model for the FP8 simulation: the recipe's ratios at the smallest size whose
matrix products consist of several quantization blocks, as a large model's do. No torch here.
"""

from __future__ import annotations

import math

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


Ratio = tuple[str, float, float]
"""(name, in the recipe's model, in the proxy)"""


def build_proxy(model: ModelConfig, smallest: int) -> ModelConfig:
    """Returns a small model with the ratios of this one.

    The proxy keeps the ratios of all widths to the hidden size, of query to key heads and of experts to experts per
    token (as far as a small model allows), and the losses of the router. Weights start with `init_std` x sqrt(hidden /
    hidden of the proxy), so that the output of a layer is as large as in the recipe's model.

    Args:
        model: The recipe's model.
        smallest: The minimum of both dimensions of every linear layer.

    Raises:
        RecipeError: There is no such model.
    """
    for width in range(math.ceil(smallest / UNIT) * UNIT, MAX_WIDTH + 1, UNIT):
        proxy = _scaled_model(model, width)
        if proxy is None or min(dimensions(proxy)) < smallest:
            continue
        if all(abs(small / large - 1) <= TOLERANCE for _, large, small in widths(model, proxy)):
            return proxy
    raise RecipeError(f"no proxy of up to {MAX_WIDTH} wide has the proportions of the model; use other widths")


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
    """Returns every inner width by the hidden size, in both."""
    small = proxy.inner_widths()
    return [
        (f"{name} width / hidden", size / model.hidden_size, small[name] / proxy.hidden_size)
        for name, size in model.inner_widths().items()
    ]


def ratios(model: ModelConfig, proxy: ModelConfig) -> list[Ratio]:
    """Returns all ratios that the proxy should share with the model."""
    small = proxy.proportions()
    return [*widths(model, proxy), *((name, value, small[name]) for name, value in model.proportions().items())]


def step_tokens(proxy: ModelConfig, smallest: int, sequence_length: int) -> int:
    """Tokens of a step, in complete rows: at least SPARE times the number with which an average expert sees
    `smallest`."""
    routing = proxy.routing
    tokens = max(MIN_TOKENS, SPARE * smallest * routing.experts / routing.top_k) if routing else MIN_TOKENS
    return math.ceil(tokens / sequence_length) * sequence_length
