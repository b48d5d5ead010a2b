"""The settings of the order of a phase, the rows and blocks of its steps, and the position at which it begins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

from pipeline.core.bounds import MOST_RAMP_STEPS, Context, Flag, Key, Mix, Range, Seed, Steps
from pipeline.core.stage import Config, added

# The rows of one step.
Rows = Annotated[int, Range(1, 2**30)]
# The minimum number of rows of a block, with which packing still fills them well.
LEAST_ROWS = 4096
# The number of blocks of a phase, unless they then have too few rows or too many tokens.
BLOCKS = 256
# The maximum number of tokens of a block of more than LEAST_ROWS, which limits the memory of a process. As chats, they
# are about a million chunks.
MOST_TOKENS = 2**26
# The bytes of a row of the table on disk, measured on 400,000 rows: 25 where ids are random 128-bit numbers in hex, and
# up to 2 more for the part of a source of thousands of parts. A packed row has one row of the table for each document.
ROW_BYTES = 27
# The memory of a process that makes a block of MOST_TOKENS, or joins blocks: it maps the index of the documents.
MEMORY_BYTES = 500_000_000
# The maximum number of blocks of a phase, even if a block then has more tokens than MOST_TOKENS: each block is a file,
# and a folder on the Hub has at most 10,000.
MOST_BLOCKS = 9000


class LongDocuments(Config):
    """Up-weighting of long documents.

    In each source, chunks of more than `over` tokens make up `share` of the tokens, unless they would be read more than
    `max_epochs` times. Shorter chunks then make up the difference, which is reported. Four epochs cost next to nothing
    (Muennighoff et al., 2023).
    """

    over: Context
    """tokens above which a chunk is long; usually the previous context length"""
    share: Annotated[float, Range(0, 1, above=True, below=True)]
    """share of the tokens of each source that come from long chunks"""
    max_epochs: Annotated[float, Range(0, 1000, above=True)] = 4.0
    """maximum number of times that a long chunk is read"""


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
        """Returns the number of rows of each step from `first` to `last`, which is that of the phase if it is None."""
        last = self.steps if last is None else last
        row_counts = []
        for step in range(first, last + 1):
            row_counts.append(next((rows for last_step, rows in self.ramp if step <= last_step), self.rows))
        return row_counts

    def rows_from(self, first: int) -> int:
        """Returns the number of rows of all steps from `first` on."""
        return rows_from(first, self.sizes)

    def step_of(self, first: int, row: int) -> int:
        """Returns the step that has a row; rows are numbered from 0, the first one of step `first`."""
        for last, rows in self.sizes:
            count = max(0, last - first + 1) * rows
            if row < count:
                return first + row // rows
            row -= count
            first = max(first, last + 1)
        raise ValueError("the phase has fewer rows")

    @property
    def block_steps(self) -> int:
        """Steps of a block."""
        # Large blocks fill well, small ones keep the memory of a process bounded.
        rows = self.block_rows
        if rows is None:
            rows = max(LEAST_ROWS, min(self.rows_from(1) // BLOCKS, MOST_TOKENS // self.sequence_length))
        # Rounded up, so that there are at most MOST_BLOCKS.
        least_steps = -(-self.steps // MOST_BLOCKS)
        return max(1, rows // self.rows, least_steps)

    @property
    def blocks(self) -> int:
        """The number of blocks from that of `first_step` on."""
        return (self.steps - 1) // self.block_steps - (self.first_step - 1) // self.block_steps + 1

    def steps_of_block(self, n: int, first_step: int | None = None) -> range:
        """Returns the steps of block `n` from `first_step` on, which is that of the config if it is None."""
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


@dataclass(frozen=True)
class DataCursor:
    """A position in the data: the first step, and the chunks of each stream that were read before that step.

    `seed` orders the sources; a checkpoint passes it on, so that another recipe seed repeats no document.
    """

    first_step: int
    seed: int
    rows: dict[str, int] = field(default_factory=dict)
