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
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
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

    OPEN: ClassVar = 256
    """Shards that are open at a time, those used last."""

    def __init__(self, tokens: Artifact, split: str) -> None:
        self.pad_id: int = tokens.json("meta.json")["pad_id"]
        self.tokens, self.split = tokens, split
        self.shards: OrderedDict[tuple[str, int], IndexedDataset] = OrderedDict()

    def shard(self, source: str, part: int) -> IndexedDataset:
        """Megatron's reader of a part. Raises AtomError if the shard is missing or not what its index says."""
        if (source, part) not in self.shards:
            name = shard_name(self.split, source, part)
            # A truncated file would be noticed only when a document beyond its end is read.
            check_sizes(self.tokens.path, name)
            if len(self.shards) == self.OPEN:
                self.shards.popitem(last=False)
            self.shards[source, part] = IndexedDataset(str(self.tokens / name), mmap=True)
        self.shards.move_to_end((source, part))
        return self.shards[source, part]

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
        files, whole = order_files(order.path), [{"first_step": self.first, "last_step": self.last}]
        if len(files) != len(meta.get("parts", whole)):
            raise AtomError(f"order artifact {self.key} has {len(files)} parts, and its meta.json lists others")
        self.parts = [
            _OrderPart(part["first_step"], part["last_step"], file, part.get("rows"))
            for part, file in zip(meta.get("parts", whole), files, strict=True)
        ]
        self.lock = threading.Lock()
        self.open: tuple[int, _PartReader] | None = None
        """The number of the part that was read last, and its reader."""
        # Opened now, so that a table with a wrong number of rows fails before the first step.
        self._reader(0)
        self.counted: tuple[int, Counter[str]] = (0, Counter())  # segments of the parts before this one, by source

    def rows(self, step: int) -> list[Row]:
        """The rows of a step, first .. last. Raises AtomError if the table lacks rows of it."""
        # Parts are in the order of steps.
        number = bisect_left(self.parts, step, key=lambda part: part.last)
        rows: dict[int, list[Segment]] = {}
        for record in self._reader(number).steps(step, step).to_pylist():
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
        """Segments of each source that the steps of this order up to `step` have read.

        Cheap for one step after another, and a part of the table is read for any other step.
        """
        number, counts = self.counted
        # After a rewind the count begins anew.
        if number and self.parts[number - 1].last > step:
            number, counts = 0, Counter()
        while number < len(self.parts) and self.parts[number].last <= step:
            part = self.parts[number]
            # meta.json states the sums of whole parts, so a resumed phase reads one part only.
            counts = counts + (Counter(part.rows) if part.rows is not None else self._reader(number).consumed(step))
            number += 1
        self.counted = number, counts
        totals = counts + (self._reader(number).consumed(step) if number < len(self.parts) else Counter())
        return {name: totals[name] for name in sorted(totals)}

    def _reader(self, number: int) -> _PartReader:
        with self.lock:
            if self.open is None or self.open[0] != number:
                part = self.parts[number]
                reader = _PartReader(part.file, self.COLUMNS)
                expected = self.phase.rows_from(part.first) - self.phase.rows_from(part.last + 1)
                # With packing, the number of segments is not known beforehand.
                if not self.phase.pack and reader.file.metadata.num_rows != expected:
                    raise self._row_mismatch()
                self.open = number, reader
            return self.open[1]

    def _row_mismatch(self) -> AtomError:
        return AtomError(f"order artifact {self.key} does not hold the rows that each of its steps should have")


@dataclass(frozen=True)
class _OrderPart:
    """A file of an order with the steps `first` to `last`. rows: its segments by source, None if not stated."""

    first: int
    last: int
    file: Path
    rows: Mapping[str, int] | None


class _PartReader:
    """Reads the row groups of one file of an order, one at a time."""

    def __init__(self, file: Path, columns: Sequence[str]) -> None:
        self.file, self.columns = pq.ParquetFile(file), [*columns]
        step = self.file.schema_arrow.get_field_index("step")
        # The rows are in the order of steps, so these statistics find a step without reading other row groups.
        groups = [self.file.metadata.row_group(i).column(step).statistics for i in range(self.file.num_row_groups)]
        self.spans = [(group.min, group.max) for group in groups]
        """First and last step of each row group."""
        self.lock = threading.Lock()
        self.schema = pa.schema([arrow_schema(ORDER).field(name) for name in columns])
        self.group: tuple[int, pa.Table] = (-1, self.schema.empty_table())
        self.counted: tuple[int, Counter[str]] = (0, Counter())  # segments of the groups before this one, by source

    def steps(self, first: int, last: int) -> pa.Table:
        """The table's part of these steps."""
        begin = bisect_left(self.spans, first, key=lambda span: span[1])
        end = bisect_right(self.spans, last, key=lambda span: span[0])
        return pa.concat_tables([self.schema.empty_table(), *(self._slice(g, first, last) for g in range(begin, end))])

    def consumed(self, step: int) -> Counter[str]:
        """Segments of each source in the steps up to `step`."""
        group, counts = self.counted
        if group and self.spans[group - 1][1] > step:
            group, counts = 0, Counter()
        while group < len(self.spans) and self.spans[group][1] <= step:
            counts = counts + _count_sources(self._read(group))
            group += 1
        self.counted = group, counts
        return counts + (_count_sources(self._slice(group, 0, step)) if group < len(self.spans) else Counter())

    def _slice(self, group: int, first: int, last: int) -> pa.Table:
        table = self._read(group)
        steps = table["step"].to_numpy()
        begin, end = np.searchsorted(steps, first, "left"), np.searchsorted(steps, last, "right")
        return table.slice(begin, end - begin)

    def _read(self, group: int) -> pa.Table:
        with self.lock:
            if self.group[0] != group:
                table = self.file.read_row_group(group, columns=self.columns)
                self.group = group, table.select(self.columns).cast(self.schema)
            return self.group[1]


def _count_sources(table: pa.Table) -> Counter[str]:
    return Counter({c["values"]: c["counts"] for c in table["source"].value_counts().to_pylist()})


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
