"""Verifier `exact`: the answer equals the expected one. Row: expected_answer. Parts: `reward`, `finished`."""

from __future__ import annotations

from stages.rl.rewards.frozen_scorer import FrozenScorer


class Exact(FrozenScorer):
    """Scores the procedural problems of this project."""

    name = "exact"


VERIFIER = Exact
