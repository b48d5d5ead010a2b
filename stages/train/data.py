"""Training rows by step: the order artifact says which tokens, the shards hold them. Nothing is shuffled here, so the
position in the data is the step and nothing else, whatever the number of ranks.

A row is one document, or one chunk of one, of at most sequence_length + 1 tokens: its tokens but the last are the
inputs, its tokens but the first the targets. Rows are padded on the right to the longest row of their step, which
every rank knows from the order alone.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.errors import AtomError, RecipeError
from pipeline.store import Artifact
from stages.data.shards import check_shard
from stages.data.table import read_table
from stages.model.mcore import IndexedDataset
from stages.train.config import PhaseConfig
from stages.train.parallel import Ranks

ALIGN = 8  # rows are padded to a multiple of this many tokens


@dataclass(frozen=True)
class Row:
    """One row of a batch: where its tokens stand. `loss_from` targets at its start carry no loss."""

    source: str
    id: str
    ordinal: int
    offset: int
    length: int
    loss_from: int

    @property
    def targets(self) -> int:
        """Targets that carry loss."""
        return max(0, self.length - 1 - self.loss_from)


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch, each [rows, width]; `loss_mask` is 1 where a target carries loss, `padding` is True
    where an input is padding (Megatron's router leaves those out of its balance)."""

    ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    padding: torch.Tensor


class Shards:
    """The token shards of one split, opened as they are asked for."""

    def __init__(self, tokens: Artifact, split: str, padded_vocab_size: int) -> None:
        meta = tokens.json("meta.json")
        if meta["vocab_size"] > padded_vocab_size:
            raise RecipeError(
                f"tokenizer.padded_vocab_size = {padded_vocab_size} is less than the {meta['vocab_size']} tokens of "
                f"the tokenizer; raise it"
            )
        self.pad_id: int = meta["pad_id"]
        self.tokens, self.split = tokens, split
        self.sets: dict[str, IndexedDataset] = {}

    def source(self, name: str) -> IndexedDataset:
        """Megatron's reader of one source. Raises AtomError if the shard is missing or not what its index says."""
        if name not in self.sets:
            prefix = self.tokens.path / self.split / name
            check_shard(prefix)
            self.sets[name] = IndexedDataset(str(prefix), mmap=True)
        return self.sets[name]

    def read(self, row: Row) -> np.ndarray:
        dataset = self.source(row.source)
        if row.ordinal >= len(dataset) or row.offset + row.length > dataset.sequence_lengths[row.ordinal]:
            raise AtomError(f"the data order asks for tokens {row.offset} to {row.offset + row.length} of document "
                            f"{row.id}, which shard {self.split}/{row.source} does not hold; remove both artifacts "
                            f"and run again")  # fmt: skip
        return np.asarray(dataset.get(row.ordinal, offset=row.offset, length=row.length))

    def batch(self, rows: Sequence[Row | None], width: int) -> Batch:
        """Reads rows and pads them to `width` tokens; None is a row of nothing but padding."""
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        labels = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.float32)
        padding = np.ones((len(rows), width), dtype=bool)
        for i, row in enumerate(rows):
            if row is None:
                continue
            tokens, n = self.read(row), row.length - 1
            ids[i, :n], labels[i, :n] = tokens[:-1], tokens[1:]
            mask[i, row.loss_from : n] = 1
            padding[i, :n] = False
        return Batch(*(torch.from_numpy(x) for x in (ids, labels, mask, padding)))


@dataclass(frozen=True)
class Share:
    """What one rank computes of a set of rows: micro-batches of equal shape, and what the whole set counts."""

    micro: list[Batch]
    width: int
    targets: int  # of all ranks

    @classmethod
    def read(cls, rows: Sequence[Row], shards: Shards, micro_rows: int, ranks: Ranks) -> Share:
        """Cuts rows into micro-batches of `micro_rows` and deals them to the data-parallel ranks in runs, so that the
        micro-batches are the same in every layout. What does not fill up evenly (only evaluation) is filled with
        padding. Tensor, pipeline and context ranks read the rows of their data-parallel rank."""
        layout = ranks.layout
        each = -(-len(rows) // (micro_rows * ranks.data_ranks))
        if layout.virtual_pipeline > 1:  # the interleaved schedule takes micro-batches by groups
            each = -(-each // layout.pipeline) * layout.pipeline
        unit = math.lcm(ALIGN, layout.width_unit)
        width = -(-max(row.length - 1 for row in rows) // unit) * unit
        first = ranks.data_rank * each * micro_rows
        own: list[Row | None] = list(rows[first : first + each * micro_rows])
        own += [None] * (each * micro_rows - len(own))
        micro = [shards.batch(own[i : i + micro_rows], width) for i in range(0, len(own), micro_rows)]
        return cls(micro, width, sum(row.targets for row in rows))


class Feed:
    """The shares of successive steps, each read by a thread while the step before it is computed.

    The position is the step alone: nothing is kept that a checkpoint would have to hold.
    """

    def __init__(self, order: Order, shards: Shards, micro_rows: int, ranks: Ranks) -> None:
        self.order, self.shards, self.micro_rows, self.ranks = order, shards, micro_rows, ranks
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self.ahead: dict[int, Future[tuple[list[Row], Share]]] = {}
        self.waited = 0.0
        """Seconds that the last `take` waited for its data."""

    def take(self, step: int) -> tuple[list[Row], Share]:
        """The rows of a step (all of them) and this rank's share; begins to read the step after it."""
        for due in (step, step + 1):
            if due not in self.ahead and due <= self.order.last:
                self.ahead[due] = self.reader.submit(self._read, due)
        began = time.monotonic()
        found = self.ahead.pop(step).result()
        self.waited = time.monotonic() - began
        return found

    def close(self) -> None:
        self.reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> tuple[list[Row], Share]:
        rows = self.order.rows(step)
        return rows, Share.read(rows, self.shards, self.micro_rows, self.ranks)


class Order:
    """The rows of every step of a phase, from its first one: 1, or the one after the step that it continues from.

    Of the table only the part around the present step is in memory, however long the phase is. Threads may share it.
    """

    COLUMNS: ClassVar = ["step", "source", "id", "ordinal", "offset", "length", "loss_from"]

    def __init__(self, order: Artifact, phase: PhaseConfig) -> None:
        meta = json.loads((order / "meta.json").read_text())
        for name, value in (("steps", phase.steps), ("rows", phase.rows), ("sequence_length", phase.sequence_length)):
            if meta[name] != value:
                raise AtomError(f"order artifact {order.key} was made for {name} = {meta[name]}, not {value}")
        self.meta, self.key, self.each = meta, order.key, phase.rows
        self.first, self.last = int(meta.get("first_step", 1)), phase.steps
        self.file = pq.ParquetFile(order / "order.parquet")
        groups = [self.file.metadata.row_group(i) for i in range(self.file.num_row_groups)]
        self.ends = np.cumsum([group.num_rows for group in groups])
        if self.file.metadata.num_rows != self.each * (self.last + 1 - self.first):
            raise self._uneven()
        segment = self.file.schema_arrow.get_field_index("segment")
        if any(group.column(segment).statistics.max > 0 for group in groups):
            raise AtomError(f"order artifact {order.key} packs several documents into a row, which is not supported")
        self.lock = threading.Lock()
        self.empty = self.file.schema_arrow.empty_table().select(self.COLUMNS)
        self.group: tuple[int, pa.Table] = (-1, self.empty)
        self.counted: tuple[int, Counter[str]] = (0, Counter())  # rows before this group, by source

    def rows(self, step: int) -> list[Row]:
        """step: first .. last. Raises AtomError if the table does not hold as many rows for each step as it should."""
        table = self._between((step - self.first) * self.each, (step + 1 - self.first) * self.each)
        part = table.to_pylist()
        if {row["step"] for row in part} != {step}:
            raise self._uneven()
        return [Row(r["source"], r["id"], r["ordinal"], r["offset"], r["length"], r["loss_from"]) for r in part]

    def consumed(self, step: int) -> dict[str, int]:
        """Rows of each source that the steps of this order up to `step` have read. Cheap for one step after another."""
        stop = (step + 1 - self.first) * self.each
        group, counts = self.counted if self._start(self.counted[0]) <= stop else (0, Counter())
        while group < len(self.ends) and self.ends[group] <= stop:
            counts = counts + self._sources(self._start(group), int(self.ends[group]))
            group += 1
        self.counted = group, counts
        found = counts + self._sources(self._start(group), stop)
        return {name: found[name] for name in sorted(found)}

    def _sources(self, start: int, stop: int) -> Counter[str]:
        counts = self._between(start, stop)["source"].value_counts().to_pylist()
        return Counter({c["values"]: c["counts"] for c in counts})

    def _start(self, group: int) -> int:
        return int(self.ends[group - 1]) if group else 0

    def _between(self, start: int, stop: int) -> pa.Table:
        """Rows of the table by their number."""
        parts = [self.empty]
        while start < stop:
            group = int(np.searchsorted(self.ends, start, side="right"))
            with self.lock:
                if self.group[0] != group:
                    self.group = group, self.file.read_row_group(group, columns=self.COLUMNS)
                table = self.group[1]
            end = min(stop, int(self.ends[group]))
            parts.append(table.slice(start - self._start(group), end - start))
            start = end
        return pa.concat_tables(parts)

    def _uneven(self) -> AtomError:
        return AtomError(f"order artifact {self.key} does not hold {self.each} rows for each of its steps")


def heldout_rows(tokens: Artifact, phase: PhaseConfig) -> list[Row]:
    """The first held-out documents of each source of the mix, in shares of the mix, cut to the sequence length.

    Raises RecipeError if no source of the mix has a held-out document.
    """
    columns = ["source", "id", "ordinal", "tokens", "loss_from"]
    documents = read_table(tokens / "documents.parquet", columns, [("split", "=", "heldout")]).to_pylist()
    total = sum(phase.mix.values())
    rows: list[Row] = []
    for source, share in sorted(phase.mix.items()):
        own = sorted((d for d in documents if d["source"] == source), key=lambda d: d["ordinal"])
        for d in own[: max(1, round(phase.heldout.rows * share / total))]:
            length = min(d["tokens"], phase.sequence_length + 1)
            # in documents.parquet loss_from is the first token that carries loss; its target stands one place earlier
            rows.append(Row(source, d["id"], d["ordinal"], 0, length, max(0, d["loss_from"] - 1)))
    rows = [row for row in rows if row.targets]
    if not rows:
        raise RecipeError(f"no held-out document in any source of the mix ({', '.join(sorted(phase.mix))}); "
                          f"raise the held-out share of the data recipe")  # fmt: skip
    return rows
