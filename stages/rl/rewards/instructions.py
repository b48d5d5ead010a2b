"""Verifier `instructions`: constraints that a program can check (IFEval, arXiv 2311.07911).

Row, as NeMo Gym's instruction_following: instruction_id_list, kwargs. Parts: `reward`, `fraction`, `finished`.
"""

from __future__ import annotations

from stages.rl.protocols import Row
from stages.rl.rewards.frozen_scorer import FrozenScorer

MOST_LETTERS = 1000


class Instructions(FrozenScorer):
    """Gives the reward 1 to an answer that follows every instruction."""

    name = "instructions"

    @classmethod
    def unsolved(cls, row: Row) -> dict[str, str]:
        """What the constraints ask for by name and nothing else: keywords, repeated letters, and the last phrase."""
        words, letters, ending = list[str](), "", ""
        kwargs = row.get("kwargs")
        for arguments in kwargs if isinstance(kwargs, list) else ():  # the scorer says what is wrong with another row
            for name, value in (arguments if isinstance(arguments, dict) else {}).items():
                if name == "let_frequency" and isinstance(value, int):
                    letters += str(arguments.get("letter")) * min(value, MOST_LETTERS)
                elif name == "end_phrase":
                    ending = str(value)
                elif name.startswith("keyword") or name in ("first_word", "start_phrase", "postscript_marker"):
                    words += map(str, value if isinstance(value, list) else [value])
        return {"what the constraints name": " ".join([*words, letters + ending]).strip() or "x"}


VERIFIER = Instructions
