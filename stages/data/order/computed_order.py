"""The order of a phase as a function of its settings, its cursor and the tables of documents.

Any step and any document are looked up from the index of chunks alone. In a phase that packs its rows, a look-up packs
the block of the step again.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.errors import RecipeError
from stages.data.order import packing
from stages.data.order.chunks import ChunkIndex, Cut, Place, Stream, seal_index
from stages.data.order.order_config import DataCursor, OrderConfig
from stages.data.order.packing import SourceDraw
from stages.data.order.shards import document_files
from stages.formats.seeds import seed_label
from stages.formats.table import ORDER, arrow_schema

# Changes with the rows that equal settings give.
FUNCTION_VERSION = 3


def read_indexes(config: OrderConfig, tokens: Path, work: Path, turn: float = 0.0) -> dict[str, ChunkIndex]:
    """Returns {source: index of its chunks}, made in `work` where it is missing.

    Args:
        config: The settings of the order.
        tokens: The tokenize artifact, or its published copy.
        work: The folder of the sealed indexes.
        turn: The fraction of the parts at which to begin, so that processes with different turns share the work.

    Raises:
        RecipeError: The shares of the mix do not sum to 1, or a source of it is unknown or empty.
    """
    if abs(sum(config.mix.values()) - 1) > 1e-6:
        raise RecipeError(f"{config.phase}.mix: shares sum to {sum(config.mix.values()):.6g}, not 1; adjust them")
    files = document_files(tokens)
    for name in sorted(config.mix):
        if not files.get(name):
            raise RecipeError(
                f"{config.phase}.mix names the source {name}, of which curation left no document (it left "
                f"{', '.join(files)}); see the dispositions, then loosen its steps or take it out of the mix"
            )
    cut = Cut(config.sequence_length, config.long_documents.over if config.long_documents else None)
    todo = [(name, part, file) for name in sorted(config.mix) for part, file in files[name]]
    # Processes that begin at different places seldom seal the same part twice.
    first = int(turn * len(todo))
    for name, part, file in todo[first:] + todo[:first]:
        seal_index(work, file, name, part, cut)
    indexes = {}
    for name in sorted(config.mix):
        parts = [(part, seal_index(work, file, name, part, cut)) for part, file in files[name]]
        indexes[name] = ChunkIndex(parts, cut)
        if not indexes[name].chunks:
            raise RecipeError(f"{config.phase}.mix: source {name} has no training tokens; remove it from the mix")
    return indexes


class ComputedOrder:
    """The rows of a phase from `cursor.first_step` on, as a function."""

    def __init__(
        self,
        config: OrderConfig,
        indexes: Mapping[str, ChunkIndex],
        cursor: DataCursor,
        work: Path,
        turn: float = 0.0,
        starts: Mapping[int, dict[str, Place]] | None = None,
    ) -> None:
        """Divides the mix among the streams; no row is computed yet.

        Args:
            config: The settings of the order.
            indexes: The index of chunks of each source.
            cursor: The step and the positions at which the order begins.
            work: The folder of the sealed sums, as in `read_indexes`.
            turn: The place at which to begin with them, as in `read_indexes`.
            starts: The result of `start` for each block, if known; sums over whole streams are then not needed.
        """
        self.config, self.indexes, self.cursor, self.work, self.turn = config, indexes, cursor, work, turn
        self.label = f"order/{seed_label(config.phase)}"
        # The label of what is drawn again where other settings begin: the sources, and packing.
        self.walk = self.label + (f" from step {cursor.first_step}" if cursor.first_step > 1 else "")
        self.streams: list[Stream] = []
        # The report on the long chunks of each source.
        self.long: dict[str, dict[str, int]] = {}
        rows, total = config.rows_from(cursor.first_step), sum(config.mix.values())
        for name, index in indexes.items():
            pools = {pool: (index.count(pool), index.slots[pool]) for pool in index.cut.pools}
            tokens = config.mix[name] * rows * config.sequence_length
            shares, report = packing.split(pools, tokens, config.long_documents)
            if report is not None:
                self.long[name] = report
            for pool, share in shares.items():
                if share and index.count(pool):
                    share *= config.mix[name] / total
                    self.streams.append(Stream(name, pool, share, index, self.label, cursor.seed))
        self.draw = SourceDraw(config.mix, rows, f"{self.walk}/sources", config.seed)
        self._starts = dict(starts or {})

    @property
    def function(self) -> dict[str, Any]:
        """The parts of the order's function that are not in its settings and tables of documents."""
        return {
            "name": "feistel",
            "version": FUNCTION_VERSION,
            "label": self.label,
            "block_steps": self.config.block_steps,
            "streams": {stream.name: stream.size for stream in self.streams},
        }

    def block(self, n: int) -> tuple[pa.Table, dict[str, int]]:
        """Returns the rows of a block, and the number of chunks of each source that fit in no row.

        The rows are those from the config's first step on.
        """
        steps = self.config.steps_of_block(n, self.cursor.first_step)
        table, unread = self._packed(n, steps) if self.config.pack else (self._rows(steps), {})
        skipped = self.config.steps_of_block(n).start - steps.start
        return (_from_step(table, steps.start + skipped) if skipped > 0 else table), unread

    def start(self, n: int) -> dict[str, Place]:
        """Returns the place of each stream of a packed phase at the first step of block `n`.

        Block `config.blocks` stands for the end of the phase.
        """
        # Looking a position up needs sums over the stream, so it is done once.
        if n not in self._starts:
            targets = self.targets(n)
            self._starts[n] = {s.name: s.locate(targets[s.name], self.work, self.turn) for s in self.streams}
        return self._starts[n]

    def targets(self, n: int) -> dict[str, int]:
        """Returns the number of tokens of each stream after which a block begins.

        Each block but the first begins as many rows later in the streams as there are streams. A block thus holds
        enough tokens for its rows, although the last chunk of each stream before it may reach into its tokens.
        """
        block = (self.config.first_step - 1) // self.config.block_steps + n
        first_block = (self.cursor.first_step - 1) // self.config.block_steps
        rows = self._rows_before(max(block * self.config.block_steps + 1, self.cursor.first_step))
        tokens = (rows + max(block - first_block - 1, 0) * len(self.streams)) * self.config.sequence_length
        # Rounded up, so that rounding never leaves a block without its last token.
        return {s.name: self._base[s.name] + math.ceil(s.share * tokens) for s in self.streams}

    def documents_of(self, step: int) -> pa.Table:
        """Returns the rows of one step, as in the table. Raises ValueError for a step outside of the order."""
        if not self.config.first_step <= step <= self.config.steps:
            raise ValueError(f"the order has steps {self.config.first_step} to {self.config.steps}")
        if not self.config.pack:
            return self._rows(range(step, step + 1))
        table, _ = self.block(self._block_of(step))
        return _from_step(table, step, step)

    def steps_of(self, source: str, part: int, ordinal: int) -> list[int]:
        """Returns the steps that read a document, in order.

        Raises AtomError if the source has no such training document.
        """
        chunks = self.indexes[source].chunks_of(part, ordinal)
        steps: set[int] = set()
        for stream in self.streams:
            if stream.source == source:
                for chunk in chunks[stream.pool]:
                    steps |= self._steps_of_chunk(stream, chunk, (part, ordinal))
        return sorted(step for step in steps if step >= self.config.first_step)

    def blocks_of(self, source: str, part: int, ordinal: int) -> dict[int, range]:
        """Returns the blocks that read a document, with the first to the last step there that does.

        Of a packed phase, the blocks that it falls into, with all their steps: whether it fits there is known
        by packing them.
        """
        blocks: dict[int, range] = {}
        if not self.config.pack:
            for step in self.steps_of(source, part, ordinal):
                block = self._block_of(step)
                blocks[block] = range(blocks[block].start if block in blocks else step, step + 1)
            return blocks
        chunks = self.indexes[source].chunks_of(part, ordinal)
        for stream in self.streams:
            for chunk in chunks[stream.pool] if stream.source == source else ():
                for block in self._blocks_at(stream, self._positions(stream, chunk)):
                    blocks[block] = self.config.steps_of_block(block)
        return blocks

    def _positions(self, stream: Stream, chunk: int) -> list[int]:
        """Returns the positions of a chunk in the part of a stream that the phase reads."""
        first = self.cursor.rows.get(stream.name, 0)
        if self.config.pack:
            end = self.start(self.config.blocks)[stream.name].position
        else:
            end = first + self.draw.totals[self.draw.names.index(stream.name)]
        # A chunk occurs once in each epoch that the phase reaches.
        epochs = range(first // stream.size, -(-end // stream.size))
        return [p for p in (stream.position(chunk, epoch) for epoch in epochs) if first <= p < end]

    def _blocks_at(self, stream: Stream, positions: list[int]) -> set[int]:
        """Returns the blocks of a packed phase into which positions of a stream fall."""
        # A binary search: the positions at which blocks begin ascend.
        numbers = range(self.config.blocks)
        blocks = {bisect(numbers, p, key=lambda n: self.start(n)[stream.name].position) - 1 for p in positions}
        return blocks - {-1}

    def _steps_of_chunk(self, stream: Stream, chunk: int, document: tuple[int, int]) -> set[int]:
        positions = self._positions(stream, chunk)
        if not self.config.pack:
            source, first = self.draw.names.index(stream.name), self.cursor.rows.get(stream.name, 0)
            rows = [self.draw.row(source, position - first) for position in positions]
            return {self.config.step_of(self.cursor.first_step, row) for row in rows if row is not None}
        steps: set[int] = set()
        for block in self._blocks_at(stream, positions):
            here = (pc.field("part") == document[0]) & (pc.field("ordinal") == document[1])
            table = self.block(block)[0].filter(here & (pc.field("source") == stream.source))
            steps.update(table["step"].to_pylist())
        return steps

    def _block_of(self, step: int) -> int:
        return (step - 1) // self.config.block_steps - (self.config.first_step - 1) // self.config.block_steps

    def _rows_before(self, step: int) -> int:
        """Returns the number of rows from the cursor's first step to the one before this."""
        return self.config.rows_from(self.cursor.first_step) - self.config.rows_from(step)

    def _rows(self, steps: range) -> pa.Table:
        """Returns the table of steps of a phase with one chunk in each row."""
        sources, places = self.draw.read(self._rows_before(steps.start), self._rows_before(steps.stop))
        rows, segments = [], []
        for number, stream in enumerate(self.streams):
            rows.append(np.flatnonzero(sources == number))
            positions = self.cursor.rows.get(stream.name, 0) + places[rows[-1]]
            segments.append(stream.read(positions))
        # Segments were read stream by stream; the rows of a step interleave them.
        by_row = np.argsort(np.concatenate(rows))
        columns = {name: values.take(by_row) for name, values in self._join(segments).items()}
        return self._table(steps, columns | {"row_index": np.arange(len(sources)), "segment": np.zeros_like(sources)})

    def _packed(self, n: int, steps: range) -> tuple[pa.Table, dict[str, int]]:
        """Returns the table of a block of a packed phase, and the number of chunks by source that fit in no row."""
        places, ends, length = self.start(n), self.start(n + 1), self.config.sequence_length
        segments = [
            stream.read(np.arange(places[stream.name].position, ends[stream.name].position)) for stream in self.streams
        ]
        label = f"{self.walk}/block {(steps.start - 1) // self.config.block_steps}"
        rows = self._rows_before(steps.stop) - self._rows_before(steps.start)
        table = self._table(steps, packing.pack(self._join(segments), length, rows, label, self.config.seed))
        read = {count["values"]: count["counts"] for count in table["source"].value_counts().to_pylist()}
        # A chunk that fits in no row of its block is not read; it is reported.
        unread = {source: -read.get(source, 0) for source in self.indexes}
        for stream, columns in zip(self.streams, segments, strict=True):
            unread[stream.source] += len(columns["length"])
        return table, unread

    @cached_property
    def _base(self) -> dict[str, int]:
        """The tokens of each stream before the cursor."""
        return {
            stream.name: stream.tokens_before(self.cursor.rows.get(stream.name, 0), self.work, self.turn)
            for stream in self.streams
        }

    def _join(self, segments: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the columns of the segments of all streams, with `source`."""
        columns = {name: np.concatenate([each[name] for each in segments]) for name in segments[0] if name != "id"}
        sources = [pa.repeat(s.source, len(each["length"])) for s, each in zip(self.streams, segments, strict=True)]
        columns["id"] = pa.concat_arrays([each["id"] for each in segments])
        columns["source"] = pa.concat_arrays(sources)
        return columns

    def _table(self, steps: range, columns: dict[str, Any]) -> pa.Table:
        """Returns the table of segments with `row_index` among the rows of these steps."""
        counts = self.config.rows_of(steps.start, steps.stop - 1)
        step = np.repeat(np.array(steps), counts)
        row = np.arange(len(step)) - np.repeat(np.cumsum(counts) - counts, counts)
        row_index = columns["row_index"]
        columns |= {"step": step[row_index], "row": row[row_index]}
        schema = arrow_schema(ORDER)
        return pa.table([pa.array(columns[field.name]).cast(field.type) for field in schema], schema=schema)


def _from_step(table: pa.Table, first: int, last: int | None = None) -> pa.Table:
    """Returns the rows of the steps from `first` to `last`."""
    steps = table["step"].to_numpy()
    begin, end = np.searchsorted(steps, first, "left"), np.searchsorted(steps, last or steps[-1], "right")
    return table.slice(begin, end - begin)
