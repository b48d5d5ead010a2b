"""Verifiers whose package parses answers, so that they run in limited processes (see `scoring_pool`)."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, ClassVar

from pydantic import Field

from pipeline.core.bounds import Range
from pipeline.core.errors import installing
from pipeline.core.stage import Config
from stages.rl.protocols import Answer, Parts, Verifier, VerifierContext
from stages.rl.rewards.scoring_pool import ScoringPool
from stages.rl.rewards.scoring_worker import BindRow, ScoreAnswer
from stages.tasks.rows import Row


class PoolSettings(Config):
    """Settings of a verifier that runs in limited processes."""

    seconds: Annotated[int, Range(1, 86400)] = Field(5, description="processor time for one answer, in seconds")


class PooledVerifier(Verifier):
    """Parts: `reward`, `finished`, `unreadable`. The version names that of each package."""

    packages: ClassVar[tuple[str, ...]]
    """Distributions that the score depends on; the first one is what a user installs."""
    fields: ClassVar[tuple[str, ...]]
    """The row's fields that the scorer reads."""
    Settings = PoolSettings

    def __init__(self, context: VerifierContext[PoolSettings]) -> None:
        self.version = " ".join(["1", *(f"{package} {version(package)}" for package in self.packages)])
        place = f"{type(self).__module__}:{type(self).__qualname__}"
        self._pool = ScoringPool(self.name, place, self.fields, self.correct_answer, context.settings.seconds)

    @classmethod
    def missing(cls) -> str | None:
        for package in cls.packages:
            try:
                version(package)
            except PackageNotFoundError:
                return f"{package} is not installed; {installing('rl')}"
        return None

    @staticmethod
    @abstractmethod
    def load_scorer() -> BindRow:
        """Imports the package and returns its scorer. Called in a worker."""

    @staticmethod
    @abstractmethod
    def correct_answer(row: Row) -> str:
        """A correct answer to the row, in the form of a model's answer."""

    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        return self._pool.score(answers)

    def close(self) -> None:
        self._pool.close()


class MathVerify(PooledVerifier):
    """Verifier `math-verify`: mathematical equality. Row, as NeMo Gym's math_with_judge: question, expected_answer
    (LaTeX or a plain expression).

    math-verify 0.9 passes only digits and operators of an answer to sympy's evaluating parser; the rest is parsed by
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


class ReasoningGym(PooledVerifier):
    """Verifier `reasoning-gym`: the score by a dataset of that package. Row, as NeMo Gym's reasoning_gym: question,
    answer, metadata with source_dataset.

    Refuses datasets whose own answers do not get full marks here; the task source reports them before a run.

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
