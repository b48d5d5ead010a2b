"""Verifier `courtesy`: rules for a courteous note. Row: act, who, what. Its parts: stages/scorers/courtesy_v1.py."""

from __future__ import annotations

from stages.rl.rewards.frozen_scorer import FrozenScorer


class Courtesy(FrozenScorer):
    """Scores whether the note does what the request asks, and its style."""

    name = "courtesy"


VERIFIER = Courtesy
