"""What to train for a budget, if serving counts: the size and the tokens with the least loss, or the least cost.

A model of N parameters costs 6 N D FLOPs to train on D tokens and 2 N T to serve T tokens over its life, so the more it
serves, the smaller and longer trained the best one is (Sardana et al. 2024, arXiv:2401.00448). Of a mixture of experts
N counts the active parameters. FLOPs alone: servers that wait, and batches that do not fill them, cost on top.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stages.evaluation.ladder_laws import Array, Fit, band
from stages.evaluation.scaling_law import Band

TRAIN, SERVE = 6.0, 2.0
"""FLOPs of a parameter and token."""
GRID, ZOOMS = 200, 6
"""Sizes that are compared at once, and how often the search narrows to the neighbors of the best one."""


@dataclass(frozen=True)
class Choice:
    """A model. training, serving: FLOPs over its life."""

    parameters: float
    tokens: float
    loss: float
    training: float
    serving: float


@dataclass(frozen=True)
class Advice:
    """budget: FLOPs; served: tokens. best: has the least loss of all models whose training and serving cost the budget.
    without_serving: the compute-optimal model that costs as much in all. same_loss: the cheapest model with the loss of
    that one, which saves `saved` of the budget. parameters, tokens, loss: the bands of `best`."""

    budget: float
    served: float
    best: Choice
    parameters: Band
    tokens: Band
    loss: Band
    without_serving: Choice
    same_loss: Choice
    saved: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def advise(fit: Fit, budget: float, served: float) -> Advice:
    """fit: of the law `pretraining`. Raises ValueError with a sentence if serving a tiny model exceeds the budget."""
    if SERVE * served >= budget:
        raise ValueError(
            f"serving {served:.3g} tokens costs {SERVE * served:.3g} FLOPs for each parameter, and the budget is "
            f"{budget:.3g}; raise --budget"
        )
    value, drawn = fit.form.published(fit.parameters[None]), fit.form.published(fit.draws)
    sizes = _best_size(value, budget, served)
    best = _choice(value, sizes[0], budget, served)
    drawn_sizes = _best_size(drawn, budget, served)
    drawn_tokens = _tokens(drawn_sizes, budget, served)
    plain = _compute_optimal(value, budget, served)
    cheap = _cheapest(value, plain.loss, served)
    return Advice(
        budget, served, best,
        band(best.parameters, drawn_sizes), band(best.tokens, drawn_tokens),
        fit.predict((best.parameters, best.tokens)),
        plain, cheap, 1 - (cheap.training + cheap.serving) / budget,
    )  # fmt: skip


def _loss(law: dict[str, Array], sizes: Array, tokens: Array) -> Array:
    """[B, G] of laws [B] at sizes and tokens [B, G]."""
    e, a, b, alpha, beta = (law[name][:, None] for name in ("E", "A", "B", "alpha", "beta"))
    return e + a * sizes**-alpha + b * tokens**-beta


def _tokens(sizes: Array, budget: float, served: float) -> Array:
    """The tokens that are left for training: those that the budget pays for beside serving."""
    return (budget - SERVE * sizes * served) / (TRAIN * sizes)


def _choice(law: dict[str, Array], size: float, budget: float, served: float) -> Choice:
    tokens = float(_tokens(size, budget, served))
    loss = float(_loss(law, np.asarray([[size]]), np.asarray([[tokens]]))[0, 0])
    return Choice(float(size), tokens, loss, TRAIN * size * tokens, SERVE * size * served)


def _best_size(law: dict[str, Array], budget: float, served: float) -> Array:
    """[B] the size with the least loss, of all from 1 parameter to those that leave one token for each."""
    largest = budget / (SERVE * served + TRAIN)
    count = len(law["E"])

    def cost(sizes: Array) -> Array:
        return _loss(law, sizes, _tokens(sizes, budget, served))

    return _least(cost, np.zeros(count), np.full(count, np.log(largest)))


def _least(cost: Any, low: Array, high: Array) -> Array:
    """[B] e to the argument between low and high [B] at which cost [B, G] -> [B, G] of one valley is least."""
    for _ in range(ZOOMS):
        grid = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, GRID)
        place = np.argmin(cost(np.exp(grid)), axis=1)
        rows = np.arange(len(grid))
        low, high = grid[rows, np.maximum(place - 1, 0)], grid[rows, np.minimum(place + 1, GRID - 1)]
    return np.exp((low + high) / 2)


def frontier(fit: Fit, flops: Array) -> tuple[Array, Array, Array]:
    """Value, low and high [n] of the least loss that training FLOPs [n] buy."""
    value, drawn = fit.form.published(fit.parameters[None]), fit.form.published(fit.draws)

    def least(law: dict[str, Array]) -> Array:
        losses = []
        for budget in flops:
            sizes = _best_size(law, float(budget), 0.0)[:, None]
            losses.append(_loss(law, sizes, _tokens(sizes, float(budget), 0.0))[:, 0])
        return np.stack(losses, axis=1)

    curve, low_high = least(value)[0], least(drawn)
    bands = [band(float(middle), low_high[:, n]) for n, middle in enumerate(curve)]
    return curve, np.asarray([row.low for row in bands]), np.asarray([row.high for row in bands])


def _compute_optimal(law: dict[str, Array], budget: float, served: float) -> Choice:
    """The model that is optimal for its training FLOPs alone, of the size at which its whole life costs the budget."""
    low, high = np.log(1e-9 * budget), np.log(budget)
    for _ in range(100):
        middle = (low + high) / 2
        size = _best_size(law, float(np.exp(middle)), 0.0)[0]
        is_above = np.exp(middle) + SERVE * size * served > budget
        low, high = (low, middle) if is_above else (middle, high)
    return _choice(law, float(_best_size(law, float(np.exp(low)), 0.0)[0]), budget, served)


def _cheapest(law: dict[str, Array], loss: float, served: float) -> Choice:
    """The model of that loss whose life costs least."""
    e, a, b, alpha, beta = (float(law[name][0]) for name in ("E", "A", "B", "alpha", "beta"))
    smallest = (a / (loss - e)) ** (1 / alpha)

    def tokens(sizes: Array) -> Array:
        return (b / (loss - e - a * sizes**-alpha)) ** (1 / beta)

    def cost(sizes: Array) -> Array:
        return sizes * (TRAIN * tokens(sizes) + SERVE * served)

    low = np.log(smallest) + 1e-6
    size = _least(cost, np.asarray([low]), np.asarray([low + 20.0]))[0]
    read = float(tokens(size))
    return Choice(float(size), read, loss, TRAIN * size * read, SERVE * size * served)
