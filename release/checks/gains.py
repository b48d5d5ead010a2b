"""Gains of a share of right answers, which cannot rise above 1."""

from __future__ import annotations

import math

from release.checks.findings import Findings
from stages.evaluation.scores import Figure, Mean
from stages.evaluation.settings import SURE

BEYOND = f", beyond {SURE} standard errors of the difference"


def judge_gain(measure: str, before: Mean, after: Mean, required: float, significant: bool = True) -> Findings:
    """Checks that a share rose by more than the recipe requires.

    If so much is not missing, any gain is enough. At the ceiling none is demanded, only that nothing was lost for
    certain.

    Args:
        measure: What the share counts, for the sentence.
        before: The share of the earlier model.
        after: The share of the later model.
        required: The gain that must be exceeded.
        significant: Whether the gain must also exceed the uncertainty of the difference.
    """
    gain, uncertainty = after["value"] - before["value"], SURE * math.hypot(before["se"], after["se"])
    missing, chance = 1 - before["value"], _chance(before)
    text = f"{measure} {figure(before)} → {figure(after)}"
    if missing <= chance:
        text += (
            f"; {before['n']} items cannot show a gain above the first share, so none is demanded, and no loss{BEYOND} "
            "is allowed"
        )
        return Findings.of_measurement(gain >= -uncertainty, text)
    if missing <= required + chance:
        text += f"; {required:g} more cannot be shown above the first share, so any gain is enough"
        required = 0.0
    else:
        text += f", a gain of more than {required:g} is demanded"
    if significant:
        return Findings.of_measurement(gain - uncertainty > required, f"{text}{BEYOND}")
    return Findings.of_measurement(gain > required, text)


def at_ceiling(before: Mean) -> bool:
    """Returns True if what a share lacks to 1 is within what chance alone moves the difference of two such shares."""
    return 1 - before["value"] <= _chance(before)


def _chance(share: Mean) -> float:
    """The difference of two shares over as many items that chance makes once in 20 times.

    Two right and two wrong items are added (Agresti and Coull 1998), because the standard error of a share of 1 is 0
    however few its items are.
    """
    items = share["n"] + 4
    value = (share["value"] * share["n"] + 2) / items
    return SURE * math.sqrt(2 * value * (1 - value) / items)


def figure(row: Figure) -> str:
    return f"{row['value']:.3f} ± {row['se']:.3f}"
