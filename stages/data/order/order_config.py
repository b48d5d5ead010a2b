"""The settings of the order of a phase, and the rows and blocks of its steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pipeline.core.bounds import MOST_RAMP_STEPS, Flag, Key, Mix, Range, Seed, Steps
from pipeline.core.stage import Config, added
from stages.data.order.packing import LongDocuments

# The rows of one step.
Rows = Annotated[int, Range(1, 2**30)]
# Of a block: rows that still fill well; the fraction of the phase that it is, if it has enough rows; the tokens that
# limit the memory of a process, about a million chunks where they are as short as chats.
LEAST_ROWS, BLOCKS, MOST_TOKENS = 4096, 256, 2**26
# Of a row on disk, measured on 400,000 rows: 25 where ids are random 128-bit numbers in hex, and up to 2 more for the
# part of a source of thousands of parts. A packed row of several documents has one for each.
ROW_BYTES = 27
# Of the process that makes a block of MOST_TOKENS, or joins blocks: it maps the index of the documents.
MEMORY_BYTES = 500_000_000
# Of a phase, even if a block then has more tokens: each is a file, and a folder on the Hub has at most 10,000.
MOST_BLOCKS = 9000


class OrderConfig(Config):
    """The settings of the order of one phase.

    `mix` is each source's share of all rows of the phase, or of all tokens if rows are packed.
    """

    phase: Key
    """name of the phase"""
    mix: Mix
    """share of rows by source; with pack, share of tokens"""
    sequence_length: Annotated[int, Range(2, 2**24)]
    """tokens predicted in one row"""
    rows: Rows
    """rows of one step"""
    steps: Steps
    """steps of the phase"""
    seed: Seed
    """seed of the recipe"""
    first_step: Steps = added(1)
    """first step; above 1 only if the phase continues from a checkpoint"""
    ramp: tuple[tuple[Steps, Rows], ...] = added((), max_length=MOST_RAMP_STEPS)
    """(last step, rows) of smaller steps at the beginning"""
    pack: Flag = added(False)
    """pack several chunks into a row"""
    long_documents: LongDocuments | None = added(None)
    """up-weighting of long chunks; requires pack; null: none"""

    block_rows: Rows | None = added(None)
    """rows of the steps that one part of the order holds and packs together, at least one step; null: a 256th of
    the phase, within bounds"""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(last step, rows of each step), one after the other."""
        return (*self.ramp, (self.steps, self.rows))

    def rows_of(self, first: int, last: int | None = None) -> list[int]:
        """Returns the number of rows of each step from `first` on, up to `last`."""
        sizes = []
        for step in range(first, (self.steps if last is None else last) + 1):
            sizes.append(next((rows for last_step, rows in self.ramp if step <= last_step), self.rows))
        return sizes

    def rows_from(self, first: int) -> int:
        """Returns the number of rows of all steps from `first` on."""
        return rows_from(first, self.sizes)

    def step_of(self, first: int, row: int) -> int:
        """Returns the step of a row, counted from step `first` on."""
        for last, rows in self.sizes:
            if row < (count := max(0, last - first + 1) * rows):
                return first + row // rows
            row, first = row - count, max(first, last + 1)
        raise ValueError("the phase has fewer rows")

    @property
    def block_steps(self) -> int:
        """Steps of a block."""
        # Large blocks fill well, small ones keep the memory of a process bounded.
        rows = self.block_rows or max(LEAST_ROWS, min(self.rows_from(1) // BLOCKS, MOST_TOKENS // self.sequence_length))
        return max(1, rows // self.rows, -(-self.steps // MOST_BLOCKS))

    @property
    def blocks(self) -> int:
        """Blocks from `first_step` on. They lie on a grid from step 1 on, wherever an order begins."""
        return (self.steps - 1) // self.block_steps - (self.first_step - 1) // self.block_steps + 1

    def steps_of_block(self, n: int, first_step: int | None = None) -> range:
        """Returns the steps of block `n`, from `first_step` on; without one, from that of the config on."""
        # Blocks lie on a grid from step 1 on, so a resumed phase packs the same blocks.
        begin = ((self.first_step - 1) // self.block_steps + n) * self.block_steps + 1
        first = self.first_step if first_step is None else first_step
        return range(max(begin, first), min(begin + self.block_steps, self.steps + 1))


def rows_from(first: int, sizes: Iterable[tuple[int, int]]) -> int:
    """Returns the number of rows of all steps from `first` on, in closed form.

    `sizes` are (last step, rows of each step), one after the other.
    """
    total, last_counted = 0, first - 1
    for last, rows in sizes:
        total += max(0, last - last_counted) * rows
        last_counted = max(last_counted, last)
    return total
