"""Checks the effect of reinforcement learning and preferences in a release with chat models."""

from __future__ import annotations

import math

from release.checks.check import BuildContext
from release.checks.findings import Findings
from release.checks.gains import at_ceiling, figure, judge_gain
from release.layout import when
from stages.evaluation.scores import Mean, pass_at_1
from stages.evaluation.settings import SURE


def rlvr_raises_pass_at_1(build: BuildContext) -> Findings | None:
    """RLVR gains more on the test problems than the recipe requires. None without that phase, and without a model
    before it that converses."""
    accuracies = _pass_at_1(build)
    if not {"sft", "rlvr"} <= accuracies.keys():
        return None
    return judge_gain("pass@1", accuracies["sft"], accuracies["rlvr"], build.evaluation["chat"]["min_gain"])


def rlhf_keeps_skills(build: BuildContext) -> Findings | None:
    """Learning from preferences loses no more on the test problems than the recipe allows. None without such phases
    after RLVR."""
    accuracies = _pass_at_1(build)
    later = [name for name in accuracies if when(name) > when("rlvr")]
    if "rlvr" not in accuracies or not later:
        return None
    allowed, before = build.evaluation["chat"]["skill_tolerance"], accuracies["rlvr"]
    losses = [
        before["value"] - accuracies[name]["value"] + SURE * math.hypot(before["se"], accuracies[name]["se"])
        for name in later
    ]
    figures = ", ".join(f"{name} {figure(accuracies[name])}" for name in ("rlvr", *later))
    text = (
        f"pass@1 {figures}; no more than {allowed:g} may be lost after rlvr, "
        f"{SURE} standard errors of the difference included"
    )
    return Findings.of_measurement(max(losses) <= allowed, text)


def is_preferred(model: str, build: BuildContext) -> Findings | None:
    """The answers of a model that learned from preferences win against the previous model; if those of the previous
    model cannot be better, they do not lose. None if it was not compared."""
    if model not in _pass_at_1(build) or model not in build.data.chat.get("preferences", {}):
        return None
    comparison, required = build.data.chat["preferences"][model], build.evaluation["chat"]["min_win_rate"]
    rate, reward = comparison["win_rate"], comparison["sides"]["before"]["parts"]["reward"]
    text = f"{model} wins {rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f}) against the model before rlhf"
    if at_ceiling(reward):
        text += f", whose reward of {figure(reward)} leaves nothing to win: it must not lose for certain"
        return Findings.of_measurement(rate["high"] >= 0.5, text)
    return Findings.of_measurement(rate["low"] > required, text)


def _pass_at_1(build: BuildContext) -> dict[str, Mean]:
    """{model: accuracy on all test problems}, in the order of training; empty without a chat model."""
    return pass_at_1(build.data.chat.get("test", {}))
