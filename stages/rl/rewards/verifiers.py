"""The verifiers by name. Each scores an answer of any kind; none gives credit to one that is not finished.

Every part is in [0, 1] unless a server of others says otherwise, and each verifier gives the same parts to all answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.core.errors import AtomError
from stages.rl.protocols import Parts, Response, Row, Verifier, VerifierFailed, to_row
from stages.rl.rewards.code_verifier import CodeVerifier
from stages.rl.rewards.gym_server import GymServer
from stages.rl.rewards.scoring_pool import ScoringPool
from stages.rl.rewards.scoring_worker import boxed
from stages.scorers import LATEST, SCORERS


class FrozenScorer:
    """A scorer of stages/scorers, in its latest version."""

    name: str
    runs_code = False

    def __init__(self) -> None:
        self.version = LATEST[self.name]
        self._scorer = SCORERS[self.name, self.version]

    def score(self, answers: Sequence[tuple[Row, Response]]) -> list[Parts]:
        return [self._score_row(row, response) for row, response in answers]

    def close(self) -> None:
        """Holds nothing."""

    def _score_row(self, row: Row, response: Response) -> Parts:
        try:
            return self._scorer(row, response.answer, response.finished)
        except (KeyError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise VerifierFailed(
                f"verifier {self.name}, row {row.get('id')}: {reason}; fix the row or drop it"
            ) from error


class Exact(FrozenScorer):
    """The project's own tasks: the answer is the expected one."""

    name = "exact"


class Instructions(FrozenScorer):
    """Constraints that a program can check (IFEval, arXiv 2311.07911). Rows as NeMo Gym's instruction_following."""

    name = "instructions"


class PooledVerifier:
    """A verifier whose package parses answers, so that it runs in limited processes (see `scoring_pool`).

    seconds: processor time for one answer, whole ones. Parts: `reward`, `finished`, `unreadable`.
    """

    name: str
    packages: tuple[str, ...]
    fields: tuple[str, ...]
    runs_code = False

    def __init__(self, seconds: int = 5) -> None:
        self.version = " ".join(["1", *(f"{package} {_version(package)}" for package in self.packages)])
        self._pool = ScoringPool(self.name, self.fields, self.probe, seconds)

    def probe(self, row: Row) -> str:
        """A right answer to the row, as a model would write it."""
        raise NotImplementedError

    def score(self, answers: Sequence[tuple[Row, Response]]) -> list[Parts]:
        return self._pool.score(answers)

    def close(self) -> None:
        self._pool.close()


class MathVerify(PooledVerifier):
    """Mathematical equality by math-verify. Row, as NeMo Gym's math_with_judge: question, expected_answer."""

    name = "math-verify"
    packages = ("math-verify", "latex2sympy2_extended", "sympy")
    fields = ("expected_answer",)

    def probe(self, row: Row) -> str:
        return boxed(str(row["expected_answer"]))


class ReasoningGym(PooledVerifier):
    """The score that a dataset of reasoning_gym gives. Row, as NeMo Gym's reasoning_gym: question, answer, metadata.

    Datasets whose own answers do not get full marks here are refused; `rows` says so before a run does. In 0.1.25 they
    evaluate the answer as Python (bitwise_arithmetic, countdown, puzzle24, number_sorting, polynomial_multiplication,
    the two integrations), have no answer in the row (boxnet, graph_color, propositional_logic, rubiks_cube, rush_hour),
    lose by JSON (arc_agi, rearc), or give any answer full marks (game_of_life_halting).
    """

    name = "reasoning-gym"
    packages = ("reasoning-gym",)
    fields = ("question", "answer", "metadata")

    def probe(self, row: Row) -> str:
        return str(row["answer"])


def reasoning_gym_rows(dataset: str, seed: int, count: int, level: int = 0, **config: Any) -> Iterator[dict[str, Any]]:
    """`count` rows of a reasoning_gym dataset, whose own settings are `config`. Kind: the dataset's name.

    Raises AtomError if there is no such dataset, it refuses the settings, or it cannot be judged here.
    """
    _version("reasoning-gym")
    from reasoning_gym.factory import create_dataset

    try:
        entries = create_dataset(dataset, seed=seed, size=count, **config)
    except (ValueError, TypeError, AssertionError) as error:
        raise AtomError(f"reasoning_gym dataset {dataset} with {config}: {error}; see its configuration") from error
    rows = [
        # As it will be read again: JSON makes lists of tuples, which some datasets cannot score.
        json.loads(json.dumps(to_row(f"{dataset}-{seed}-{i}", e["question"], ReasoningGym.name, dataset, level, **e)))
        for i, e in enumerate(entries)
    ]
    gym = ReasoningGym()
    try:
        gym.score([(row, Response.parse(gym.probe(row), finished=True)) for row in rows])
    finally:
        gym.close()
    return iter(rows)


VERIFIERS: dict[str, Callable[..., Verifier]] = {
    kind.name: kind for kind in (Exact, Instructions, MathVerify, ReasoningGym, CodeVerifier, GymServer)
}


def make_verifier(name: str, **settings: Any) -> Verifier:
    """The verifier of that name. Raises AtomError for an unknown name or setting, or a missing package."""
    if name not in VERIFIERS:
        raise AtomError(f"no verifier {name!r}; there are {', '.join(sorted(VERIFIERS))}")
    try:
        return VERIFIERS[name](**settings)
    except TypeError as error:
        raise AtomError(f"verifier {name} with the settings {settings}: {error}") from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise AtomError(f"{package} is not installed; pip install 'atom-release[rl]'") from None
