"""Stage `contamination`: the overlap of each evaluation item with the training data, beside the scores.

    atom run atom-tiny --only contamination

Every item (test, validation, fresh) is compared with every training phase: with the whole documents that the phase's
order reads, even if it reads a part of one, and with the prompts of reinforcement and preference learning. Each pair
has two measures: the share of the item's word n-grams that occur in the phase, and the longest run of the item's words
that does. Paraphrases are not detected. For a phase that continues from a checkpoint of an earlier run, only the order
of this run is searched.

The recall and the false-positive rate of the detector are measured (stages/evaluation/contamination_corpus.py): items
that occur nowhere are planted in copies of training documents, in several forms, and others like them are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, PositiveShare, Range, Seed, SourceName
from pipeline.core.parts import PartCount, shards_of
from pipeline.core.stage import Config, Inputs, Report, Stage, operational
from stages.confidence import Mean, clustered
from stages.data import estimates
from stages.data.estimates import Size
from stages.evaluation.contamination_corpus import Corpus, CorpusSearch, Item
from stages.evaluation.pass_at_k import GREEDY
from stages.evaluation.scores import VERDICTS, ContaminationReport, ScoresByVerdict, VerdictCounts
from stages.formats.table import Double, Int32, String, columns_of, read_table, sources_of, write_json, write_rows
from stages.tasks.eval_set import chat_rows, texts_of
from stages.tasks.rows import question

VERSION = 1


class OverlapRow(TypedDict):
    """An item and a phase. words: of the item; longest: words of its longest run that occurs; overlap: share of its
    n-grams that occur."""

    id: String
    split: String
    kind: String
    phase: String
    words: Int32
    longest: Int32
    overlap: Double
    verdict: String


OVERLAPS = columns_of(OverlapRow)


class ContaminationConfig(Config):
    """The thresholds of contamination, and the size of the detector's test."""

    ngram: Annotated[int, Range(1, 1000)] = Field(
        8, description="words of an n-gram; a shorter item is a single n-gram"
    )
    contaminated_from: PositiveShare = Field(
        0.5, description="share of its n-grams in one phase from which an item is contaminated"
    )
    overlap_from: PositiveShare = Field(
        0.8, description="share of its words in one consecutive match from which an item overlaps"
    )
    canaries: Annotated[int, Range(4, 1e6)] = Field(
        80, description="maximum number of planted items, with as many that are not planted"
    )
    seed: Seed = Field(description="seed of the recipe")
    parts: Annotated[dict[SourceName, PartCount], Field(max_length=MOST_SOURCES)] = operational(
        {}, "parts of each source that is trained on; empty: all sources that were kept"
    )
    expected: Size | None = operational(None, "size of the corpus, for `atom plan` alone; null: unknown")

    def verdict(self, words: int, overlap: float, longest: int) -> str:
        if overlap >= self.contaminated_from:
            return "contaminated"
        return "overlap" if words and longest >= self.overlap_from * words else "clean"


def run(config: ContaminationConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """inputs: dedup, items; order-<phase> and tasks-<phase> of every phase; fresh and benchmarks, if the recipe has
    them; and of each model the tables evaluate-<model>, solve-<model>, fresh-solve-<model>.

    Seals `items.parquet`, one row for each item and phase, and `report.json`. Resumes after the last searched part.
    Raises AtomError if a document in an order is not among the kept ones.
    """
    items = items_of(inputs)
    search = _search(config, inputs, work, items)
    runs, sources = search.runs, sorted(config.parts) or sources_of(search.kept)
    corpus = Corpus(search, items, sources, report)
    matched_runs = {phase: runs.with_prefixes(nodes) for phase, nodes in corpus.matched.items()}
    rows: list[OverlapRow] = []
    for id, (split, kind, _) in sorted(items.items()):
        words = len(runs.words[id])
        for phase, nodes in matched_runs.items():
            overlap, longest = runs.overlap(id, nodes, config.ngram)
            verdict = config.verdict(words, overlap, longest)
            rows.append(
                {
                    "id": id,
                    "split": split,
                    "kind": kind,
                    "phase": phase,
                    "words": words,
                    "longest": longest,
                    "overlap": overlap,
                    "verdict": verdict,
                }
            )
    write_rows(out / "items.parquet", OVERLAPS, rows)
    verdicts = worst_verdicts(rows)
    detector = corpus.measure_detector(set().union(*corpus.matched.values()), config.ngram, config.contaminated_from)
    body: ContaminationReport = {
        "thresholds": config.model_dump(include={"ngram", "contaminated_from", "overlap_from"}),
        **summary(rows),
        "read": corpus.read,
        "detector": detector,
        "scores": {role: scores_by_verdict(read_scores(inputs, role), verdicts) for role in _score_roles(inputs)},
    }
    write_json(out / "report.json", body)
    for split, counts in body["items"].items():
        report.note(f"{split}: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS))
    report.note(
        f"detector: {detector['recall']['found']} of {detector['recall']['planted']} planted items found, "
        f"{detector['false_positives']['found']} of {detector['false_positives']['absent']} absent ones too"
    )


def run_shard(config: ContaminationConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Searches one part of the kept documents."""
    parts = [(source, number) for source, count in sorted(config.parts.items()) for number in range(count)]
    _search(config, inputs, work, items_of(inputs)).seal(*parts[shard])


def _search(config: ContaminationConfig, inputs: Inputs, work: Path, items: Mapping[str, Item]) -> CorpusSearch:
    from stages.data.curate.decontamination import ItemRuns

    runs = ItemRuns({id: text for id, (_, _, text) in items.items()})
    return CorpusSearch(inputs, work, runs, items, config.canaries, config.seed)


def items_of(inputs: Inputs) -> dict[str, Item]:
    """Every evaluation item by id."""
    items: dict[str, Item] = {}
    for row in read_table(inputs["items"] / "items.parquet", ["id", "task"]).to_pylist():
        items[row["id"]] = ("test", row["task"], "")
    for row in chat_rows(inputs["items"]):
        items[row["id"]] = (row["split"], row["kind"], "")
    texts = dict(texts_of(inputs["items"]))
    items = {id: (split, kind, texts[id]) for id, (split, kind, _) in items.items()}
    for row in chat_rows(inputs["fresh"]) if "fresh" in inputs else []:
        items[row["id"]] = ("fresh", row["kind"], question(row))
    if "benchmarks" in inputs:
        for row in read_table(inputs["benchmarks"] / "items.parquet", ["id", "task", "text"]).to_pylist():
            items[row["id"]] = ("task sets", row["task"], row["text"])
    return items


def worst_verdicts(rows: Sequence[OverlapRow]) -> dict[str, str]:
    """The worst verdict on each item over all phases."""
    verdicts: dict[str, str] = {}
    for row in rows:
        verdicts[row["id"]] = max(verdicts.get(row["id"], VERDICTS[0]), row["verdict"], key=VERDICTS.index)
    return verdicts


def summary(rows: Sequence[OverlapRow]) -> VerdictCounts:
    """Counts of verdicts from items.parquet alone: of items by split, each by its worst, and by phase and split."""
    splits = {row["id"]: row["split"] for row in rows}
    items = Counter((splits[id], verdict) for id, verdict in worst_verdicts(rows).items())
    pairs = Counter((row["phase"], row["split"], row["verdict"]) for row in rows)
    names, phases = sorted(set(splits.values())), sorted({row["phase"] for row in rows})
    return {
        "items": {split: {v: items[split, v] for v in VERDICTS} for split in names},
        "phases": {
            phase: {split: {v: pairs[phase, split, v] for v in VERDICTS} for split in names} for phase in phases
        },
    }


def _score_roles(inputs: Inputs) -> list[str]:
    return sorted(role for role in inputs if role.startswith(("evaluate-", "solve-", "fresh-solve-")))


def read_scores(inputs: Inputs, role: str) -> dict[str, tuple[str, float]]:
    """(kind, score) of each item in one table. The score of an answer in conversation is the greedy answer's reward, or
    without a greedy answer the mean reward of the samples."""
    if role.startswith("evaluate-"):
        rows = read_table(inputs[role] / "items.parquet", ["id", "task", "score"]).to_pylist()
        return {row["id"]: (row["task"], float(row["score"])) for row in rows}
    rewards_by_item: dict[str, tuple[str, list[float]]] = {}
    table = read_table(inputs[role] / "answers.parquet", ["id", "kind", "sample", "reward"]).to_pylist()
    greedy_ids = {row["id"] for row in table if row["sample"] == GREEDY}
    for row in table:
        if (row["sample"] == GREEDY) == (row["id"] in greedy_ids):
            rewards_by_item.setdefault(row["id"], (row["kind"], []))[1].append(row["reward"])
    return {id: (kind, sum(rewards) / len(rewards)) for id, (kind, rewards) in rewards_by_item.items()}


def scores_by_verdict(
    scores: Mapping[str, tuple[str, float]], verdicts: Mapping[str, str]
) -> dict[str, ScoresByVerdict]:
    """The scores by kind on all items, on those that are not contaminated, and on clean ones; null for fewer than two
    items. The worst verdict over all phases counts, also for a model from before some of them."""

    def mean(kind: str, allowed: Collection[str]) -> Mean | None:
        subset = [x for id, (item_kind, x) in sorted(scores.items()) if item_kind == kind and verdicts[id] in allowed]
        return clustered(subset) if len(subset) > 1 else None

    return {
        kind: {
            "full": mean(kind, VERDICTS),
            "not_contaminated": mean(kind, VERDICTS[:2]),
            "clean": mean(kind, VERDICTS[:1]),
        }
        for kind in sorted({kind for kind, _ in scores.values()})
    }


STAGE = Stage(
    "contamination",
    VERSION,
    ContaminationConfig,
    run,
    estimate=lambda config: estimates.estimate("contamination", config.expected, small=10.0),
    shards=lambda config: shards_of(config.parts.values()),
    run_shard=run_shard,
)
