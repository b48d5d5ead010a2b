"""The law of mixtures: a known one is found, and no proposal breaks a limit or is beaten by another mix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from stages.evaluation import mixing_law
from stages.evaluation.mixing_law import Law

pytestmark = pytest.mark.numeric

# Each source helps its own domain most, and the third one helps the others a little.
LAW = Law(np.array([0.9, 0.6, 0.4]), np.array([[-2.0, 0.5, -0.6], [0.4, -1.5, -0.3], [0.2, 0.6, -1.8]]))
EVEN = np.full(3, 1 / 3)


def measured(weights: Any, noise: float = 0.0, law: Law = LAW) -> Any:
    return law.bits(weights) + noise * np.random.default_rng(1).normal(size=(len(weights), len(law.floors)))


def drawn(runs: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).dirichlet(np.ones(3), runs)


def simplex(steps: int) -> Any:
    """All mixes of three sources in whole parts of 1 / steps."""
    pairs = [(a, b) for a in range(steps + 1) for b in range(steps + 1 - a)]
    return np.array([(a, b, steps - a - b) for a, b in pairs]) / steps


def test_a_law_without_scatter_is_found_exactly() -> None:
    fit = mixing_law.fit(drawn(12), measured(drawn(12)))
    assert fit.law.floors == pytest.approx(LAW.floors, abs=1e-6)
    assert fit.law.slopes == pytest.approx(LAW.slopes, abs=1e-5)
    assert fit.left_out == pytest.approx(fit.measured, abs=1e-5)


def test_scatter_leaves_the_ranks_and_widens_the_bootstrap() -> None:
    weights, spreads = drawn(24), []
    for noise in (0.002, 0.02):
        fit = mixing_law.fit(weights, measured(weights, noise))
        assert mixing_law.rank_correlation(fit.left_out @ EVEN, fit.measured @ EVEN) > 0.9
        values = fit.draws.bits(EVEN) @ EVEN
        assert values.min() < LAW.bits(EVEN) @ EVEN < values.max()
        spreads.append(values.std())
    assert spreads[0] < spreads[1] / 4


def test_noise_alone_is_not_ranked() -> None:
    noise = 1 + 0.05 * np.random.default_rng(5).random((24, 3))
    fit = mixing_law.fit(drawn(24), noise)
    assert mixing_law.rank_correlation(fit.left_out @ EVEN, fit.measured @ EVEN) < 0.5
    assert mixing_law.rank_correlation(np.ones(5), np.arange(5)) == 0


@pytest.mark.parametrize("limits", [(1, 1, 1), (0.25, 1, 1), (0.5, 0.3, 0.25), (0.4, 0.35, 0.25001)])
@pytest.mark.parametrize("factors", [(1, 1, 1), (3, 1, 0.2), (0, 0, 1)])
def test_the_proposal_is_the_best_of_all_mixes_on_a_grid(limits: Any, factors: Any) -> None:
    limits, factors = np.array(limits, float), np.array(factors) / sum(factors)
    grid = simplex(200)
    allowed = grid[(grid <= limits + 1e-4).all(axis=1)]
    least = (LAW.bits(allowed) @ factors).min()
    proposed = mixing_law.propose(LAW, factors, limits)
    assert (proposed <= limits).all() and proposed.sum() == pytest.approx(1, abs=1e-12)
    # The grid is 1/200 apart, so its best mix is no better and hardly worse.
    assert least - 2e-3 < LAW.bits(proposed) @ factors < least + 1e-4


def test_no_proposal_breaks_a_limit_or_misses_the_minimum() -> None:
    """The minimum of a convex function is where no allowed direction descends: the gap of Frank and Wolfe is 0."""
    draw = np.random.default_rng(3)
    for _ in range(60):
        sources, domains = int(draw.integers(2, 12)), int(draw.integers(1, 8))
        law = Law(draw.random(domains), draw.normal(size=(domains, sources)) * draw.choice([0.1, 1, 3]))
        limits = np.minimum(draw.dirichlet(np.ones(sources)) * draw.uniform(1.001, 6), 1)
        factors = draw.dirichlet(np.ones(domains))
        proposed = mixing_law.propose(law, factors, limits)
        assert (proposed >= 0).all() and (proposed <= limits).all()
        assert round(proposed.sum() * mixing_law.UNITS) == mixing_law.UNITS
        slope = (factors * (law.bits(proposed) - law.floors)) @ law.slopes
        vertex, left = np.zeros(sources), 1.0
        for source in np.argsort(slope):
            vertex[source] = min(limits[source], left)
            left -= vertex[source]
        assert slope @ (proposed - vertex) < 2e-4


def test_rounding_keeps_the_sum_and_the_limits() -> None:
    tight = np.array([0.2500004, 0.35, 0.400001])
    assert mixing_law.rounded(np.array([0.25, 0.35, 0.4]), tight).tolist() == [0.25, 0.35, 0.4]
    thirds = mixing_law.rounded(EVEN, np.array([1, 1, 0.3333335]))
    assert thirds.tolist() == [0.333334, 0.333333, 0.333333]


def test_it_agrees_with_a_solver_of_scipy() -> None:
    """SLSQP does not return for some laws of many sources, but it does for these."""
    for limits in ([1.0, 1.0, 1.0], [0.4, 0.35, 0.3]):
        found = minimize(
            lambda mix: LAW.bits(mix) @ EVEN, EVEN, method="SLSQP", bounds=[(0, limit) for limit in limits],
            constraints=[{"type": "eq", "fun": lambda mix: mix.sum() - 1}], options={"ftol": 1e-12},
        )  # fmt: skip
        assert mixing_law.propose(LAW, EVEN, np.array(limits)) == pytest.approx(found.x, abs=1e-3)
        assert LAW.bits(mixing_law.propose(LAW, EVEN, np.array(limits))) @ EVEN <= found.fun + 1e-7
