"""The card's section on what was predicted before training."""

from __future__ import annotations

from release.assembly.model_facts import ModelFacts
from release.cards.tables import count, table
from release.prediction.forecast import FOLDER, NAMES


def outcomes(model: ModelFacts) -> list[str]:
    """None of a model without a prediction."""
    if model.prediction is None:
        return []
    prediction = model.prediction
    smallest, largest = prediction.points[0], prediction.points[-1]
    body = [
        [
            NAMES[row.forecast.figure],
            f"{row.forecast.value:.4f}",
            f"{row.forecast.low:.4f} to {row.forecast.high:.4f}",
            f"{row.measured:.4f}",
            "yes" if row.within else "no",
        ]
        for row in model.outcomes
    ]
    return [
        f"Sealed before pre-training, from {count(len(prediction.points))} runs of {smallest.flops:.3g} to "
        f"{largest.flops:.3g} training FLOPs; this model has {prediction.target.flops:.3g}. Nine of ten such runs "
        f"should fall into a band. The evidence repository has the prediction and its statement in `{FOLDER}/`.",
        "",
        *table(["figure", "predicted", "band of 90 %", "measured", "in the band"], body),
    ]
