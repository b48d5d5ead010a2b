"""Stage `tasks`: the questions of a reinforcement-learning phase, drawn before it begins and sealed as NeMo Gym rows.

    atom run atom-tiny --until tasks-rlvr

Tasks are grouped in bins of one kind and level, from which the phase's curriculum draws. No task has the question of an
evaluation item, or n consecutive words of an item of a task set. The sources of tasks are in task_sources/.

A policy learns whatever the verifier rewards. So the verifier scores answers that solve nothing (unsolved.py), in
families of attacks. Their mean reward may not be more than MARGIN above chance.

- **Chance** of a bin is the share of its tasks that have the most frequent right answer, which the best constant earns
  where right answers alone are rewarded, but at most EVEN. It is 0 if the rows state no right answer. A task of two
  answers has chance EVEN; where one of them is right more often, a policy would learn to give it always, and that is
  no chance.
- All answers are scored on SCREENED tasks. The best FINALISTS of them, and the best of each family, are scored again on
  up to PROBED other tasks, so that none of many answers is best by luck. A bin is refused if the mean, less Z standard
  errors and one task, is more than MARGIN above chance. In a small bin all answers are scored on all tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, Union

from pydantic import Field, model_validator

from pipeline.core.bounds import Key, Seed, Settings
from pipeline.core.errors import AtomError
from pipeline.core.extensions import imported
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added, operational
from pipeline.core.store import Artifact
from stages.confidence import Mean, clustered
from stages.data.curate.secret_patterns import find_secret
from stages.data.curate.settings import Ngram
from stages.formats.seeds import seed_of
from stages.formats.table import read_jsonl, write_json, write_jsonl
from stages.rl.protocols import (
    TASK_SOURCES,
    TRAINED,
    Answer,
    Parts,
    TaskSource,
    make_verifiers,
    obstacle,
)
from stages.rl.rollout.generation import Verifiers
from stages.rl.rollout.unsolved import ALTERNATIVES, unsolved_answers
from stages.tasks import Row, bin_of, contents, question, right_answer
from stages.tasks.benchmarks import texts_of as item_texts
from stages.tasks.eval_set import chat_rows, texts_of

VERSION = 6
# The file of the probes of a phase's tasks.
PROBES = "probes.json"
# The mean reward above chance that an answer may earn without solving the task.
MARGIN = 0.05
# The largest chance that follows from the right answers: of two that are equally frequent.
EVEN = 0.5
# Tasks of the first scoring and of the second one, best answers of the first for the second, frequent right answers.
SCREENED, PROBED, FINALISTS, FREQUENT = 16, 256, 3, 3
# Half the width of a normal 99 % interval, in standard errors.
Z = 2.576
Score = Callable[[Sequence[Answer]], Sequence[Parts]]

if TYPE_CHECKING:
    Source = TaskSource
else:
    Source = Annotated[Union[tuple(map(imported, TASK_SOURCES.values()))], Field(discriminator="source")]  # noqa: UP007
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
    tasks = [row for row in rows if excluded.isdisjoint(contents(row))]
    if len(rows) > len(tasks):
        report.note(f"{len(rows) - len(tasks)} tasks have the text of an evaluation item and were left out")
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
    """Returns the tasks whose messages share no `ngram` words with an item, nor all words of a shorter item."""
    from stages.data.curate.decontamination import ContaminationIndex

    index = ContaminationIndex(item_texts(benchmarks), ngram)
    matches = {row["id"]: found[0][0] for row in tasks if (found := list(filter(None, map(index.find, contents(row)))))}
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


class ProbedAnswer(TypedDict):
    """An answer and its mean reward."""

    family: str
    """family of attacks to which it belongs, such as `echo`"""
    name: str
    """the answer, such as the constant in quotes"""
    reward: Mean
    """its mean reward over the tasks"""


class ProbedBin(TypedDict):
    """The probes of the tasks of one kind and level."""

    tasks: int
    """number of tasks"""
    verifier: str
    """name of the verifier"""
    chance: float
    """mean reward that chance earns"""
    acknowledged: float | None
    """mean reward that the recipe acknowledges; null if it acknowledges none"""
    answers: list[ProbedAnswer]
    """the best answers and the best of each family, the best first; none for `reward-model`, which is trained later"""


def probe(rows: Sequence[Row], score: Score, seed: int, acknowledged: float | None = None) -> ProbedBin:
    """Scores the tasks of one bin.

    Args:
        rows: All tasks of the bin, which have one verifier.
        score: Scores answers by their verifier; raises VerifierFailed for a reward that is no finite number.
        seed: The recipe's.
        acknowledged: The mean reward that the recipe acknowledges.
    """
    # By a salted hash, so that the drawn tasks do not depend on the order of the rows.
    salt = f"{seed_of(f'probes/{bin_of(rows[0])}', seed)}/"
    drawn = sorted(rows, key=lambda row: hashlib.sha256(f"{salt}{row['id']}".encode()).digest())
    # The most frequent right answer is what the best constant answer would earn.
    golds = Counter(gold for row in rows if (gold := right_answer(row)) is not None)
    common = [gold for gold, _ in golds.most_common(1 + ALTERNATIVES)]
    # In a small bin there are no other tasks for a second look.
    screened = SCREENED if len(drawn) >= 2 * SCREENED else len(drawn)
    best = _finalists(_means(drawn[:screened], common, score, None))
    if finals := drawn[screened : screened + PROBED]:
        best = _means(finals, common, score, {answer["name"] for answer in best})
    return {
        "tasks": len(rows),
        "verifier": str(rows[0]["verifier"]),
        "chance": min(EVEN, golds[common[0]] / len(rows)) if common else 0.0,
        "acknowledged": acknowledged,
        "answers": best,
    }


def require_solving(name: str, probed: ProbedBin) -> None:
    """Raises AtomError if an answer that solves nothing earns too much in the bin `name`."""
    limit = probed["chance"] + MARGIN
    if (acknowledged := probed["acknowledged"]) is not None:
        limit = max(limit, acknowledged)
    for answer in probed["answers"]:
        reward = answer["reward"]
        # Less one task too, since the standard error is 0 where all rewards are equal.
        if reward["value"] - Z * reward["se"] - 1 / reward["n"] > limit:
            raise AtomError(
                f"tasks {name}: {answer['name']}, which solves nothing, earns a mean reward of {reward['value']:.3f} ± "
                f"{reward['se']:.3f} on {reward['n']} tasks, where chance earns {probed['chance']:.3f}; a policy would "
                "learn this answer: leave the tasks out, or state in the source the acknowledged_reward up to which "
                "they are used"
            )


def _finalists(answers: Sequence[ProbedAnswer]) -> list[ProbedAnswer]:
    """Returns the best answers and the best of each family, in their order, which is the best first."""
    first: dict[str, ProbedAnswer] = {}
    for answer in answers:
        first.setdefault(answer["family"], answer)
    return [answer for n, answer in enumerate(answers) if n < FINALISTS or answer is first[answer["family"]]]


def _means(rows: Sequence[Row], common: Sequence[str], score: Score, names: set[str] | None) -> list[ProbedAnswer]:
    """Returns the mean reward of each answer over tasks, the best first.

    Args:
        rows: The tasks.
        common: The right answers of the bin, the most frequent first.
        score: Scores answers by the verifier of the tasks.
        names: Names of the answers; None for all.
    """
    answers = [
        (row, answer)
        for row in rows
        for answer in unsolved_answers(row, common[:FREQUENT], common)
        if names is None or answer.name in names
    ]
    rewards: dict[tuple[str, str], list[float]] = {}
    scored = score([(row, answer.response) for row, answer in answers])
    for (_, answer), parts in zip(answers, scored, strict=True):
        rewards.setdefault((answer.family, answer.name), []).append(parts["reward"])
    answered: list[ProbedAnswer] = [
        {"family": family, "name": name, "reward": _mean(values)} for (family, name), values in rewards.items()
    ]
    return sorted(answered, key=lambda answer: -answer["reward"]["value"])


def _mean(values: Sequence[float]) -> Mean:
    """Returns a mean with its standard error over tasks; 0 for one task, which never decides."""
    return clustered(values) if len(values) > 1 else {"value": values[0], "se": 0.0, "n": 1}


STAGE = Stage("tasks", VERSION, TasksConfig, run, estimate=estimate, lack=lack)
