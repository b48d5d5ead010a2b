"""Stage `tasks`: the questions of a reinforcement-learning phase, drawn before it begins and sealed as NeMo Gym rows.

    atom run atom-tiny --until tasks-rlvr

Tasks come in bins of one kind and level, from which the phase's curriculum draws. None asks what an evaluation item
asks.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import Key, License, LongLine, Range, Seed, Settings, Sha256, Text, Words
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, operational
from pipeline.core.store import Artifact, sha256_file
from stages.data.seeds import seed_of
from stages.data.synthetic import courtesy_notes, instructions, problems
from stages.data.synthetic.instructions import LEVELS
from stages.data.table import read_jsonl, write_jsonl
from stages.evaluation.eval_set import Task, chat_rows, courtesy_row, texts_of
from stages.rl.protocols import bin_of, question, to_row

if TYPE_CHECKING:
    from stages.rl.protocols import Row

VERSION = 2
CODE = "python-tests"
"""The verifier that runs what the model writes."""
PROVENANCE = {"license": "Apache-2.0", "origin": "procedural"}


Level = Annotated[int, Range(0, 1000)]
"""A level of difficulty."""
Count = Annotated[int, Range(1, 1e7)]


class ProblemTasks(Config):
    """Procedural problems of this project (stages/data/synthetic/problems.py)."""

    source: Literal["problems"] = Field(description="selects this kind of tasks")
    task: Task = Field(description="name of the task, such as add")
    levels: tuple[Level, ...] = Field(min_length=1, max_length=100, description="levels of difficulty, one bin each")
    count: Count = Field(description="maximum number of tasks per level; easy levels may have fewer")

    @model_validator(mode="after")
    def _check_levels(self) -> ProblemTasks:
        for level in self.levels:
            problems.TASKS[self.task](random.Random(0), level)  # raises ValueError in words if there is none
        return self

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        for level in self.levels:
            rng = random.Random(seed_of(f"tasks/{self.task}/{level}", seed))
            generated = problems.draw_up_to(self.task, self.count, rng, level, excluded)
            if not generated:
                raise RecipeError(f"task {self.task} has no problem of level {level} that is not an evaluation item")
            for i, problem in enumerate(generated):
                fields = {"question": problem.question, "expected_answer": problem.answer, **PROVENANCE}
                yield to_row(f"{self.task}/{level}/{i:06d}", problem.question, "exact", self.task, level, **fields)


class CourtesyTasks(Config):
    """Requests for a courteous note, scored by a reward function."""

    source: Literal["courtesies"] = Field(description="selects this kind of tasks")
    verifier: Key = Field("courtesy", description="reward function: courtesy (rules) or reward-model (trained)")
    count: Count = Field(description="number of requests")

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        try:
            requests = courtesy_notes.draw_distinct(
                self.count, random.Random(seed_of("tasks/courtesies", seed)), heldout=False
            )
        except ValueError as error:
            raise RecipeError(f"tasks: {error}; ask for fewer") from None
        for i, request in enumerate(requests):
            yield courtesy_row(f"courtesy/{i:06d}", request, self.verifier, **PROVENANCE)


class InstructionTasks(Config):
    """Requests for a note of a given form (stages/data/synthetic/instructions.py). The level is the number of
    constraints."""

    source: Literal["instructions"] = Field(description="selects this kind of tasks")
    levels: tuple[Annotated[int, Range(LEVELS[0], LEVELS[-1])], ...] = Field(
        min_length=1, max_length=len(LEVELS), description="numbers of constraints, one bin each"
    )
    count: Count = Field(description="number of tasks per level")

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        for level in self.levels:
            rng = random.Random(seed_of(f"tasks/instructions/{level}", seed))
            try:
                requests = instructions.requests(self.count, rng, level)
            except ValueError as error:
                raise RecipeError(f"tasks: {error}; ask for fewer") from None
            for i, (text, fields) in enumerate(requests):
                yield to_row(
                    f"instructions/{level}/{i:06d}", text, "instructions", "instructions", level, **fields, **PROVENANCE
                )


class ReasoningGymTasks(Config):
    """A dataset of the package reasoning-gym."""

    source: Literal["reasoning-gym"] = Field(description="selects this kind of tasks")
    dataset: Key = Field(description="name of the dataset")
    level: Level = Field(1, description="level of the bin; `settings` determine the difficulty")
    settings: Settings = Field(default_factory=dict, description="arguments of the dataset, by name")
    count: Count = Field(description="number of tasks")

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        from stages.rl.rewards.verifiers import reasoning_gym_rows

        dataset_seed = seed_of(f"tasks/{self.dataset}/{self.level}", seed) % 2**31
        yield from reasoning_gym_rows(self.dataset, dataset_seed, self.count, self.level, **self.settings)


class FileTasks(Config):
    """Rows of a file in the format of NeMo Gym, one JSON object per line."""

    source: Literal["rows"] = Field(description="selects this kind of tasks")
    path: LongLine = operational(..., "path of the file; its digest, not its path, is part of the key")
    digest: Sha256 = Field(description="SHA-256 digest of the file")
    verifier: Key = Field(description="name of the verifier that scores the answers")
    kind: Annotated[str, Words(64, "name of lower-case letters, digits, '_' and '-'", r"[a-z][a-z0-9_-]*")] = Field(
        description="kind of the tasks, which names their bin"
    )
    level: Level = Field(1, description="level of difficulty, which names their bin")
    license: License = Field(description="SPDX license of rows that state none")
    origin: Text = Field(description="origin of rows that state none: URL or text")

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        path = Path(self.path)
        if not path.is_file():
            raise RecipeError(f"tasks: there is no file {path}; put it there, or correct tasks.path")
        if (digest := f"sha256:{sha256_file(path)}") != self.digest:
            raise RecipeError(f"tasks: {path} has the digest {digest}, not {self.digest}; restore it, or change digest")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                question(row)
            except (ValueError, LookupError, TypeError) as error:
                raise AtomError(f"{path}, line {number}: not a row of NeMo Gym ({error!r}); fix it") from None
            fields = {"verifier": self.verifier, "kind": self.kind, "level": self.level}
            yield {"license": self.license, "origin": self.origin, **row, **fields, "id": f"{self.kind}/{number:06d}"}


TaskSource = Annotated[
    ProblemTasks | CourtesyTasks | InstructionTasks | ReasoningGymTasks | FileTasks, Field(discriminator="source")
]
Tasks = Annotated[tuple[TaskSource, ...], Field(min_length=1, max_length=1000)]


class TasksConfig(Config):
    """The sources of a phase's tasks, and the recipe's seed."""

    sources: Annotated[tuple[TaskSource, ...], Field(min_length=1, max_length=2000)] = Field(
        description="sources of the tasks"
    )
    seed: Seed = Field(description="seed of the recipe")

    @model_validator(mode="after")
    def _check_distinct(self) -> TasksConfig:
        bins = Counter(name for source in self.sources for name in bins_of(source))
        duplicates = [name for name, count in bins.items() if count > 1]
        if duplicates:
            raise ValueError(f"tasks: two sources give {duplicates[0]}; give each kind and level once")
        return self


def bins_of(source: Any) -> list[str]:
    """The bins that a source fills, as `<kind>/<level>`."""
    if isinstance(source, ProblemTasks):
        return [f"{source.task}/{level}" for level in source.levels]
    if isinstance(source, InstructionTasks):
        return [f"instructions/{level}" for level in source.levels]
    if isinstance(source, CourtesyTasks):
        return ["courtesy/1"]
    return [f"{source.dataset if isinstance(source, ReasoningGymTasks) else source.kind}/{source.level}"]


def kinds_of(sources: Iterable[Any]) -> set[str]:
    """The kinds of tasks that sources give."""
    return {name.rsplit("/", 1)[0] for source in sources for name in bins_of(source)}


def run(config: TasksConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `tasks.jsonl`. inputs["items"]: what no task may ask. Raises RecipeError for a source that gives none."""
    excluded = {text for _, text in texts_of(inputs["items"])} | {question(row) for row in chat_rows(inputs["items"])}
    rows = [row for source in config.sources for row in source.rows(config.seed, excluded)]
    tasks = [row for row in rows if question(row) not in excluded]
    if len(rows) > len(tasks):
        report.note(f"{len(rows) - len(tasks)} tasks ask what an evaluation item asks and were left out")
    write_jsonl(out / "tasks.jsonl", tasks)
    for name, count in sorted(Counter(bin_of(row) for row in tasks).items()):
        report.note(f"{name}: {count} tasks")


def read(artifact: Artifact) -> list[dict[str, Any]]:
    return read_jsonl(artifact / "tasks.jsonl")


STAGE = Stage("tasks", VERSION, TasksConfig, run, estimate=lambda config: Estimate(cpu_seconds=3))
