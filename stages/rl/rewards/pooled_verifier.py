"""A verifier whose package parses answers, so that it runs in limited processes (see `scoring_pool`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, ClassVar

from pydantic import Field

from pipeline.core.bounds import Range
from pipeline.core.errors import installing
from pipeline.core.stage import Config
from stages.rl.protocols import Answer, Parts, Row, Verifier, VerifierContext
from stages.rl.rewards.scoring_pool import ScoringPool
from stages.rl.rewards.scoring_worker import BindRow


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
