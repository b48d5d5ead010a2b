"""Task source `worked-problems`: procedural problems whose intermediate values the verifier `steps` verifies."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import Share
from pipeline.core.stage import Config
from stages.data.synthetic.problems import Problem
from stages.rl.protocols import TaskSource
from stages.rl.rollout.task_sources.problem_tasks import ProblemSource


class StepWeights(Config):
    """Weights of the parts of a process reward."""

    answer: Share = Field(default=0.5, description="weight of the correct result")
    steps: Share = Field(default=0.5, description="weight of the share of correct intermediate values")

    @model_validator(mode="after")
    def _check_sum(self) -> StepWeights:
        if not 0 < self.answer + self.steps <= 1:
            raise ValueError(f"answer = {self.answer} and steps = {self.steps} give no reward between 0 and 1; use "
                             "weights with a sum above 0 and at most 1")  # fmt: skip
        return self


class WorkedTasks(ProblemSource):
    """Procedural problems with their worked steps, each of which is verified."""

    verifier: ClassVar[str] = "steps"
    source: Literal["worked-problems"] = Field(description="selects this kind of tasks")
    weights: StepWeights = Field(StepWeights(), description="weights of the parts of the reward")

    def _fields(self, problem: Problem) -> dict[str, Any]:
        return super()._fields(problem) | {"steps": problem.steps.split(";"), "weights": self.weights.model_dump()}


SOURCE: type[TaskSource] = WorkedTasks
