"""Laws of compute: what they say of the next run, and how often it falls into the band."""

from __future__ import annotations

import numpy as np
import pytest

from release.facts import forecast
from release.facts.forecast import Point, RunSize
from stages.evaluation import scaling_laws


def test_a_law_without_noise_is_continued() -> None:
    flops = [1e9 * 4**n for n in range(5)]
    law, band = scaling_laws.loss_band(flops, [40 * c**-0.15 + 1.5 for c in flops], 4**6 * 1e9)
    assert law["b"] == pytest.approx(0.15, rel=0.02) and band.value == pytest.approx(
        40 * (4**6 * 1e9) ** -0.15 + 1.5, rel=1e-3
    )
    assert band.low <= band.value <= band.high and band.high - band.low < 0.01
    curve, accuracy = scaling_laws.accuracy_band(flops, [0.1, 0.2, 0.3, 0.5, 0.7], 400, 4**5 * 1e9)
    assert curve["slope"] > 0 and 0.7 < accuracy.value < 1 and 0 < accuracy.low < accuracy.value < accuracy.high < 1


def test_no_score_is_outside_of_its_scale() -> None:
    flops = [1e9, 1e10, 1e11]
    _, none = scaling_laws.accuracy_band(flops, [0.0, 0.0, 0.0], 40, 1e12)
    _, noisy = scaling_laws.accuracy_band(flops, [0.0, 1.0, 0.0], 40, 1e12)
    assert 0 < none.low <= none.high < 0.05 and 0 <= noisy.low < 0.01 and 0.99 < noisy.high <= 1


@pytest.mark.parametrize("floor", [0.0, 1.5])
@pytest.mark.parametrize("runs", [3, 4, 5, 8, 12])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_nine_of_ten_runs_fall_into_the_band(runs: int, floor: float) -> None:
    """Of a power law whose runs scatter by 2 %; the band is that which is sealed, with a law fitted to each trial."""
    rng, hits, trials = np.random.default_rng(runs), 0, 600
    flops, target = [1e9 * 3**n for n in range(runs)], 3**runs * 1e9

    def run(c: float) -> float:
        return float((30 * c**-0.1 + floor) * np.exp(rng.normal(0, 0.02)))

    for _ in range(trials):
        _, band = scaling_laws.loss_band(flops, [run(c) for c in flops], target)
        hits += band.low <= run(target) <= band.high
    assert forecast.LEVEL - 0.035 <= hits / trials <= forecast.LEVEL + 0.065


def test_losses_that_do_not_fall_carry_no_law() -> None:
    for losses in ([4.0, 4.1, 4.2], [4.0, 4.1, 4.2, 4.3]):
        with pytest.raises(ValueError, match="the losses of the runs do not fall with compute"):
            scaling_laws.loss_band([1e9 * 4**n for n in range(len(losses))], losses, 1e13)


def point(number: int, flops: float) -> Point:
    loss = 30 * flops**-0.1
    return Point(
        f"r{number}",
        f"pretrain-{number}",
        flops,
        10,
        10,
        "0",
        f"evaluate-{number}",
        "1",
        loss,
        loss / 2,
        0.1 * number,
        40,
    )


def test_which_runs_carry_a_prediction() -> None:
    target, points = RunSize("big", "pretrain-9", 1e13, 100, 100), [point(n, 10.0 ** (8 + n)) for n in (3, 1, 2)]
    prediction = forecast.predict(target, points)
    assert [row.figure for row in prediction.forecasts] == [forecast.LOSS, forecast.BITS, forecast.ACCURACY]
    assert prediction.forecasts[0].value == pytest.approx(30 * 1e13**-0.1, rel=0.01)
    assert [row.recipe for row in prediction.points] == ["r1", "r2", "r3"], "by compute"
    with pytest.raises(ValueError, match="the runs have 2 amounts of compute, and a law needs 3"):
        forecast.predict(target, points[:2] + points[:1])
    with pytest.raises(ValueError, match="r3 has 1e.11 training FLOPs, not fewer than big with 1e.10"):
        forecast.predict(RunSize("big", "k", 1e10, 1, 1), points)
    (loss,) = forecast.outcomes(prediction, {forecast.LOSS: prediction.forecasts[0].value})
    (far,) = forecast.outcomes(prediction, {forecast.LOSS: 99.0})
    assert loss.within and not far.within
