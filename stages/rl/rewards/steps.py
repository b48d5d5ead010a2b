"""Verifier `steps`: a process reward. The intermediate values of an answer are verified beside its result.

Row: expected_answer, steps, weights. Parts: `reward`, `task` (the result is right), `steps` (share of right
intermediate values), `finished`.
"""

from __future__ import annotations

from stages.rl.rewards.frozen_scorer import FrozenScorer


class Steps(FrozenScorer):
    """Scores problems with worked steps (stages/scorers/steps_v1.py)."""

    name = "steps"
    logged_parts = ("task", "steps")


VERIFIER = Steps
