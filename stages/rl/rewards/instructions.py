"""Verifier `instructions`: constraints that a program can check (IFEval, arXiv 2311.07911).

Row, as NeMo Gym's instruction_following: instruction_id_list, kwargs. Parts: `reward`, `fraction`, `finished`.
"""

from __future__ import annotations

from stages.rl.protocols import Row
from stages.rl.rewards.frozen_scorer import FrozenScorer


class Instructions(FrozenScorer):
    """Gives the reward 1 to an answer that follows every instruction."""

    name = "instructions"

    @classmethod
    def unsolved(cls, row: Row) -> dict[str, str]:
        """What the constraints ask for by name and nothing else: words, repeated letters, and phrases at the ends."""
        words, ending = [], ""
        for arguments in row.get("kwargs", ()):
            given = {name: value for name, value in (arguments or {}).items() if value is not None}
            ending = str(given.pop("end_phrase", ending))
            letter, repeated = str(given.pop("letter", "")), int(given.pop("let_frequency", 1))
            words += [letter * repeated]
            for value in given.values():
                words += value if isinstance(value, list) else [value] * isinstance(value, str)
        return {"what the constraints name": " ".join(filter(None, [*map(str, words), ending]))}


VERIFIER = Instructions
