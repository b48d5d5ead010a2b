"""Documents read, kept, removed and trained on, from the files of the dataset repository alone."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from release import schema
from release.assembly.published_tables import read_json, stream_batches, stream_rows
from release.assembly.score_facts import ChatScores, compute_chat_scores, compute_scores
from release.layout import when
from stages.evaluation.scores import ModelScores

ORDER_BATCH = 65536
"""Rows of an order, which are short, that are unpacked together."""


@dataclass
class SourceFacts:
    """The dispositions of the documents of one source. removed: by rule; by_split: of the kept ones; tokens: by split;
    origin, license_evidence: as the source declares them."""

    documents_in: int
    kept: int
    removed: dict[str, int]
    by_split: dict[str, int]
    bytes_in: int
    bytes_kept: int
    licenses: list[str]
    origin: str
    license_evidence: str
    tokens: dict[str, int] = field(default_factory=dict)


@dataclass
class SourceInOrder:
    """The share of a source in an order: rows with any of its tokens (several sources can share a packed row);
    predicted tokens; distinct documents."""

    rows: int
    tokens: int
    documents: int


@dataclass
class Packing:
    """The fill of the rows of a packed order. tokens: predicted ones; fill: their share of all positions."""

    rows: int
    sequence_length: int
    tokens: int
    fill: float


@dataclass
class OrderPart:
    """The data that a phase read from its first to its last step. packing: of a packed order; long: by source, the
    summary of the order stage on up-weighted long documents."""

    first_step: int
    last_step: int
    by_source: dict[str, SourceInOrder]
    packing: Packing | None = None
    long: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass
class OrderFacts:
    """The steps of a phase and the data of each part of them: one part, unless the phase resumed from an earlier
    run."""

    steps: int
    parts: list[OrderPart]

    def sources(self) -> set[str]:
        return {source for part in self.parts for source in part.by_source}


@dataclass
class DataFacts:
    """The facts that the dataset repository proves. sources: by name; order: by phase; evaluation: scores by model;
    chat: scores by benchmark and model, empty without a chat model. Phases and models are in the order of training."""

    sources: dict[str, SourceFacts] = field(default_factory=dict)
    order: dict[str, OrderFacts] = field(default_factory=dict)
    chat: dict[str, ChatScores] = field(default_factory=dict)
    evaluation: dict[str, ModelScores] = field(default_factory=dict)

    def sources_read(self, phase: str) -> set[str]:
        """The sources of a phase's order; none for a phase without an order."""
        return self.order[phase].sources() if phase in self.order else set()


def read_data_facts(dataset: Path) -> DataFacts:
    """Reads the facts from the dataset repository alone."""
    evaluation = dataset / "evaluation"
    orders = _by_name((dataset / "order").glob("*/order.parquet"), schema.phase)
    scored = _by_name(evaluation.glob("*/scores.json"), schema.model)
    return DataFacts(
        _read_sources(dataset),
        {phase: order_facts([*earlier_orders(dataset, phase), folder]) for phase, folder in orders},
        compute_chat_scores(evaluation),
        {model: compute_scores(folder) for model, folder in scored},
    )


def _read_sources(dataset: Path) -> dict[str, SourceFacts]:
    fates_by_source: dict[str, _Fates] = {}
    columns = ["source", "license", "bytes", "disposition", "split", "rule"]
    for row in stream_rows(dataset / "dispositions.parquet", columns):
        fates_by_source.setdefault(row["source"], _Fates()).add(row)
    sources = {}
    for name, fates in sorted(fates_by_source.items()):
        path = dataset / "sources" / f"{name}.json"
        declared = read_json(path) if path.exists() else {}
        sources[name] = fates.facts(declared.get("origin", ""), declared.get("license_evidence", ""))
    tokens: dict[str, Counter[str]] = {name: Counter() for name in sources}
    for row in stream_rows(dataset / "tokens" / "documents.parquet", ["source", "split", "tokens"]):
        tokens[row["source"]][row["split"]] += row["tokens"]
    for name, by_split in tokens.items():
        sources[name].tokens = dict(sorted(by_split.items()))
    return sources


@dataclass
class _Fates:
    """The dispositions of the documents of one source. splits: of the kept ones; rules: of the removed ones."""

    documents: int = 0
    bytes: int = 0
    kept_bytes: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    licenses: set[str] = field(default_factory=set)

    def add(self, row: dict[str, Any]) -> None:
        self.documents += 1
        self.bytes += row["bytes"]
        self.licenses.add(row["license"])
        if row["disposition"] == "kept":
            self.kept_bytes += row["bytes"]
            self.splits[row["split"]] += 1
        elif row["disposition"] == "removed":
            self.rules[row["rule"]] += 1

    def facts(self, origin: str, license_evidence: str) -> SourceFacts:
        return SourceFacts(
            documents_in=self.documents,
            kept=self.splits.total(),
            removed=dict(sorted(self.rules.items())),
            by_split=dict(sorted(self.splits.items())),
            bytes_in=self.bytes,
            bytes_kept=self.kept_bytes,
            licenses=sorted(self.licenses),
            origin=origin,
            license_evidence=license_evidence,
        )


def _by_name(files: Iterable[Path], name_of: Callable[[Path], str]) -> list[tuple[str, Path]]:
    """(name, folder) of the parent folders of files, which are named after phases or models, in the order of
    training."""
    return sorted(((name_of(file.parent), file.parent) for file in files), key=lambda pair: when(pair[0]))


def earlier_orders(dataset: Path, phase: str) -> list[Path]:
    """The orders of earlier runs that a phase followed before its own, the first one first."""
    metas = {p.parent: read_json(p) for p in (dataset / "earlier").glob("order-*/meta.json")}
    phase_orders = [folder for folder, meta in metas.items() if schema.reader(folder).phase(meta["phase"]) == phase]
    return sorted(phase_orders, key=lambda folder: int(metas[folder].get("first_step", 1)))


def order_facts(folders: list[Path]) -> OrderFacts:
    """The steps of one phase and the data of each part of them: one part, unless the phase resumed from an earlier run.

    folders: the order indices that the phase followed in sequence, each up to the start of the next.
    """
    first_steps = [int(read_json(folder / "meta.json").get("first_step", 1)) for folder in folders]
    ends: list[int | None] = [step - 1 for step in first_steps[1:]] + [None]
    parts = [_part(folder, end) for folder, end in zip(folders, ends, strict=True)]
    return OrderFacts(parts[-1].last_step, parts)


def _part(folder: Path, end: int | None) -> OrderPart:
    """The data that the steps of an order index up to `end` read.

    A segment of n tokens predicts n - 1 of them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    meta = read_json(folder / "meta.json")
    tokens: Counter[str] = Counter()
    rows_of: dict[str, set[int]] = {}
    ids_of: dict[str, set[str]] = {}
    first, last = 1 << 62, 0
    for batch in stream_batches(folder / "order.parquet", ["step", "row", "source", "id", "length"], ORDER_BATCH):
        table = pa.Table.from_batches([batch])
        if end is not None:
            table = table.filter(pc.field("step") <= end)
        if not table.num_rows:
            continue
        steps = pc.min_max(table["step"]).as_py()
        first, last = min(first, steps["min"]), max(last, steps["max"])
        for total in table.group_by("source").aggregate([("length", "sum"), ("length", "count")]).to_pylist():
            tokens[total["source"]] += total["length_sum"] - total["length_count"]
        for source, step, row in _distinct(table, ["source", "step", "row"]):
            rows_of.setdefault(source, set()).add(step << 32 | row)
        for source, key in _distinct(table, ["source", "id"]):
            ids_of.setdefault(source, set()).add(key)
    by_source = {name: SourceInOrder(len(rows_of[name]), tokens[name], len(ids_of[name])) for name in sorted(rows_of)}
    if not meta.get("pack"):
        return OrderPart(first, last, by_source)
    rows, predicted, length = len(set().union(*rows_of.values())), tokens.total(), meta["sequence_length"]
    long = {name: row["long"] for name, row in sorted(meta["sources"].items()) if "long" in row}
    return OrderPart(first, last, by_source, Packing(rows, length, predicted, predicted / (rows * length)), long)


def _distinct(table: Any, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """The distinct combinations of values in these columns."""
    groups = table.group_by(columns).aggregate([])
    return zip(*(groups[column].to_pylist() for column in columns), strict=True)


def canary_of(items: str) -> dict[str, str]:
    """A string that identifies evaluation items in a training corpus; its GUID follows from their digest."""
    guid = uuid.uuid5(uuid.NAMESPACE_URL, f"sha256:{items}")
    return {"canary": f"Evaluation data; it should never appear in a training corpus. canary GUID {guid}"}
