"""Training rows by step, from the order artifact and the token shards.

Nothing is shuffled here, so the position in the data is the step alone, for any number of ranks.

A segment is one document, or one chunk of one, of at most sequence_length + 1 tokens: all tokens except the last are
inputs, all except the first are targets. A row is one segment, or several if a phase packs them; attention then
separates them. Rows are padded on the right to the longest row of their step, which every rank reads from the order
alone.
"""

from __future__ import annotations

import json
import math
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact
from stages.data.order.shards import check_sizes, document_files, shard_name
from stages.formats.table import ORDER, arrow_schema, order_files, stream_batches
from stages.mcore.megatron_imports import IndexedDataset
from stages.models.parallel_layout import Layout
from stages.train.config import PhaseConfig
from stages.train.parallel import Ranks

OPEN_SHARDS = 256  # token shards that are open at a time, those used last
STEPS_AT_ONCE = 64  # of an order's table that are read and kept
ALIGN = 8  # rows are padded to a multiple of this many tokens
BLOCK_ALIGN = 128  # and of this many on each rank where matrices are quantized, which some formats do by blocks


@dataclass(frozen=True)
class Segment:
    """The tokens of a document or chunk: of sequence `ordinal` of the token shard of a part of a source.

    The first `loss_from` targets carry no loss.
    """

    source: str
    id: str
    ordinal: int
    offset: int
    length: int
    loss_from: int
    part: int = 0

    @property
    def targets(self) -> int:
        """Targets that carry loss."""
        return max(0, self.length - 1 - self.loss_from)


@dataclass(frozen=True)
class Row:
    """One row of a batch, its segments from left to right."""

    segments: tuple[Segment, ...]

    @property
    def slots(self) -> int:
        """The number of inputs, which equals that of targets."""
        return sum(segment.length - 1 for segment in self.segments)

    @property
    def targets(self) -> int:
        return sum(segment.targets for segment in self.segments)


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch, each [rows, width].

    `loss_mask` is 1 where a target carries loss, `padding` is True where an input is padding (Megatron's router leaves
    those out of its balance). `starts`, where rows are packed: the position at which the segment of each position
    begins; padding is a segment of its own. `extras`: what an objective other than the plain loss needs, each [rows] or
    [rows, width].

    `prefixes`, where segments continue others: first position and end of what stands before the segment of each
    position, int64 [2, rows, width]; equal numbers stand for nothing.
    `targets`, where not each input has one target: of each target the input in the one row, and the place in `labels`,
    `loss_mask` and `extras`, which then have a shape of their own, flat; int64 [2, targets].
    """

    ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    padding: torch.Tensor
    starts: torch.Tensor | None = None
    prefixes: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def segments(self) -> torch.Tensor | None:
        """`starts`, and below them `prefixes` where there are some, as the model's attention takes them."""
        if self.starts is None or self.prefixes is None:
            return self.starts
        return torch.cat((self.starts[None], self.prefixes))


class Shards:
    """The token shards of one split, opened on demand. Files are mapped: of an index, only what is needed is read."""

    def __init__(self, tokens: Artifact, split: str) -> None:
        self.pad_id: int = tokens.json("meta.json")["pad_id"]
        self.tokens, self.split = tokens, split
        self.shard = lru_cache(OPEN_SHARDS)(self._open)

    def _open(self, source: str, part: int) -> IndexedDataset:
        """Megatron's reader of a part. Raises AtomError if the shard is missing or not what its index says."""
        name = shard_name(self.split, source, part)
        # A truncated file would be noticed only when a document beyond its end is read.
        check_sizes(self.tokens.path, name)
        return IndexedDataset(str(self.tokens / name), mmap=True)

    def read(self, segment: Segment) -> np.ndarray:
        shard, end = self.shard(segment.source, segment.part), segment.offset + segment.length
        if segment.ordinal >= len(shard) or end > shard.sequence_lengths[segment.ordinal]:
            name = shard_name(self.split, segment.source, segment.part)
            raise AtomError(
                f"the data order asks for tokens {segment.offset} to {end} of document {segment.id}, which "
                f"shard {name} does not hold; remove both artifacts and run again"
            )
        # copied, because Megatron unmaps the file as soon as the shard is closed
        return np.array(shard.get(segment.ordinal, offset=segment.offset, length=segment.length))

    def batch(self, rows: Sequence[Row | None], width: int, packed: bool = False) -> Batch:
        """Reads rows and pads them to `width` tokens; None is a row of padding."""
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        labels = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.float32)
        padding = np.ones((len(rows), width), dtype=bool)
        starts = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            start = 0
            for segment in row.segments if row is not None else ():
                tokens, end = self.read(segment), start + segment.length - 1
                ids[i, start:end], labels[i, start:end] = tokens[:-1], tokens[1:]
                mask[i, start + segment.loss_from : end] = 1
                padding[i, start:end] = False
                starts[i, start:end] = start
                start = end
            starts[i, start:] = start
        # Rows of one document need no starts: kernels then take the plain causal path.
        inputs, targets, weights, unused = map(torch.from_numpy, (ids, labels, mask, padding))
        return Batch(inputs, targets, weights, unused, torch.from_numpy(starts) if packed else None)


def padded_width(slots: int, layout: Layout, quantized: bool = False) -> int:
    """The width of rows of which the longest has that many slots."""
    # Each rank's part of a row has to be a whole number of blocks.
    multiple = BLOCK_ALIGN * layout.width_unit if quantized else math.lcm(ALIGN, layout.width_unit)
    return -(-slots // multiple) * multiple


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a global batch: micro-batches of equal shape, and the targets of all ranks."""

    micro: list[Batch]
    width: int
    targets: int  # of all ranks

    @classmethod
    def read(
        cls,
        rows: Sequence[Row],
        shards: Shards,
        micro_rows: int,
        ranks: Ranks,
        packed: bool = False,
        quantized: bool = False,
        slots: int = 0,
    ) -> RankBatch:
        """Reads this rank's part of the rows of a step, each with at least `slots` inputs.

        Cuts rows into micro-batches of `micro_rows` and deals them to the data-parallel ranks in runs, so that the
        micro-batches are the same in every layout. An uneven last part (only in evaluation) is filled with padding.
        Tensor, pipeline and context ranks read the rows of their data-parallel rank.
        """
        layout = ranks.layout
        per_rank = -(-len(rows) // (micro_rows * ranks.data_ranks))
        if layout.vpp > 1:  # the interleaved schedule needs groups of micro-batches
            per_rank = -(-per_rank // layout.pp) * layout.pp
        # The longest row of the whole step, not of this rank: all ranks need the same shapes.
        width = padded_width(max(slots, *(row.slots for row in rows)), layout, quantized)
        # Runs of rows, so that a micro-batch has the same rows for any number of data ranks.
        first = ranks.data_rank * per_rank * micro_rows
        rank_rows: list[Row | None] = list(rows[first : first + per_rank * micro_rows])
        rank_rows += [None] * (per_rank * micro_rows - len(rank_rows))
        micro = [
            shards.batch(rank_rows[i : i + micro_rows], width, packed) for i in range(0, len(rank_rows), micro_rows)
        ]
        return cls(micro, width, sum(row.targets for row in rows))


class Prefetcher:
    """Prefetches the rank batch of the next step in a thread while the current step is computed.

    The position is the step alone, so the prefetcher has no state for a checkpoint.
    """

    def __init__(self, order: Order, shards: Shards, phase: PhaseConfig, ranks: Ranks) -> None:
        self.order, self.shards, self.phase, self.ranks = order, shards, phase, ranks
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self.futures: dict[int, Future[tuple[list[Row], RankBatch]]] = {}
        self.waited = 0.0
        """Seconds for which the last `take` waited for data."""

    def take(self, step: int) -> tuple[list[Row], RankBatch]:
        """All rows of a step and this rank's batch of them; starts to read the next step."""
        # One step ahead hides the reading as long as it takes less than a step.
        for upcoming in (step, step + 1):
            if upcoming not in self.futures and upcoming <= self.order.last:
                self.futures[upcoming] = self.reader.submit(self._read, upcoming)
        started = time.monotonic()
        result = self.futures.pop(step).result()
        self.waited = time.monotonic() - started
        return result

    def close(self) -> None:
        self.reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> tuple[list[Row], RankBatch]:
        rows = self.order.rows(step)
        phase = self.phase
        return rows, RankBatch.read(
            rows, self.shards, phase.micro_rows, self.ranks, phase.pack, phase.quantized, phase.least_slots
        )


class Order:
    """The rows of every step of a phase, from its first one: 1, or the one after the step that it continues from.

    Only the part of the table around the present step is in memory, for a phase of any length. Threads may share it.
    """

    COLUMNS: ClassVar = ["step", "row", "source", "part", "id", "ordinal", "offset", "length", "loss_from"]

    def __init__(self, order: Artifact, phase: PhaseConfig) -> None:
        meta = json.loads((order / "meta.json").read_text())
        expected: dict[str, Any] = {
            "steps": phase.steps,
            "rows": phase.rows_of(phase.steps),
            "sequence_length": phase.sequence_length,
        }
        expected |= {"ramp": [list(ramp_step) for ramp_step in phase.row_ramp], "pack": phase.pack}
        # Orders that were made before these settings existed do not state them.
        for name, value in expected.items():
            if meta.get(name, {"ramp": [], "pack": False}.get(name)) != value:
                raise AtomError(f"order artifact {order.key} was made for {name} = {meta.get(name)}, not {value}")
        self.meta, self.key, self.phase = meta, order.key, phase
        self.first, self.last = int(meta.get("first_step", 1)), phase.steps
        files = order_files(order.path)
        if len(files) != len(meta["parts"]):
            raise AtomError(f"order artifact {self.key} has {len(files)} parts, and its meta.json lists others")
        self.parts = [
            _OrderPart(part["first_step"], part["last_step"], file, part["rows"])
            for part, file in zip(meta["parts"], files, strict=True)
        ]
        self.lock = threading.Lock()
        self.steps, self.table = range(0), arrow_schema(ORDER).empty_table()
        """Some steps, and their part of the table."""
        # Counted now, so that a table with a wrong number of rows fails before the first step.
        self._require_rows(self.parts[0])

    def rows(self, step: int) -> list[Row]:
        """The rows of a step, first .. last. Raises AtomError if the table lacks rows of it."""
        rows: dict[int, list[Segment]] = {}
        for record in self._rows_of(step).to_pylist():
            segment = Segment(
                record["source"],
                record["id"],
                record["ordinal"],
                record["offset"],
                record["length"],
                record["loss_from"],
                record["part"],
            )
            rows.setdefault(record["row"], []).append(segment)
        # A table with a row missing would train on, with a smaller batch, without an error.
        if list(rows) != list(range(self.phase.rows_of(step))):
            raise self._row_mismatch()
        step_rows = [Row(tuple(segments)) for segments in rows.values()]
        if max(row.slots for row in step_rows) > self.phase.sequence_length:
            raise AtomError(f"order artifact {self.key} has a row of step {step} longer than sequence_length")
        return step_rows

    def consumed(self, step: int) -> dict[str, int]:
        """Segments of each source that the steps of this order up to `step` have read."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            if part.last <= step:
                counts.update(part.rows)
            elif part.first <= step:
                sources = pq.read_table(
                    part.file, columns=["source"], partitioning=None, filters=[("step", "<=", step)]
                )["source"]
                counts.update({count["values"]: count["counts"] for count in sources.value_counts().to_pylist()})
        return {name: counts[name] for name in sorted(counts)}

    def _rows_of(self, step: int) -> pa.Table:
        """The table's part of a step, from that of some steps, which is read at once."""
        with self.lock:
            if step not in self.steps:
                # Parts are in the order of steps.
                part = self.parts[bisect_left(self.parts, step, key=lambda part: part.last)]
                self._require_rows(part)
                steps = range(step, min(step + STEPS_AT_ONCE, part.last + 1))
                # The file's statistics of steps leave out what lies before and after.
                span = [("step", ">=", steps.start), ("step", "<", steps.stop)]
                self.table = pq.read_table(part.file, columns=self.COLUMNS, partitioning=None, filters=span)
                self.steps = steps
            return self.table.filter(pc.field("step") == step)

    def _require_rows(self, part: _OrderPart) -> None:
        expected = self.phase.rows_from(part.first) - self.phase.rows_from(part.last + 1)
        # With packing, the number of segments is not known beforehand.
        if not self.phase.pack and pq.read_metadata(part.file).num_rows != expected:
            raise self._row_mismatch()

    def _row_mismatch(self) -> AtomError:
        return AtomError(f"order artifact {self.key} does not hold the rows that each of its steps should have")


@dataclass(frozen=True)
class _OrderPart:
    """A file of an order with the steps `first` to `last`. rows: its segments by source."""

    first: int
    last: int
    file: Path
    rows: Mapping[str, int]


def heldout_rows(tokens: Artifact, phase: PhaseConfig) -> list[Row]:
    """The first held-out documents of each source of the mix, in shares of the mix, cut to the sequence length.

    Reads the tables of documents only as far as needed. Raises RecipeError if no source of the mix has a held-out
    document.
    """
    available, total = tokens.json("meta.json")["documents"]["heldout"], sum(phase.mix.values())
    rows: list[Row] = []
    for source, share in sorted(phase.mix.items()):
        # At least one row of each source, however small its share.
        count = min(available.get(source, 0), max(1, round(phase.validation.rows * share / total)))
        for document in islice(_heldout_documents(tokens, source), count):
            length = min(document["tokens"], phase.sequence_length + 1)
            # in the table loss_from is the first token that carries loss; its target stands one place earlier
            loss_from = max(0, document["loss_from"] - 1)
            segment = Segment(source, document["id"], document["ordinal"], 0, length, loss_from, document["part"])
            rows.append(Row((segment,)))
    # The cut may leave no target that carries loss.
    rows = [row for row in rows if row.targets]
    if not rows:
        raise RecipeError(
            f"no held-out document in any source of the mix ({', '.join(sorted(phase.mix))}); "
            f"raise the held-out share of the data recipe"
        )
    return rows


def _heldout_documents(tokens: Artifact, source: str) -> Iterator[dict[str, Any]]:
    """The rows of a source's held-out documents, by part and ordinal."""
    files = document_files(tokens.path)
    if source not in files:
        raise AtomError(f"{tokens.path} has no table of the documents of {source}; run tokenize again")
    for _, path in files[source]:
        columns = ["source", "split", "part", "id", "ordinal", "tokens", "loss_from"]
        for batch in stream_batches(path, columns, 65_536):
            mask = pc.and_(pc.equal(batch["split"], "heldout"), pc.equal(batch["source"], source))
            yield from batch.filter(mask).to_pylist()
