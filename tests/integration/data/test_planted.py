"""Planted duplicates and leaks: every verdict is the known answer, in any number of parts and of tasks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.parts import part_file, part_slice
from pipeline.core.store import Artifact, write_manifest
from stages.data.curate.settings import MinHash
from stages.evaluation import contamination
from stages.formats.table import ITEMS, ORDER, part_files, write_rows
from tests.fixtures.dedup_fixtures import STAGES, stage_configs
from tests.fixtures.filter_fixtures import REMOVED, filter_artifact
from tests.fixtures.run_fixtures import at_length

DOCUMENTS, QUESTIONS = {"prose": 2400, "code": 600}, 60
FORMS = (str, str.upper, lambda text: "  ".join(text.split()), lambda text: f"({text}), he said")


@dataclass
class Planted:
    """A corpus and what is true of it. texts: by id, None if filter removed it; duplicates: {id: (rule, the document
    that it duplicates)}; questions: by id; leaked: those in documents that were trained on; unread: documents that the
    order leaves out."""

    texts: dict[str, str | None] = field(default_factory=dict)
    duplicates: dict[str, tuple[str, str]] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)
    leaked: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)

    def rows_of(self, source: str) -> list[tuple[str, str | None]]:
        return [(id.partition("/")[2], text) for id, text in self.texts.items() if id.startswith(f"{source}/")]


@pytest.fixture(scope="module")
def planted() -> Planted:
    """A tenth of the documents are exact copies of an earlier one, a tenth near copies, some with one more copy in the
    other source; each third question stands in a document that is read, another third in one that is not."""
    rng, corpus = random.Random(17), Planted()
    words = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(3000)]
    corpus.questions = {f"add/{n:05d}": " ".join(rng.choices(words, k=12)) for n in range(QUESTIONS)}
    leaks = iter(rng.sample(sorted(corpus.questions), QUESTIONS * 2 // 3))
    originals: list[str] = []
    for source, count in DOCUMENTS.items():
        for n in range(count):
            id, text = f"{source}/{n:04d}", " ".join(rng.choices(words, k=60))
            fate = "leak" if n % (count // 20) == 7 else rng.choices(["new", "copy", "near", "bad"], [76, 10, 10, 4])[0]
            if fate == "bad":
                corpus.texts[id] = None
                continue
            if fate == "leak":
                question = next(leaks)
                planted_before = len(corpus.leaked) + len(corpus.unread)
                text += f" {FORMS[planted_before // 2 % 4](corpus.questions[question])} and {words[0]}"
                if planted_before % 2:
                    corpus.unread.add(id)
                else:
                    corpus.leaked.add(question)
            elif fate in ("copy", "near") and originals:
                original = rng.choice(originals)
                text = str(corpus.texts[original]) + (f" {rng.choice(words)}" if fate == "near" else "")
                rule = "near_duplicate" if fate == "near" else "exact_duplicate"
                corpus.duplicates[id] = rule, original
            else:
                originals.append(id)
            corpus.texts[id] = text
    assert len(corpus.duplicates) > 500 and len(corpus.leaked) == len(corpus.unread) == 20
    return corpus


def parts_of(planted: Planted, parts: int) -> dict[str, list[dict[str, str | None]]]:
    """The documents of each source in its share of so many parts."""
    counts = {"prose": parts - max(1, parts // 5), "code": max(1, parts // 5)}
    return {
        source: [dict(planted.rows_of(source)[part_slice(DOCUMENTS[source], part, count)]) for part in range(count)]
        for source, count in counts.items()
    }


def run_by_tasks(stage: Any, config: dict[str, Any], inputs: dict[str, Artifact], folder: Path, tasks: int) -> None:
    """The shards of a stage in `tasks` processes of an array, one after the other, the last one first."""
    setup = stage.config.model_validate(config)
    folder.mkdir()
    for task in reversed(range(tasks)):
        for shard in range(task, stage.shards(setup), tasks):
            stage.run_shard(setup, inputs, folder, shard)


def rows_of(folder: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    for source in DOCUMENTS:
        for file in part_files(folder, source):
            yield from pq.ParquetFile(file).read(columns).to_pylist()


def write_order(folder: Path, ids: list[str]) -> Artifact:
    rest = dict.fromkeys(ORDER.keys() - {"step", "id", "source"}, 0)
    rows = [{**rest, "step": n + 1, "id": id, "source": id.partition("/")[0]} for n, id in enumerate(ids)]
    for part in range(3):
        write_rows(folder / part_file(part), ORDER, rows[part_slice(len(rows), part, 3)])
    return write_manifest(folder, "order-pretrain")


@pytest.mark.parametrize("parts", [3, 8, pytest.param(1000, marks=at_length("data-plane", 180))])
def test_every_verdict_is_the_known_answer(planted: Planted, tmp_path: Path, run_stage: Any, parts: int) -> None:
    minhash, sources = MinHash(), parts_of(planted, parts)
    inputs = {"filter": filter_artifact(tmp_path / "filter", sources, {"prose": minhash, "code": minhash})}
    names = [
        {"name": name, "kind": name, "heldout_fraction": 0.0, "parts": len(documents)}
        for name, documents in sources.items()
    ]
    config: dict[str, Any] = {"sources": names, "minhash": {}}
    for name, settings in stage_configs(config).items():
        run_by_tasks(STAGES[name], settings, inputs, tmp_path / name, parts)
        inputs = {**inputs, name: run_stage(STAGES[name], settings, inputs, tmp_path / name)}
    curated = inputs["dedup"]
    decided = {
        row["id"]: (row["rule"], row["duplicate_of"])
        for row in rows_of(curated / "dispositions", ["id", "rule", "duplicate_of"])
    }
    assert decided == {
        id: (REMOVED, None) if text is None else planted.duplicates.get(id, (None, None))
        for id, text in planted.texts.items()
    }
    kept = [row["id"] for row in rows_of(curated / "kept", ["id"])]
    assert kept == [id for id in planted.texts if decided[id] == (None, None)], "in the order of input"

    questions = [
        {"id": id, "task": "add", "prompt": text, "answer": "", "text": text} for id, text in planted.questions.items()
    ]
    write_rows(tmp_path / "items/items.parquet", ITEMS, questions)
    inputs = {
        "dedup": curated,
        "items": write_manifest(tmp_path / "items", "items"),
        "order-pretrain": write_order(tmp_path / "order", [id for id in kept if id not in planted.unread]),
    }
    config = {"parts": {name: len(documents) for name, documents in sources.items()}}
    run_by_tasks(contamination.STAGE, config, inputs, tmp_path / "contamination", parts)
    searched = run_stage(contamination.STAGE, config, inputs, tmp_path / "contamination")
    verdicts = {row["id"]: row["verdict"] for row in pq.read_table(searched / "items.parquet").to_pylist()}
    assert verdicts == {id: "contaminated" if id in planted.leaked else "clean" for id in planted.questions}
    assert searched.json("report.json")["read"] == {"pretrain": len(kept) - len(planted.unread)}
