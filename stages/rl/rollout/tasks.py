"""Stage `tasks`: the questions of a reinforcement-learning phase, drawn before it begins and sealed as NeMo Gym rows.

    atom run atom-tiny --until tasks-rlvr

Tasks are grouped in bins of one kind and level, from which the phase's curriculum draws. No task has the question of an
evaluation item, or n consecutive words of an item of a task set. The sources of tasks are in task_sources/.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, model_validator

from pipeline.core.bounds import Key, Seed, Settings
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added, operational
from pipeline.core.store import Artifact
from stages.data.curate.secret_patterns import find_secret
from stages.data.curate.settings import Ngram
from stages.formats.table import read_jsonl, write_json, write_jsonl
from stages.rl.protocols import TaskSource
from stages.rl.rewards.registry import make_verifiers, obstacle
from stages.rl.rollout.generation import Verifiers
from stages.rl.rollout.probes import PROBES, ProbedBin, probe, require_solving
from stages.rl.rollout.task_sources.registry import source_classes
from stages.tasks.benchmarks import texts_of as item_texts
from stages.tasks.eval_set import chat_rows, texts_of
from stages.tasks.rows import Row, bin_of, question

VERSION = 4
# The verifier that is trained after the tasks are drawn, so that none of its rewards is known.
TRAINED = "reward-model"

if TYPE_CHECKING:
    Source = TaskSource
else:
    Source = Annotated[Union[source_classes()], Field(discriminator="source")]  # noqa: UP007
Tasks = Annotated[tuple[Source, ...], Field(min_length=1, max_length=1000)]


class TasksConfig(Config):
    """The sources of a phase's tasks, and the recipe's seed."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1, max_length=2000)]
    """sources of the tasks"""
    seed: Seed
    """seed of the recipe"""
    ngram: Ngram | None = added(None)
    """number of words that no question may share with an item of a task set; null: there are no task sets"""

    verifiers: Annotated[dict[Key, Settings], Field(max_length=100)] = operational({})
    """settings of verifiers by name, such as the URL of a server"""

    @model_validator(mode="after")
    def _check_distinct(self) -> TasksConfig:
        bins = Counter(name for source in self.sources for name in source.bins())
        duplicates = [name for name, count in bins.items() if count > 1]
        if duplicates:
            raise ValueError(f"tasks: two sources give {duplicates[0]}; give each kind and level once")
        return self


def kinds_of(sources: Iterable[TaskSource]) -> set[str]:
    """Returns the kinds of tasks of the sources."""
    return {name.rsplit("/", 1)[0] for source in sources for name in source.bins()}


def run(config: TasksConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `tasks.jsonl`, and `probes.json`: the rewards of answers that solve nothing.

    No task may have a question of the evaluation items, inputs["items"], or, if there are task sets, words of their
    items, inputs["benchmarks"].

    Raises:
        RecipeError: A source has no tasks.
        AtomError: The reward of a source needs no solving.
    """
    excluded = {text for _, text in texts_of(inputs["items"])} | {question(row) for row in chat_rows(inputs["items"])}
    rows = [row for source in config.sources for row in source.rows(config.seed, excluded)]
    tasks = [row for row in rows if question(row) not in excluded]
    if len(rows) > len(tasks):
        report.note(f"{len(rows) - len(tasks)} tasks ask what an evaluation item asks and were left out")
    if config.ngram is not None:
        tasks = _without_shared_words(tasks, inputs["benchmarks"], config.ngram, report)
    tasks = _without_secrets(tasks, report)
    write_jsonl(out / "tasks.jsonl", tasks)
    write_json(out / PROBES, _probe(config, tasks, report))


def _without_secrets(tasks: list[Row], report: Report) -> list[Row]:
    """Returns the tasks without access tokens and private keys, since all tasks are published."""
    # Also with real line ends, since a private key has several lines.
    public = [row for row in tasks if not find_secret(text := json.dumps(row), text.replace("\\n", "\n"))]
    if len(tasks) > len(public):
        report.note(f"{len(tasks) - len(public)} tasks hold an access token or a private key and were left out")
    return public


def _probe(config: TasksConfig, tasks: Sequence[Row], report: Report) -> dict[str, ProbedBin]:
    """Returns the probes of every bin, each of which passes."""
    by_bin: dict[str, list[Row]] = {}
    for row in tasks:
        by_bin.setdefault(bin_of(row), []).append(row)
    sources = {name: source for source in config.sources for name in source.bins()}
    probed: dict[str, ProbedBin] = {}
    # The reward model does not exist yet, so its tasks are drawn unprobed.
    rows = [row for row in tasks if row["verifier"] != TRAINED]
    with closing(Verifiers(make_verifiers(rows, {}, None, config.verifiers), report.note)) as verifiers:
        for name, bin_rows in sorted(by_bin.items()):
            report.note(f"{name}: {len(bin_rows)} tasks")
            if bin_rows[0]["verifier"] != TRAINED:
                probed[name] = probe(bin_rows, verifiers.score, config.seed, sources[name].acknowledged_reward)
                require_solving(name, probed[name])
    return probed


def _without_shared_words(tasks: list[Row], benchmarks: Artifact, ngram: int, report: Report) -> list[Row]:
    """Returns the tasks whose question shares no `ngram` words with an item, nor all words of a shorter item."""
    from stages.data.curate.decontamination import ContaminationIndex

    index = ContaminationIndex(item_texts(benchmarks), ngram)
    matches = {row["id"]: match[0] for row in tasks if (match := index.find(question(row)))}
    if matches:
        first = next(iter(matches))
        report.note(
            f"{len(matches)} tasks share words with an item of a task set and were left out; the first is {first}, "
            f"with item {matches[first]}"
        )
    return [row for row in tasks if row["id"] not in matches]


def read(artifact: Artifact) -> list[dict[str, Any]]:
    return read_jsonl(artifact / "tasks.jsonl")


def estimate(config: TasksConfig) -> Estimate:
    """Returns the resources. A verifier that starts a process for each answer takes minutes of a core for each bin."""
    slow = sum(len(source.bins()) for source in config.sources if source.verifier in ("math-verify", "python-tests"))
    return Estimate(cpu_seconds=30 + 200 * slow, memory_bytes=300_000_000, disk_bytes=10_000_000)


def lack(config: TasksConfig) -> str | None:
    """Returns the reason why a verifier cannot score here; None if all can."""
    return obstacle({source.verifier for source in config.sources} - {TRAINED}, config.verifiers)


STAGE = Stage("tasks", VERSION, TasksConfig, run, estimate=estimate, lack=lack)
