"""Verifier `instructions`: constraints that a program can check (IFEval, arXiv 2311.07911).

Row, as NeMo Gym's instruction_following: instruction_id_list, kwargs. Parts: `reward`, `fraction`, `finished`.
"""

from __future__ import annotations

from stages.rl.rewards.frozen_scorer import FrozenScorer


class Instructions(FrozenScorer):
    """Gives the reward 1 to an answer that follows every instruction."""

    name = "instructions"


VERIFIER = Instructions
