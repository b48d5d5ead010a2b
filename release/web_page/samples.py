"""Bounded samples of the tables of a release, for its page: documents, removals, answers, and artifacts.

The page links to the tables, which have all rows.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core import provenance
from release import layout, tracing, untrusted
from release.facts.data_facts import DataFacts
from release.facts.published_tables import read_json, stream_batches, stream_rows
from release.layout import STATEMENTS, when
from release.opened_release import Release
from release.tracing.documents import find_documents
from release.tracing.release_data import ReleaseData

ITEMS, REMOVED = 12, 4
"""Items of an evaluation set, and removed documents of a rule that are shown."""
MANIFESTS = "evidence/manifests"
TRACE_CHARACTERS = 2_000
"""The maximum length of a report that is shown."""
ROWS = 64
"""Rows of a table of answers that are unpacked together; their texts may be long."""
REMOVED_COLUMNS = ["id", "source", "rule", "bytes", "value", "threshold", "duplicate_of", "match"]


@dataclass(frozen=True)
class Document:
    """A kept document.

    Attributes:
        id: Its id.
        source: Its source.
        text: The beginning of its text.
        trace: The beginning of the report of `atom trace`.
    """

    id: str
    source: str
    text: str
    trace: str


def read_documents(release: Path, data: DataFacts) -> list[Document]:
    """Returns the first training document of each of the first sources."""
    examples = data.first_documents
    ids = [example.id for example in examples.values()]
    traced = find_documents(ReleaseData.locate(release), ids) if ids else {}
    return [
        Document(id, source, text, tracing.text(traced[id])[:TRACE_CHARACTERS] if id in traced else "")
        for source, id, text in ((source, each.id, each.beginning) for source, each in examples.items())
    ]


@dataclass
class Removal:
    """A rule that removed documents.

    Attributes:
        rule: Its name.
        documents: The number of documents.
        bytes: Their size.
        samples: Some of them, as rows of REMOVED_COLUMNS. Texts of removed documents are not published.
    """

    rule: str
    documents: int = 0
    bytes: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)


def read_removals(dataset: Path) -> list[Removal]:
    """Returns the rules; the one that removed the most documents comes first."""
    import pyarrow.compute as pc

    removals: dict[str, Removal] = {}
    files = layout.all_files(layout.disposition_files(dataset))
    for batch in stream_batches(files, [*REMOVED_COLUMNS, "disposition"], 65536):
        removed = batch.filter(pc.equal(batch.column("disposition"), "removed"))
        rules, sizes = removed.column("rule").to_pylist(), removed.column("bytes").to_pylist()
        for number, (rule, size) in enumerate(zip(rules, sizes, strict=True)):
            row = removals.setdefault(rule, Removal(rule))
            row.documents, row.bytes = row.documents + 1, row.bytes + size
            # Only rows that are shown are unpacked: a corpus has millions of removals.
            if len(row.samples) < REMOVED:
                row.samples.append({name: removed.column(name)[number].as_py() for name in REMOVED_COLUMNS})
    return sorted(removals.values(), key=lambda row: (-row.documents, row.rule))


@dataclass(frozen=True)
class Answer:
    """One output to one item.

    Attributes:
        id: The id of the item.
        question: The request; None if it is not known.
        expected: The right answer; None if it is not known.
        text: The output.
        verdict: A class of the page: right, partly or wrong.
        note: Further words on the output.
    """

    id: str
    question: str | None
    expected: str | None
    text: str
    verdict: str
    note: str = ""


Tables = Mapping[str, tuple[Path, Callable[[Path], Iterable[Answer]]]]
"""{column: (its file, the function that reads the answers in it)}; a column is a model or a side of a comparison."""


@dataclass(frozen=True)
class Item:
    """An item with the answer of each column, None where a model was not asked."""

    id: str
    question: str | None
    expected: str | None
    answers: dict[str, Answer | None]


@dataclass(frozen=True)
class Sample:
    """Some items of a set, of `total`."""

    title: str
    files: list[str]
    total: int
    shown: list[Item]


def read_samples(release: Path) -> list[Sample]:
    """Returns some items of each set of the evaluation."""
    samples = []
    for title, tables in _item_sets(release / "dataset/evaluation"):
        # The items with the smallest hashes of ids, so that nobody chooses them. Each file is read twice, so that the
        # texts of other items are not kept in memory.
        ids = {answer.id for path, read in tables.values() for answer in read(path)}
        answers_by_id: dict[str, dict[str, Answer]] = {id: {} for id in heapq.nsmallest(ITEMS, ids, key=_hash)}
        for column, (path, read) in tables.items():
            for answer in read(path):
                if answer.id in answers_by_id:
                    answers_by_id[answer.id][column] = answer

        files = dict.fromkeys(path.relative_to(release).as_posix() for path, _ in tables.values())
        items = []
        for id, answers in answers_by_id.items():
            question = next((answer.question for answer in answers.values() if answer.question is not None), None)
            expected = next((answer.expected for answer in answers.values() if answer.expected is not None), None)
            items.append(Item(id, question, expected, {column: answers.get(column) for column in tables}))
        samples.append(Sample(title, list(files), len(ids), items))
    return samples


def _hash(id: str) -> bytes:
    # An id may have characters that UTF-8 does not allow.
    return hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()


def _item_sets(evaluation: Path) -> Iterator[tuple[str, Tables]]:
    """Yields the title and the tables of each set."""
    fresh = _chat_rows(evaluation / "fresh/chat.jsonl")
    sets: list[tuple[str, str, Callable[[Path], Iterable[Answer]]]] = [
        ("Problems, continued as text", "*/items.parquet", _problem_rows),
        ("Problems in conversation", "test/*/answers.parquet", _chat_rows(evaluation / "chat.jsonl")),
        ("New problems, from the digest of the weights", "fresh/*/answers.parquet", fresh),
    ]
    for title, pattern, read in sets:
        # Beside the folders of models is that of the contamination, whose items are no answers.
        paths = [path for path in evaluation.glob(pattern) if path.parent.name != "contamination"]
        if paths:
            yield title, {model: (path, read) for model, path in _by_model(paths).items()}
    for model, path in _by_model(evaluation.glob("preferences/*/pairs.parquet")).items():
        # A comparison has the answers of two models in one table.
        before = read_json(path.parent / "scores.json")["before"]
        sides = {before: (path, _pair_rows("before")), model: (path, _pair_rows("model"))}
        yield f"Requests: {model} against {before}", sides


def _by_model(paths: Iterable[Path]) -> dict[str, Path]:
    """Returns {model, whose name is that of the folder: path}, by order of training."""
    paths_by_model = {path.parent.name: path for path in paths}
    return {model: paths_by_model[model] for model in sorted(paths_by_model, key=when)}


def _problem_rows(path: Path) -> Iterator[Answer]:
    for row in stream_rows(path, ["id", "prompt", "expected", "output", "score"], ROWS):
        yield Answer(row["id"], row["prompt"], row["expected"], row["output"], _verdict(row["score"]))


def _chat_rows(items: Path) -> Callable[[Path], Iterator[Answer]]:
    """Returns a reader of the greedy answers to the items of a file; each notes how many sampled answers are right."""

    def rows(path: Path) -> Iterator[Answer]:
        questions = dict(_questions(items))
        drawn_counts, right_counts = Counter[str](), Counter[str]()
        # Sampled answers are numbered from 0; the greedy one has a negative number.
        for row in stream_rows(path, ["id", "sample", "reward"]):
            if row["sample"] >= 0:
                drawn_counts[row["id"]] += 1
                if row["reward"] == 1:
                    right_counts[row["id"]] += 1

        for row in stream_rows(path, ["id", "sample", "text", "reward", "finished", "parts"], ROWS):
            if row["sample"] >= 0:
                continue
            question, expected = questions.get(row["id"], (None, None))
            notes = []
            if drawn := drawn_counts[row["id"]]:
                notes.append(f"{right_counts[row['id']]} of {drawn} sampled answers right")
            if not row["finished"]:
                notes.append("cut at the length limit")
            verdict = _verdict(_task_reward(row["parts"], row["reward"]))
            yield Answer(row["id"], question, expected, row["text"], verdict, ", ".join(notes))

    return rows


def _pair_rows(side: str) -> Callable[[Path], Iterator[Answer]]:
    """Returns a reader of the answers of one side of a comparison: `before` or `model`."""

    def rows(path: Path) -> Iterator[Answer]:
        columns = ["id", "question", f"{side}_text", f"{side}_reward", f"{side}_parts"]
        for row in stream_rows(path, columns, ROWS):
            reward = row[f"{side}_reward"]
            verdict = _verdict(_task_reward(row[f"{side}_parts"], reward))
            yield Answer(row["id"], row["question"], None, row[f"{side}_text"], verdict, f"reward {reward:.2f}")

    return rows


def _questions(path: Path) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Yields (id, (question, right answer or None)) of the items in a file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            expected = row.get("expected_answer")
            yield row["id"], (str(row.get("question", "")), None if expected is None else str(expected))


def _task_reward(parts: str | None, reward: float) -> float:
    """Returns the part `task` of a reward, or the whole reward if it has no such part."""
    # A table of a stranger may hold any text here.
    value = untrusted.parse_json(parts.encode(), "parts") if parts else None
    task = value.get("task") if isinstance(value, dict) else None
    return float(task) if isinstance(task, (int, float)) else reward


def _verdict(score: float) -> str:
    if score >= 1:
        return "right"
    return "partly" if score > 0 else "wrong"


@dataclass
class Product:
    """An artifact.

    Attributes:
        node: Its node; its key if it is of an earlier run.
        key: Its key.
        digest: Its digest.
        stage: The stage that made it.
        statement: The path of the statement on the attempt that made it.
        inputs: {role: node} of its inputs.
        seconds: Wall time of that attempt.
        failed: Number of attempts that ended without it.
        checkpoint: True for a checkpoint of a phase.
    """

    node: str
    key: str
    digest: str
    stage: str = ""
    statement: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    failed: int = 0
    checkpoint: bool = False


def read_products(release: Release) -> dict[str, Product]:
    """Returns {node: product}, with the artifacts of earlier runs by their keys."""
    products = {m.key: Product(node, m.key, m.digest) for node, m in release.manifests.items()}
    for path, body in release.statements.items():
        parameters = provenance.parameters_of(body)
        product = products.get(parameters["key"])
        if product is None:
            continue
        product.stage, product.checkpoint = parameters["stage"], provenance.phase_of(body) is not None
        # The statement of an attempt that failed has no such subject.
        if {"name": product.key, "digest": {"sha256": product.digest}} not in body["subject"]:
            product.failed += 1
            continue
        product.statement = f"{STATEMENTS}/{path.name}"
        product.inputs = provenance.material_keys(body)
        product.seconds = float(provenance.usage(body).get("wall_seconds", 0.0))
    # Statements name inputs by key; a reader knows nodes.
    nodes = {product.key: product.node for product in products.values()}
    for product in products.values():
        # An input of which the release has no manifest keeps its key.
        product.inputs = {role: nodes.get(key, key) for role, key in product.inputs.items()}
    return {product.node: product for product in sorted(products.values(), key=lambda each: each.node)}
