"""Stage `contamination`: the overlap of each evaluation item with the training data, beside the scores.

    atom run atom-tiny --only contamination

Every item (test, validation, fresh) is compared with every training phase: with the whole documents that the phase's
order reads, even if it reads a part of one, and with the prompts of reinforcement and preference learning. Each pair
has two measures: the share of the item's word n-grams that occur in the phase, and the longest run of the item's words
that does. Paraphrases are not detected. For a phase that continues from a checkpoint of an earlier run, only the order
of this run is searched.

The recall and the false-positive rate of the detector are measured: items that occur nowhere are planted in copies of
training documents, in several forms, and others like them are not.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, PositiveShare, Range, Seed, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.parts import Part, PartCount, seal_part, shards_of
from pipeline.core.stage import Config, Inputs, Report, Stage, operational
from stages.confidence import Mean, clustered, wilson
from stages.data import estimates
from stages.data.estimates import Size
from stages.evaluation.generated_eval import prompts, task_roles
from stages.evaluation.pass_at_k import GREEDY
from stages.evaluation.scores import VERDICTS, ContaminationReport, Detector, ScoresByVerdict, VerdictCounts
from stages.formats.database import connect
from stages.formats.seeds import seed_of
from stages.formats.table import (
    Double,
    Int32,
    String,
    columns_of,
    order_files,
    part_files,
    read_table,
    short_hash,
    sources_of,
    stream_batches,
    write_json,
    write_rows,
)
from stages.tasks.eval_set import chat_rows, texts_of
from stages.tasks.rows import question

if TYPE_CHECKING:
    from stages.data.curate.decontamination import ItemRuns


VERSION = 1
# Forms in which items are planted to test the detector.
FORMS = ("verbatim", "spacing", "case", "embedded")
# split (test, validation or fresh), kind, text.
Item = tuple[str, str, str]


HOSTS = "hosts.json"
# Ranges of hashes, which are sorted one after the other.
RANGES = 256


class OverlapRow(TypedDict):
    """An item, and what the texts of a phase have of it."""

    id: String
    """id of the item"""
    split: String
    """`test`, `validation` or `fresh`"""
    kind: String
    """kind of the item"""
    phase: String
    """the phase whose texts were searched"""
    words: Int32
    """words of the item"""
    longest: Int32
    """words of the longest matching run"""
    overlap: Double
    """share of the item's n-grams that occur"""
    verdict: String
    """`clean`, `overlap` or `contaminated`"""


OVERLAPS = columns_of(OverlapRow)


class ContaminationConfig(Config):
    """The thresholds of contamination, and the size of the detector's test."""

    ngram: Annotated[int, Range(1, 1000)] = 8
    """words of an n-gram; a shorter item is a single n-gram"""
    contaminated_from: PositiveShare = 0.5
    """share of its n-grams in one phase from which an item is contaminated"""
    overlap_from: PositiveShare = 0.8
    """share of its words in one consecutive match from which an item overlaps"""
    canaries: Annotated[int, Range(4, 1e6)] = 80
    """maximum number of planted items, with as many that are not planted"""
    seed: Seed
    """seed of the recipe"""
    parts: Annotated[dict[SourceName, PartCount], Field(max_length=MOST_SOURCES)] = operational({})
    """parts of each source that is trained on; empty: all sources that were kept"""
    expected: Size | None = operational(None)
    """size of the corpus, for `atom plan` alone; null: unknown"""

    def verdict(self, words: int, overlap: float, longest: int) -> str:
        if overlap >= self.contaminated_from:
            return "contaminated"
        return "overlap" if words and longest >= self.overlap_from * words else "clean"


def run(config: ContaminationConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `items.parquet`, one row for each item and phase, and `report.json`.

    Resumes after the last searched part. The inputs are dedup and items; order-<phase> and tasks-<phase> of every
    phase; fresh and benchmarks, if the recipe has them; and of each model the tables evaluate-<model>, solve-<model>
    and fresh-solve-<model>.

    Raises:
        AtomError: A document in an order is not among the kept ones.
    """
    items = items_of(inputs)
    search = _search(config, inputs, work, items)
    runs, sources = search.runs, sorted(config.parts) or sources_of(search.kept)
    corpus = Corpus(search, items, sources, report)
    # A search finds the longest runs alone; shorter n-grams are among their prefixes.
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
    """Returns every evaluation item by id."""
    items: dict[str, Item] = {}
    for row in read_table(inputs["items"] / "items.parquet", ["id", "task"]).to_pylist():
        # The texts follow below, from the one function that decontamination takes them from as well.
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
    """Returns the worst verdict on each item over all phases."""
    verdicts: dict[str, str] = {}
    for row in rows:
        verdicts[row["id"]] = max(verdicts.get(row["id"], VERDICTS[0]), row["verdict"], key=VERDICTS.index)
    return verdicts


def summary(rows: Sequence[OverlapRow]) -> VerdictCounts:
    """Counts verdicts from items.parquet alone: of items by split, each by its worst, and by phase and split."""
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
    """Returns (kind, score) of each item in one table.

    The score of an answer in conversation is the greedy answer's reward, or without a greedy answer the mean reward of
    the samples.
    """
    if role.startswith("evaluate-"):
        rows = read_table(inputs[role] / "items.parquet", ["id", "task", "score"]).to_pylist()
        return {row["id"]: (row["task"], float(row["score"])) for row in rows}
    rewards_by_item: dict[str, tuple[str, list[float]]] = {}
    table = read_table(inputs[role] / "answers.parquet", ["id", "kind", "sample", "reward"]).to_pylist()
    greedy_ids = {row["id"] for row in table if row["sample"] == GREEDY}
    for row in table:
        # Of an item with a greedy answer that one counts, of any other all samples.
        if (row["sample"] == GREEDY) == (row["id"] in greedy_ids):
            rewards_by_item.setdefault(row["id"], (row["kind"], []))[1].append(row["reward"])
    return {id: (kind, sum(rewards) / len(rewards)) for id, (kind, rewards) in rewards_by_item.items()}


def scores_by_verdict(
    scores: Mapping[str, tuple[str, float]], verdicts: Mapping[str, str]
) -> dict[str, ScoresByVerdict]:
    """Returns the scores by kind on all items, on those that are not contaminated, and on clean ones.

    A score is null for fewer than two items.

    The worst verdict over all phases counts, also for a model from before some of them.
    """

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


class PartFacts(TypedDict):
    """The result of a part of the documents.

    Attributes:
        read: Documents by phase.
        occurring: Candidates whose characters occur.
        hosts: (draw, id) of the first documents of the lottery, whose texts are in `hosts.json`.
    """

    read: dict[str, int]
    occurring: list[str]
    hosts: list[tuple[str, str]]


class CorpusSearch:
    """The search through the kept documents that the orders read, part by part; `work` keeps each part's result."""

    def __init__(
        self, inputs: Inputs, work: Path, runs: ItemRuns, items: Mapping[str, Item], canaries: int, seed: int
    ) -> None:
        self.inputs, self.work, self.runs, self.canaries, self.seed = inputs, work, runs, canaries, seed
        self.kept = inputs["dedup"] / "kept"
        self.orders = sorted(role for role in inputs if role.startswith("order-"))
        # Three times as many as are planted and left out: some occur in the corpus by themselves, and drop out.
        lottery = sorted(items, key=lambda id: _draw_hash("item", id, seed))
        self.candidates = {id: _without_spaces(items[id][2]) for id in lottery[: 3 * canaries] if runs.words[id]}
        # Sealed once, since every part of every source looks its documents up in it.
        index = seal_part(work, "order-hashes", self._write_index).folder
        self.trained = {role.removeprefix("order-"): _load(index / f"{role}.hashes") for role in self.orders}

    def _write_index(self, folder: Path) -> dict[str, Any]:
        """Writes the short hashes of the documents of each order, sorted.

        They are sorted by one range after the other, of which memory holds one.
        """
        import numpy as np

        # Hashes are spread evenly, so equal ranges of their values have about equal numbers.
        bounds = np.arange(1, RANGES, dtype=np.uint64) << np.uint64(64 - RANGES.bit_length() + 1)
        for role in self.orders:
            with ExitStack() as stack, open(folder / f"{role}.hashes", "wb") as sorted_hashes:
                ranges = [stack.enter_context(tempfile.TemporaryFile(dir=self.work)) for _ in range(RANGES)]
                for path in order_files(self.inputs[role].path):
                    ids = (id for batch in stream_batches(path, ["id"]) for id in batch["id"].unique().to_pylist())
                    # An order names a document once for each of its rows; its hash is kept once.
                    hashes = np.unique(np.fromiter(map(short_hash, ids), np.uint64))
                    for file, piece in zip(ranges, np.split(hashes, np.searchsorted(hashes, bounds)), strict=True):
                        file.write(piece.tobytes())
                for file in ranges:
                    file.seek(0)
                    sorted_hashes.write(np.unique(np.frombuffer(file.read(), np.uint64)).tobytes())
        return {}

    def seal(self, source: str, number: int) -> Part:
        """Returns the result of a part of the kept documents: its facts, and the runs that occur in `<phase>.npy`."""
        path = part_files(self.kept, source)[number]
        return seal_part(self.work, f"{source}-{number:05d}", partial(self._search_part, path))

    def _search_part(self, path: Path, folder: Path) -> dict[str, Any]:
        import numpy as np

        matched: dict[str, set[int]] = {phase: set() for phase in self.trained}
        read, absent = dict.fromkeys(self.trained, 0), dict(self.candidates)
        hosts: list[tuple[str, str, str]] = []
        for batch in stream_batches(path, ["id", "text"]):
            ids = batch["id"].to_pylist()
            hashes = np.fromiter(map(short_hash, ids), np.uint64, len(ids))
            members = {phase: _members(hashes, trained) for phase, trained in self.trained.items()}
            # Only documents that some order reads are searched: the text of the others is never decoded.
            for n in np.flatnonzero(np.any(list(members.values()), axis=0)).tolist():
                text = batch["text"][n].as_py()
                nodes, squeezed = self.runs.search(text), _without_spaces(text)
                for phase, mask in members.items():
                    if mask[n]:
                        matched[phase] |= nodes
                        read[phase] += 1
                # A candidate is searched for until it was met once.
                absent = {id: item_text for id, item_text in absent.items() if item_text not in squeezed}
                hosts.append((_draw_hash("host", ids[n], self.seed), ids[n], text))
            # Memory holds the texts of the first documents of the lottery alone.
            hosts = heapq.nsmallest(self.canaries, hosts)
        for phase, nodes in matched.items():
            np.save(folder / f"{phase}.npy", np.array(sorted(nodes), np.uint32))
        (folder / HOSTS).write_text(json.dumps({id: text for _, id, text in hosts}))
        facts: PartFacts = {
            "read": read,
            "occurring": sorted(self.candidates.keys() - absent),
            "hosts": [(draw, id) for draw, id, _ in hosts],
        }
        return dict(facts)

    def missing(self) -> str | None:
        """Returns the first id of the orders that is not among the kept documents; a join that the disk holds."""
        kept = [str(path) for source in sources_of(self.kept) for path in part_files(self.kept, source)]
        orders = [str(path) for role in self.orders for path in order_files(self.inputs[role].path)]
        query = (
            "SELECT min(id) FROM read_parquet($orders, union_by_name = true) "
            "ANTI JOIN (SELECT id FROM read_parquet($kept, union_by_name = true)) USING (id)"
        )
        with connect(self.work) as database:
            row = database.execute(query, {"orders": orders, "kept": kept}).fetchone()
        return row[0] if row else None


class Corpus:
    """The training data. By phase: `matched`, the runs that occur, and `read`, the number of texts."""

    def __init__(self, search: CorpusSearch, items: Mapping[str, Item], sources: Sequence[str], report: Report) -> None:
        """Searches all parts.

        Args:
            search: The search through one part.
            items: All items by id.
            sources: Sources that are trained on.
            report: Gets the progress.

        Raises:
            AtomError: A document of an order is not among the kept ones.
        """
        import numpy as np

        self.runs, self.items, self.canaries, self.seed = search.runs, items, search.canaries, search.seed
        self.matched: dict[str, set[int]] = {phase: set() for phase in search.trained}
        self.matched |= {role.replace("tasks-", "prompts of "): set() for role in task_roles(search.inputs)}
        self.read = dict.fromkeys(self.matched, 0)
        self.unmatched = dict(search.candidates)
        hosts: list[tuple[str, str, Path]] = []
        parts = [(source, number) for source in sources for number in range(len(part_files(search.kept, source)))]
        for done, (source, number) in enumerate(parts, start=1):
            part = search.seal(source, number)
            for phase, count in part.facts["read"].items():
                self.read[phase] += count
                self.matched[phase].update(np.load(part.folder / f"{phase}.npy").tolist())
            for id in part.facts["occurring"]:
                self.unmatched.pop(id, None)
            part_hosts = ((draw, id, part.folder) for draw, id in part.facts["hosts"])
            hosts = heapq.nsmallest(self.canaries, [*hosts, *part_hosts])
            report.progress(done, len(parts), "parts")
        # Each document of an order must have been met once; the join that names the missing one is slow.
        if any(self.read[phase] < len(trained) for phase, trained in search.trained.items()):
            raise AtomError(
                f"contamination: document {search.missing()} was trained on but is not among the kept ones of "
                f"{search.inputs['dedup'].key}; the artifacts are not of one run, run the recipe again"
            )
        self.hosts = {id: json.loads((folder / HOSTS).read_text())[id] for _, id, folder in hosts}
        for role in task_roles(search.inputs):
            phase = role.replace("tasks-", "prompts of ")
            for text in prompts(search.inputs, role):
                squeezed = _without_spaces(text)
                self.matched[phase] |= self.runs.search(text)
                self.read[phase] += 1
                self.unmatched = {id: item for id, item in self.unmatched.items() if item not in squeezed}

    def measure_detector(self, matched: set[int], ngram: int, threshold: float) -> Detector:
        """Returns the recall on planted items by form, and the false-positive rate on items that occur nowhere.

        An independent test ensures that an item occurs nowhere: no text contains its characters without spaces.

        Args:
            matched: The runs that occur in the corpus, to which the planted copies are added.
            ngram: Words of an n-gram.
            threshold: The share of an item's n-grams from which it counts as detected.
        """
        # As many are planted as are left out, so that recall and false positives rest on equal numbers.
        count = min(self.canaries, len(self.unmatched) // 2, len(self.hosts))
        ids = list(self.unmatched)
        planted, others = ids[:count], ids[count : 2 * count]
        # There may be more hosts than planted items.
        for n, (id, host) in enumerate(zip(planted, sorted(self.hosts), strict=False)):
            text = plant(self.items[id][2], self.hosts[host], FORMS[n % len(FORMS)], _draw_hash("place", id, self.seed))
            # A new set, since the caller goes on with the one that it gave.
            matched = matched | self.runs.search(text)
        matched_runs = self.runs.with_prefixes(matched)

        def count_detected(item_ids: Sequence[str]) -> int:
            return sum(self.runs.overlap(id, matched_runs, ngram)[0] >= threshold for id in item_ids)

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
    """Returns a copy of a text with an item in it, at a drawn place between two words."""
    # At a space after a drawn place, so that no word of the host is cut.
    cut = host.find(" ", random.Random(seed).randrange(len(host) + 1))
    head, tail = (host, "") if cut < 0 else (host[:cut], host[cut:])
    forms = {
        "verbatim": f"\n{item}\n",
        "spacing": "\n" + "  ".join(re.findall(r"\w+|[^\w\s]", item)) + "\n",
        "case": f"\n{item.swapcase()}\n",
        "embedded": f" (somebody asked: {item}, and so on) ",
    }
    return head + forms[form] + tail


def _load(path: Path) -> Any:
    """Returns the sorted hashes of a file, mapped into memory."""
    import numpy as np

    return np.memmap(path, np.uint64, "r") if path.stat().st_size else np.empty(0, np.uint64)


def _members(values: Any, sorted_values: Any) -> Any:
    """Returns a bool for each value: it is in the sorted array."""
    import numpy as np

    places = np.searchsorted(sorted_values, values)
    is_member = np.zeros(len(values), bool)
    inside = places < len(sorted_values)
    is_member[inside] = sorted_values[places[inside]] == values[inside]
    return is_member


def _without_spaces(text: str) -> str:
    return "".join(text.lower().split())


def _draw_hash(label: str, id: str, seed: int) -> str:
    return hashlib.sha256(f"{seed_of(f'contamination/{label}', seed)}/{id}".encode()).hexdigest()


STAGE = Stage(
    "contamination",
    VERSION,
    ContaminationConfig,
    run,
    estimate=lambda config: estimates.estimate("contamination", config.expected, small=10.0),
    shards=lambda config: shards_of(config.parts.values()),
    run_shard=run_shard,
)
