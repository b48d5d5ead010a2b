"""Verifier `reasoning-gym`: the score by a dataset of the package reasoning-gym.

Row, as NeMo Gym's reasoning_gym: question, answer, metadata with source_dataset.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from stages.rl.protocols import Row
from stages.rl.rewards.pooled_verifier import PooledVerifier
from stages.rl.rewards.scoring_worker import BindRow, ScoreAnswer


class ReasoningGym(PooledVerifier):
    """Refuses datasets whose own answers do not get full marks here; the task source reports them before a run.

    In 0.1.25 they evaluate the answer as Python (bitwise_arithmetic, countdown, puzzle24, number_sorting,
    polynomial_multiplication, the two integrations), have no answer in the row (boxnet, graph_color,
    propositional_logic, rubiks_cube, rush_hour), lose by JSON (arc_agi, rearc), or give any answer full marks
    (game_of_life_halting).

    Some scorers call eval on the answer, others pass it to sympy, which does. Both are blocked: a scorer that requires
    eval fails its probe, so that its dataset is refused; one that only reads a list in Python's notation (n_queens,
    binary_matrix, spiral_matrix, string_insertion) uses the text of the answer.
    """

    name = "reasoning-gym"
    packages = ("reasoning-gym",)
    fields = ("question", "answer", "metadata")

    @staticmethod
    def load_scorer() -> BindRow:
        from reasoning_gym.factory import DATASETS, get_score_answer_fn

        scorer = cache(get_score_answer_fn)

        def bind(row: Row) -> ScoreAnswer:
            name = row["metadata"].get("source_dataset")
            if name not in DATASETS:
                raise ValueError(f"reasoning_gym has no dataset {name}")
            score = scorer(name)

            def score_answer(answer: str) -> float:
                sys.addaudithook(_refuse_evaluation)
                return float(score(answer, entry=dict(row)))

            return score_answer

        return bind

    @staticmethod
    def correct_answer(row: Row) -> str:
        return str(row["answer"])


def _refuse_evaluation(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook that refuses to compile strings, the first step of eval and exec."""
    if event == "compile" and isinstance(arguments[0], str | bytes) and arguments[1] == "<string>":
        raise PermissionError("the scorer would have evaluated a string as Python, which needs the sandbox")
