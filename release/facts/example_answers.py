"""Answers of a model to test problems, for its card: chosen by a rule, so that nobody picks the best ones."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from release.facts.published_tables import stream_rows
from stages.evaluation.pass_at_k import GREEDY
from stages.formats.table import read_jsonl

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


def read_examples(dataset: Path, model: str) -> list[ExampleAnswer]:
    """The greedy answers to the first problems, by id, of each kind: SHOWN right ones and SHOWN wrong ones. Of a model
    that was not measured in conversation, the continuations of problems in plain text.

    dataset: a dataset repository; model: the name of the exported model.
    """
    folders = {path.name: path for path in (dataset / "evaluation/test").glob("*") if path.is_dir()}
    if model in folders:
        return _chosen(_in_conversation(dataset, folders[model]))
    folders = {path.name: path for path in (dataset / "evaluation").glob("*") if path.is_dir()}
    return _chosen(_in_plain_text(folders[model])) if model in folders else []


def best_example(examples: Sequence[ExampleAnswer]) -> ExampleAnswer | None:
    """The answer for a reader to draw again: the first right one, or the first of all. An empty text is no answer."""
    return min(filter(lambda answer: answer.text.strip(), examples), key=lambda answer: not answer.right, default=None)


def _in_conversation(dataset: Path, folder: Path) -> Iterator[tuple[str, ExampleAnswer]]:
    columns = ["id", "kind", "sample", "text", "reward"]
    rows = [row for row in stream_rows(folder / "answers.parquet", columns) if row["sample"] == GREEDY]
    path = dataset / "evaluation/chat.jsonl"
    ids = {row["id"] for row in rows}
    questions = {row["id"]: row["question"] for row in read_jsonl(path) if row["id"] in ids and "question" in row}
    for row in rows:
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


def settings_of(recipe: Any, phase: str) -> dict[str, Any]:
    """The section of a phase in a resolved recipe; empty if it has none."""
    kind, _, number = phase.partition("-")
    if kind == "longcontext":
        sections = recipe.get("long_context") or []
        section = sections[int(number) - 1] if number.isdigit() and int(number) <= len(sections) else {}
    else:
        section = recipe.get(phase.replace("-", "_"))
    return section if isinstance(section, dict) else {}
