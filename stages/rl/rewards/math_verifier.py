"""Verifier `math-verify`: mathematical equality by the package math-verify.

Row, as NeMo Gym's math_with_judge: question, expected_answer (LaTeX or a plain expression).
"""

from __future__ import annotations

from stages.rl.protocols import Row
from stages.rl.rewards.pooled_verifier import PooledVerifier
from stages.rl.rewards.scoring_worker import BindRow, ScoreAnswer


class MathVerify(PooledVerifier):
    """math-verify 0.9 passes only digits and operators of an answer to sympy's evaluating parser; the rest is parsed by
    a grammar of LaTeX."""

    name = "math-verify"
    packages = ("math-verify", "latex2sympy2_extended", "sympy")
    fields = ("expected_answer",)

    @staticmethod
    def load_scorer() -> BindRow:
        from math_verify import parse, verify

        # Modules and tables that sympy loads at its first use are then available in every fork.
        verify(
            parse("$x^2+2x+1$", parsing_timeout=None),
            parse("$(x+1)^2$ or 0.5", parsing_timeout=None),
            timeout_seconds=None,
        )

        def bind(row: Row) -> ScoreAnswer:
            # The package's own time limits count wall time and score 0; the fork's limit counts processor time.
            gold = parse(boxed(str(row["expected_answer"])), parsing_timeout=None)
            return lambda answer: float(verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None))

        return bind

    @classmethod
    def unsolved(cls, row: Row) -> dict[str, str]:
        constants = ("0", "1", "-1", "x", "\\infty", "nan", "\\emptyset", "\\mathbb{R}")
        return {f"{constant} in a box": boxed(constant) for constant in constants}

    @staticmethod
    def correct_answer(row: Row) -> str:
        return boxed(str(row["expected_answer"]))


def boxed(answer: str) -> str:
    """A correct answer in the form that math-verify parses best: in a box, unless it is marked as LaTeX already."""
    return answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"
