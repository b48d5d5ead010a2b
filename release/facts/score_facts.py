"""Scores of models: the published ones, and those recomputed from their tables. `verify` compares the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from release.facts.published_tables import read_json, read_rows
from release.layout import when
from stages.evaluation.scores import HarnessScores, MemorizationScores, ModelScores

ChatScores = dict[str, Any]
"""The content of a scores.json by model: AnswerScores, or ComparisonScores of the benchmark `preferences`."""
CHAT_BENCHMARKS = ("test", "fresh", "preferences")
"""The benchmarks of chat models, by the names of their folders."""
CONTAMINATION = "evaluation/contamination/report.json"
MEMORIZATION = "memorization"
"""The folder with what models give away of their training data, in `evaluation/`: by model in a dataset repository, of
the model itself in its own."""


HARNESS = "harness"
"""The folder with the results of lm-evaluation-harness, in the same places."""


def compute_scores(folder: Path) -> ModelScores:
    """The scores of one phase, recomputed from its tables: two, and further ones with long contexts."""
    from stages.evaluation.model_evaluation import KINDS, summary

    files = [folder / f"{name}.parquet" for name in KINDS]
    tables: list[Any] = [read_rows(path) if path.is_file() or path in files[:2] else [] for path in files]
    return cast(ModelScores, {**summary(*tables), **_stated(folder, "engine")})


def compute_chat_scores(evaluation: Path) -> dict[str, ChatScores]:
    """The scores recomputed from the tables, by benchmark and model. Empty without a chat model."""
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
    """task_sets: by name the tasks, the license of the data and its evidence, the revision, and the engine if it is
    not the stage's process."""

    scores: HarnessScores
    task_sets: dict[str, Any]


def read_harness(folder: Path) -> HarnessFacts | None:
    """The published results of a model; None if it was not measured."""
    if not (folder / "scores.json").exists():
        return None
    return HarnessFacts(read_json(folder / "scores.json"), read_json(folder / "tasks.json"))


def compute_harness(folder: Path) -> HarnessScores:
    """The scores of one model's task sets, recomputed from the table of its items."""
    from stages.evaluation import harness

    rows: Any = read_rows(folder / "items.parquet")
    return harness.summary(rows)


def compute_memorization(folder: Path) -> MemorizationScores:
    """Returns what one model gives away, recomputed from its table."""
    from stages.evaluation import memorization

    documents: list[Any] = read_rows(folder / "documents.parquet")
    return cast(MemorizationScores, {**memorization.summary(documents), **_stated(folder, "engine")})


def chat_tables_of(evaluation: Path, benchmark: str) -> list[Path]:
    """The tables of a benchmark, one for each model."""
    return sorted((evaluation / benchmark).glob(f"*/{'pairs' if benchmark == 'preferences' else 'answers'}.parquet"))


def _stated(folder: Path, *names: str) -> dict[str, str]:
    """What no table says, as the published scores of a folder state it: the two models of a comparison, and what
    computed the scores."""
    path = folder / "scores.json"
    stated = read_json(path) if path.exists() else {}
    return {name: stated[name] for name in names if name in stated}
