"""Verifier `math-verify`: mathematical equality by the package math-verify.

Row, as NeMo Gym's math_with_judge: question, expected_answer (LaTeX or a plain expression).
"""

from __future__ import annotations

from stages.rl.protocols import Row
from stages.rl.rewards.pooled_verifier import PooledVerifier
from stages.rl.rewards.scoring_worker import BindRow, ScoreAnswer


class MathVerify(PooledVerifier):
    """Of an answer, math-verify 0.9 gives sympy's evaluating parser digits and operators only; the rest goes through a
    grammar of LaTeX."""

    name = "math-verify"
    packages = ("math-verify", "latex2sympy2_extended", "sympy")
    fields = ("expected_answer",)

    @staticmethod
    def load_scorer() -> BindRow:
        from math_verify import parse, verify

        # What sympy imports and generates at its first use is then ready in every fork.
        verify(
            parse("$x^2+2x+1$", parsing_timeout=None),
            parse("$(x+1)^2$ or 0.5", parsing_timeout=None),
            timeout_seconds=None,
        )

        def bind(row: Row) -> ScoreAnswer:
            # The package's own time limits count wall time and score 0; the fork's limit counts processor time.
            gold = parse(_boxed(str(row["expected_answer"])), parsing_timeout=None)
            return lambda answer: float(verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None))

        return bind

    @staticmethod
    def correct_answer(row: Row) -> str:
        return _boxed(str(row["expected_answer"]))


def _boxed(answer: str) -> str:
    """A right answer as math-verify finds it best: in a box, unless it is marked as LaTeX already."""
    return answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"


VERIFIER = MathVerify
