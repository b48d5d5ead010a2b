"""Scores of models, and answers for the cards.

The scores are the published ones and those recomputed from their tables, which `verify` compares. The answers are
chosen by a rule, so that nobody picks the best ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from release.facts.published_tables import read_json, read_rows, stream_rows
from release.layout import UNMERGED, trained_by, when
from stages.confidence import Ratio, ratio
from stages.evaluation.pass_at_k import GREEDY
from stages.evaluation.scores import (
    BenchmarkChange,
    BenchmarkChanges,
    HarnessScores,
    ModelScores,
    SourceBaselines,
)
from stages.formats.table import read_jsonl

ChatScores = dict[str, Any]
"""The content of a scores.json by model: AnswerScores, or ComparisonScores of the benchmark `preferences`."""
CHAT_BENCHMARKS = ("test", "fresh", "preferences")
"""The benchmarks of chat models, by the names of their folders."""
CONTAMINATION = "evaluation/contamination/report.json"
"""The folder with what models give away of their training data, in `evaluation/`: by model in a dataset repository, of
the model itself in its own."""

BASELINES = "evaluation/baselines/report.json"
"""The report on the baselines of bits per byte, in a dataset repository and in that of each model."""

HARNESS = "harness"
"""The folder with the results of lm-evaluation-harness, in the same places."""
CHANGES = "changes.json"
"""In that folder, the differences between the models of the release."""
TEXT_ITEMS = "text_items"
"""The folder with the items of held-out text, in `evaluation/` of a dataset repository."""


def compute_scores(folder: Path) -> ModelScores:
    """Returns the scores of one phase, recomputed from its tables: two, and further ones with long contexts."""
    from stages.evaluation.model_evaluation import KINDS, summary

    files = [folder / f"{name}.parquet" for name in KINDS]
    # The first two tables must exist, so a missing one raises an error; the others come with long contexts.
    tables: list[Any] = [read_rows(path) if path.is_file() or path in files[:2] else [] for path in files]
    return cast(ModelScores, {**summary(*tables), **_stated(folder, "engine")})


def compute_baselines(evaluation: Path) -> dict[str, dict[str, SourceBaselines]]:
    """Returns the figures of the baselines, recomputed from the tables and the stated bits of xz."""
    from stages.evaluation.baselines import summary

    stated = read_json(evaluation.parent / BASELINES)["models"]
    rows: Any = read_rows(evaluation / "baselines/baselines.parquet")
    return {
        model: summary(
            cast(Any, read_rows(evaluation / model / "documents.parquet")),
            rows,
            {source: figures["xz"]["bits"] for source, figures in by_source.items()},
        )
        for model, by_source in stated.items()
    }


def compute_chat_scores(evaluation: Path) -> dict[str, ChatScores]:
    """Returns the scores recomputed from the tables, by benchmark and model. Empty without a chat model."""
    from stages.evaluation import pass_at_k, win_rate

    facts: dict[str, ChatScores] = {}
    for benchmark in CHAT_BENCHMARKS:
        summarize: Callable[[Any], Mapping[str, Any]] = pass_at_k.summary
        if benchmark == "preferences":
            summarize = win_rate.summary
        tables = chat_tables_of(evaluation, benchmark)
        scored = {
            path.parent.name: {
                **summarize(read_rows(path)),
                **_stated(path.parent, "model", "before", "engine"),
            }
            for path in tables
        }
        if scored:
            facts[benchmark] = {name: scored[name] for name in sorted(scored, key=when)}
    return facts


@dataclass(frozen=True)
class HarnessFacts:
    """The results of lm-evaluation-harness of a model.

    Attributes:
        scores: Its scores.
        task_sets: By name the tasks, the license of the data and its evidence, the revision, and the engine if it is
            not the stage's process.
        changes: The differences between models of the release on these items; empty if one was measured.
    """

    scores: HarnessScores
    task_sets: dict[str, Any]
    changes: Sequence[BenchmarkChange] = ()


def read_harness(folder: Path) -> HarnessFacts | None:
    """Returns the published results of a model; None if it was not measured."""
    if not (folder / "scores.json").exists():
        return None
    path = folder / CHANGES
    changes = read_json(path)["changes"] if path.exists() else ()
    return HarnessFacts(read_json(folder / "scores.json"), read_json(folder / "tasks.json"), changes)


def compute_harness(folder: Path) -> HarnessScores:
    """Returns the scores of one model's task sets, recomputed from the table of its items."""
    from stages.evaluation import harness

    rows: Any = read_rows(folder / "items.parquet")
    return harness.summary(rows)


def compute_changes(folder: Path) -> BenchmarkChanges:
    """Returns the differences between models, recomputed from the tables of their items.

    `folder` has a folder for each model, and `changes.json`, which states their order.
    """
    from stages.evaluation.benchmark_changes import changes

    models = read_json(folder / CHANGES)["models"]
    tables: Any = {name: read_rows(folder / name / "items.parquet") for name in models}
    return changes(tables, {name: read_json(folder / name / "tasks.json") for name in models})


def chat_tables_of(evaluation: Path, benchmark: str) -> list[Path]:
    """Returns the tables of a benchmark, one for each model."""
    return sorted((evaluation / benchmark).glob(f"*/{'pairs' if benchmark == 'preferences' else 'answers'}.parquet"))


def _stated(folder: Path, *names: str) -> dict[str, str]:
    """Returns the fields that no table has, as the published scores of a folder state them.

    These are the two models of a comparison, and the engine that computed the scores.
    """
    path = folder / "scores.json"
    stated = read_json(path) if path.exists() else {}
    return {name: stated[name] for name in names if name in stated}


SHOWN = 2
"""Right and wrong answers of each kind of problem that are shown."""


@dataclass(frozen=True)
class ExampleAnswer:
    """A greedy answer of a model.

    Attributes:
        kind: Kind of the problem.
        request: What the model was asked, or the text that it continues.
        text: Answer with its reasoning.
        right: True for a right answer.
        in_conversation: True if the request is in the chat template.
    """

    kind: str
    request: str
    text: str
    right: bool
    in_conversation: bool


def merge_effects(dataset: Path, models: Iterable[str]) -> dict[str, Ratio]:
    """Returns by how much merging changed the bits per byte of the held-out documents, by phase.

    Standard errors are those of the differences of the same documents, over works.

    Args:
        dataset: A dataset repository.
        models: The exported models, among them those that were not merged.
    """
    effects = {}
    for name in models:
        if not name.startswith(UNMERGED):
            continue
        last, merged = (
            {(row["source"], row["id"]): row for row in read_rows(dataset / "evaluation" / model / "documents.parquet")}
            for model in (name, name.removeprefix(UNMERGED))
        )
        changes = [(row["nll_bits"] - last[key]["nll_bits"], row["bytes"]) for key, row in merged.items()]
        effects[trained_by(name)] = ratio(changes, works=[row["work"] for row in merged.values()])
    return effects


def read_examples(dataset: Path, model: str) -> list[ExampleAnswer]:
    """Returns the greedy answers to the first problems, by id, of each kind: SHOWN right ones and SHOWN wrong ones.

    For a model that was not measured in conversation, these are continuations of problems in plain text.

    Args:
        dataset: A dataset repository.
        model: The name of the exported model.
    """
    folders = {path.name: path for path in (dataset / "evaluation/test").glob("*") if path.is_dir()}
    # A model that converses is shown in conversation.
    if model in folders:
        return _chosen(_in_conversation(dataset, folders[model]))
    folders = {path.name: path for path in (dataset / "evaluation").glob("*") if path.is_dir()}
    return _chosen(_in_plain_text(folders[model])) if model in folders else []


def best_example(examples: Sequence[ExampleAnswer]) -> ExampleAnswer | None:
    """Returns the answer for a reader to draw again: the first right one, or the first of all.

    An empty text is no answer.
    """
    # False sorts before true, and `min` takes the first of equal ones.
    return min(filter(lambda answer: answer.text.strip(), examples), key=lambda answer: not answer.right, default=None)


def _in_conversation(dataset: Path, folder: Path) -> Iterator[tuple[str, ExampleAnswer]]:
    columns = ["id", "kind", "sample", "text", "reward"]
    rows = [row for row in stream_rows(folder / "answers.parquet", columns) if row["sample"] == GREEDY]
    path = dataset / "evaluation/chat.jsonl"
    ids = {row["id"] for row in rows}
    questions = {row["id"]: row["question"] for row in read_jsonl(path) if row["id"] in ids and "question" in row}
    for row in rows:
        # A reward between the two is neither a right nor a wrong answer.
        if row["reward"] in (0.0, 1.0) and row["id"] in questions:
            right = row["reward"] == 1.0
            yield row["id"], ExampleAnswer(row["kind"], questions[row["id"]], row["text"], right, True)


def _in_plain_text(folder: Path) -> Iterator[tuple[str, ExampleAnswer]]:
    columns = ["id", "task", "prompt", "output", "score"]
    for row in stream_rows(folder / "items.parquet", columns):
        yield row["id"], ExampleAnswer(row["task"], row["prompt"], row["output"], bool(row["score"]), False)


def _chosen(answers: Iterable[tuple[str, ExampleAnswer]]) -> list[ExampleAnswer]:
    groups: dict[tuple[str, bool], list[tuple[str, ExampleAnswer]]] = {}
    for pair in answers:
        groups.setdefault((pair[1].kind, not pair[1].right), []).append(pair)
    return [
        answer
        for group in sorted(groups)
        for _, answer in heapq.nsmallest(SHOWN, groups[group], key=lambda pair: pair[0])
    ]
