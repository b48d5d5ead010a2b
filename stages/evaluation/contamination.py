"""Stage `contamination`: the overlap of each evaluation item with the training data, beside the scores.

    atom run atom-tiny --only contamination

Every item (test, validation, fresh) is compared with every training phase: with the whole documents that the phase's
order reads, even if it reads a part of one, and with the prompts of reinforcement and preference learning. Each pair
has two measures: the share of the item's word n-grams that occur in the phase, and the longest run of the item's words
that does. Paraphrases are not detected. For a phase that continues from a checkpoint of an earlier run, only the order
of this run is searched.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, PositiveShare, Range, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.parts import Part, PartCount, seal_part, shards_of
from pipeline.core.stage import Config, Inputs, Report, Stage, operational
from stages.confidence import Mean, clustered
from stages.data import estimates
from stages.data.estimates import Size
from stages.evaluation.generated_eval import PREFERENCES, prompts, task_roles
from stages.evaluation.pass_at_k import GREEDY
from stages.evaluation.scores import VERDICTS, ContaminationReport, ScoresByVerdict, VerdictCounts
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
from stages.tasks import question
from stages.tasks.eval_set import chat_rows, texts_of

if TYPE_CHECKING:
    from stages.data.curate.decontamination import ItemRuns


VERSION = 1
# split (test, validation or fresh), kind, text.
Item = tuple[str, str, str]

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
    """The thresholds of contamination."""

    ngram: Annotated[int, Range(1, 1000)] = 8
    """words of an n-gram; a shorter item is a single n-gram"""
    contaminated_from: PositiveShare = 0.5
    """share of its n-grams in one phase from which an item is contaminated"""
    overlap_from: PositiveShare = 0.8
    """share of its words in one consecutive match from which an item overlaps"""
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
    search = _search(inputs, work, items)
    runs, sources = search.runs, sorted(config.parts) or sources_of(search.kept)
    matched, read = search_corpus(search, sources, report)
    # A search finds the longest runs alone; shorter n-grams are among their prefixes.
    matched_runs = {phase: runs.with_prefixes(nodes) for phase, nodes in matched.items()}
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
    body: ContaminationReport = {
        "thresholds": config.model_dump(include={"ngram", "contaminated_from", "overlap_from"}),
        **summary(rows),
        "read": read,
        "scores": {role: scores_by_verdict(read_scores(inputs, role), verdicts) for role in _score_roles(inputs)},
    }
    write_json(out / "report.json", body)
    for split, counts in body["items"].items():
        report.note(f"{split}: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS))


def run_shard(config: ContaminationConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Searches one part of the kept documents."""
    parts = [(source, number) for source, count in sorted(config.parts.items()) for number in range(count)]
    _search(inputs, work, items_of(inputs)).seal(*parts[shard])


def _search(inputs: Inputs, work: Path, items: Mapping[str, Item]) -> CorpusSearch:
    from stages.data.curate.decontamination import ItemRuns

    runs = ItemRuns({id: text for id, (_, _, text) in items.items()})
    return CorpusSearch(inputs, work, runs)


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
    """Returns the scores by kind on all items, and on clean ones.

    A score is null for fewer than two items.

    The worst verdict over all phases counts, also for a model from before some of them.
    """

    def mean(kind: str, allowed: Collection[str]) -> Mean | None:
        subset = [x for id, (item_kind, x) in sorted(scores.items()) if item_kind == kind and verdicts[id] in allowed]
        return clustered(subset) if len(subset) > 1 else None

    return {
        kind: {"full": mean(kind, VERDICTS), "clean": mean(kind, VERDICTS[:1])}
        for kind in sorted({kind for kind, _ in scores.values()})
    }


class CorpusSearch:
    """The search through the kept documents that the orders read, part by part; `work` keeps each part's result."""

    def __init__(self, inputs: Inputs, work: Path, runs: ItemRuns) -> None:
        self.inputs, self.work, self.runs = inputs, work, runs
        self.kept = inputs["dedup"] / "kept"
        self.orders = sorted(role for role in inputs if role.startswith("order-"))
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
        """Returns the result of a part: the documents `read` by phase, and the runs that occur in `<phase>.npy`."""
        path = part_files(self.kept, source)[number]
        return seal_part(self.work, f"{source}-{number:05d}", partial(self._search_part, path))

    def _search_part(self, path: Path, folder: Path) -> dict[str, Any]:
        import numpy as np

        matched: dict[str, set[int]] = {phase: set() for phase in self.trained}
        read = dict.fromkeys(self.trained, 0)
        for batch in stream_batches(path, ["id", "text"]):
            ids = batch["id"].to_pylist()
            hashes = np.fromiter(map(short_hash, ids), np.uint64, len(ids))
            members = {phase: _members(hashes, trained) for phase, trained in self.trained.items()}
            # Only documents that some order reads are searched: the text of the others is never decoded.
            for n in np.flatnonzero(np.any(list(members.values()), axis=0)).tolist():
                nodes = self.runs.search(batch["text"][n].as_py())
                for phase, mask in members.items():
                    if mask[n]:
                        matched[phase] |= nodes
                        read[phase] += 1
        for phase, nodes in matched.items():
            np.save(folder / f"{phase}.npy", np.array(sorted(nodes), np.uint32))
        return {"read": read}


def search_corpus(
    search: CorpusSearch, sources: Sequence[str], report: Report
) -> tuple[dict[str, set[int]], dict[str, int]]:
    """Returns the runs that occur in the training data and the number of its texts, both by phase.

    Args:
        search: The search through one part.
        sources: Sources that are trained on.
        report: Gets the progress.

    Raises:
        AtomError: A document of an order is not among the kept ones.
    """
    import numpy as np

    matched: dict[str, set[int]] = {phase: set() for phase in search.trained}
    read = dict.fromkeys(matched, 0)
    parts = [(source, number) for source in sources for number in range(len(part_files(search.kept, source)))]
    for done, (source, number) in enumerate(parts, start=1):
        part = search.seal(source, number)
        for phase, count in part.facts["read"].items():
            read[phase] += count
            matched[phase].update(np.load(part.folder / f"{phase}.npy").tolist())
        report.progress(done, len(parts), "parts")
    # Each document of an order must have been met once.
    for phase, trained in search.trained.items():
        if read[phase] < len(trained):
            raise AtomError(
                f"contamination: {len(trained) - read[phase]} documents of {phase} are not among the kept ones of "
                f"{search.inputs['dedup'].key}; the artifacts are not of one run, run the recipe again"
            )
    for role in task_roles(search.inputs):
        texts = list(prompts(search.inputs, role))
        phase = "pairs of preferences" if role == PREFERENCES else role.replace("tasks-", "prompts of ")
        matched[phase] = set().union(*map(search.runs.search, texts))
        read[phase] = len(texts)
    return matched, read


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


STAGE = Stage(
    "contamination",
    VERSION,
    ContaminationConfig,
    run,
    estimate=lambda config: estimates.estimate("contamination", config.expected, small=10.0),
    shards=lambda config: shards_of(config.parts.values()),
    run_shard=run_shard,
)
