"""Stage `contamination`: the overlap of each evaluation item with the training data, beside the scores.

    atom run atom-tiny --only contamination

Every item (test, validation, fresh) is compared with every training phase by itself: with the documents that the
phase's order really read, each as a whole even if a part of it was read, and with what a phase of reinforcement or
preference learning asked. Two figures of each pair: the share of the item's word n-grams that occur, and its longest
run of words that does. What says the same in other words is not found. Of a phase that goes on from an earlier run's
checkpoint only what this run's order read is looked at.

How good the detector is is measured: items that occur nowhere are planted in copies of training documents, in several
forms, and others like them are not.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipeline.core.bounds import PositiveShare, Range, Seed
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Inputs, Report, Stage
from stages.data.seeds import seed_of
from stages.data.table import read_table, stream_rows, write_json, write_rows
from stages.evaluation.confidence import clustered, wilson
from stages.evaluation.eval_set import chat_rows, texts_of
from stages.evaluation.generated_eval import prompts, task_roles
from stages.evaluation.pass_at_k import GREEDY
from stages.rl.protocols import question

if TYPE_CHECKING:
    from stages.data.curation.overlap import ItemRuns

VERSION = 1
VERDICTS = ("clean", "overlap", "contaminated")
FORMS = ("verbatim", "spacing", "case", "embedded")
ITEMS = {
    "id": "string",
    "split": "string",
    "kind": "string",
    "phase": "string",
    "words": "int32",
    "longest": "int32",
    "overlap": "double",
    "verdict": "string",
}
"""A row an item and phase. longest: words of the longest run that occurs; overlap: share of n-grams that occur."""
Item = tuple[str, str, str]
"""split (test, validation or fresh), kind, text."""


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

    def verdict(self, words: int, overlap: float, longest: int) -> str:
        if overlap >= self.contaminated_from:
            return "contaminated"
        return "overlap" if words and longest >= self.overlap_from * words else "clean"


def run(config: ContaminationConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """inputs: dedup, items; order-<phase> and tasks-<phase> of every phase; perhaps fresh; and of each model, by name,
    the tables evaluate-<model>, solve-<model>, fresh-solve-<model>.

    Seals `items.parquet`, a row an item and phase, and `report.json`. Raises AtomError if a document that an order read
    is not among the kept ones.
    """
    from stages.data.curation.overlap import ItemRuns

    items = items_of(inputs)
    runs = ItemRuns({id: text for id, (_, _, text) in items.items()})
    corpus = Corpus(inputs, runs, config, items)
    matched_runs = {phase: runs.with_prefixes(nodes) for phase, nodes in corpus.matched.items()}
    rows = []
    for id, (split, kind, _) in sorted(items.items()):
        words = len(runs.words[id])
        for phase, nodes in matched_runs.items():
            overlap, longest = runs.overlap(id, nodes, config.ngram)
            row = {"id": id, "split": split, "kind": kind, "phase": phase, "words": words, "longest": longest}
            rows.append({**row, "overlap": overlap, "verdict": config.verdict(words, overlap, longest)})
    write_rows(out / "items.parquet", ITEMS, rows)
    verdicts = worst_verdicts(rows)
    detector = corpus.measure_detector(set().union(*corpus.matched.values()))
    body = {
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
    return items


class Corpus:
    """The training data, streamed once. By phase: `matched`, the runs that occur, and `read`, the number of texts."""

    def __init__(self, inputs: Inputs, runs: ItemRuns, config: ContaminationConfig, items: Mapping[str, Item]) -> None:
        self.runs, self.config, self.items = runs, config, items
        orders = sorted(role for role in inputs if role.startswith("order-"))
        self.matched: dict[str, set[int]] = {role.removeprefix("order-"): set() for role in orders}
        self.matched |= {role.replace("tasks-", "prompts of "): set() for role in task_roles(inputs)}
        self.read = dict.fromkeys(self.matched, 0)
        phases: dict[str, list[str]] = {}  # of each document
        sources: set[str] = set()
        for role in orders:
            table = read_table(inputs[role] / "order.parquet", ["source", "id"])
            sources |= set(table["source"].unique().to_pylist())
            for id in table["id"].unique().to_pylist():
                phases.setdefault(id, []).append(role.removeprefix("order-"))
        lottery = sorted(items, key=lambda id: _draw_hash("item", id, config.seed))
        self.unmatched = {id: _without_spaces(items[id][2]) for id in lottery[: 3 * config.canaries] if runs.words[id]}
        hosts = set(sorted(phases, key=lambda id: _draw_hash("host", id, config.seed))[: config.canaries])
        self.hosts: dict[str, str] = {}
        missing = set(phases)
        for source in sorted(sources):
            for row in stream_rows(inputs["dedup"] / "kept" / f"{source}.parquet", ["id", "text"]):
                if row["id"] in phases:
                    missing.discard(row["id"])
                    self._search(row["text"], phases[row["id"]])
                    if row["id"] in hosts:
                        self.hosts[row["id"]] = row["text"]
        if missing:
            raise AtomError(
                f"contamination: document {min(missing)} was trained on but is not among the kept ones of "
                f"{inputs['dedup'].key}; the artifacts are not of one run, run the recipe again"
            )
        for role in task_roles(inputs):
            for text in prompts(inputs, role):
                self._search(text, [role.replace("tasks-", "prompts of ")])

    def _search(self, text: str, phases: Sequence[str]) -> None:
        nodes, squeezed = self.runs.search(text), _without_spaces(text)
        for phase in phases:
            self.matched[phase] |= nodes
            self.read[phase] += 1
        self.unmatched = {id: item_text for id, item_text in self.unmatched.items() if item_text not in squeezed}

    def measure_detector(self, matched: set[int]) -> dict[str, Any]:
        """Recall on planted items by form, and the false-positive rate on items that occur nowhere.

        matched: the runs that occur in the corpus, to which the planted copies are added. That an item occurs nowhere
        is known independently: its characters without spaces are in no text.
        """
        count = min(self.config.canaries, len(self.unmatched) // 2, len(self.hosts))
        ids = list(self.unmatched)
        planted, others = ids[:count], ids[count : 2 * count]
        for n, (id, host) in enumerate(zip(planted, sorted(self.hosts), strict=False)):
            text = plant(
                self.items[id][2], self.hosts[host], FORMS[n % len(FORMS)], _draw_hash("place", id, self.config.seed)
            )
            matched = matched | self.runs.search(text)
        matched_runs = self.runs.with_prefixes(matched)

        def count_detected(item_ids: Sequence[str]) -> int:
            return sum(
                self.runs.overlap(id, matched_runs, self.config.ngram)[0] >= self.config.contaminated_from
                for id in item_ids
            )

        by_form = {form: planted[n :: len(FORMS)] for n, form in enumerate(FORMS)}
        low, high = wilson(count_detected(planted), count) if count else (0.0, 1.0)
        return {
            "recall": {"planted": count, "found": count_detected(planted), "low": low, "high": high},
            "recall_by_form": {
                form: {"planted": len(form_ids), "found": count_detected(form_ids)}
                for form, form_ids in by_form.items()
            },
            "false_positives": {"absent": len(others), "found": count_detected(others)},
        }


def plant(item: str, host: str, form: str, seed: str) -> str:
    """A copy of a text with an item in it, at a drawn place between two words."""
    cut = host.find(" ", random.Random(seed).randrange(len(host) + 1))
    head, tail = (host, "") if cut < 0 else (host[:cut], host[cut:])
    forms = {
        "verbatim": f"\n{item}\n",
        "spacing": "\n" + "  ".join(re.findall(r"\w+|[^\w\s]", item)) + "\n",
        "case": f"\n{item.swapcase()}\n",
        "embedded": f" (somebody asked: {item}, and so on) ",
    }
    return head + forms[form] + tail


def worst_verdicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The worst verdict on each item over all phases."""
    verdicts: dict[str, str] = {}
    for row in rows:
        verdicts[row["id"]] = max(verdicts.get(row["id"], VERDICTS[0]), row["verdict"], key=VERDICTS.index)
    return verdicts


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def scores_by_verdict(scores: Mapping[str, tuple[str, float]], verdicts: Mapping[str, str]) -> dict[str, Any]:
    """The scores by kind on all items, on those that are not contaminated, and on clean ones; null for fewer than two
    items. The worst verdict over all phases counts, also for a model that came before some of them."""
    subsets = {"full": VERDICTS, "not_contaminated": VERDICTS[:2], "clean": VERDICTS[:1]}
    result: dict[str, Any] = {}
    for kind in sorted({kind for kind, _ in scores.values()}):
        result[kind] = {}
        for name, allowed in subsets.items():
            subset = [
                x for id, (item_kind, x) in sorted(scores.items()) if item_kind == kind and verdicts[id] in allowed
            ]
            result[kind][name] = clustered(subset) if len(subset) > 1 else None
    return result


def _without_spaces(text: str) -> str:
    return "".join(text.lower().split())


def _draw_hash(label: str, id: str, seed: int) -> str:
    return hashlib.sha256(f"{seed_of(f'contamination/{label}', seed)}/{id}".encode()).hexdigest()


STAGE = Stage("contamination", VERSION, ContaminationConfig, run)
