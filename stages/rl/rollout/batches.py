"""Answers as rows of a training batch: a question and its answer side by side, padded on the right.

The recipe sets the number of micro-batches of an update. Rows are spread evenly over them, and a layout deals complete
micro-batches to its data-parallel ranks. So every layout computes the same sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from stages.train.data import ALIGN, Batch, RankBatch
from stages.train.parallel import Ranks


@dataclass(frozen=True)
class Example:
    """One row. ids: question and answer; start: index of the answer's first token. row: numbers of the row by name;
    tokens: numbers of each token of the answer by name."""

    ids: Sequence[int]
    start: int
    row: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, Sequence[float]] = field(default_factory=dict)


def build_rank_batch(
    units: Sequence[Sequence[Example]], micro_batches: int, ranks: Ranks, pad_id: int, targets: int
) -> RankBatch:
    """This rank's part of an update. units: rows that must stay together, such as the two of a pair, in the order of
    their assignment; sorted by length they need the least padding. targets: the divisor of the objective's sum."""
    assert micro_batches % ranks.data_ranks == 0, "the recipe's check"
    cuts = [len(units) * n // micro_batches for n in range(micro_batches + 1)]
    micro_batch_rows = [[row for unit in units[a:b] for row in unit] for a, b in pairwise(cuts)]
    max_width = max(len(row.ids) for part in micro_batch_rows for row in part) - 1
    max_rows = max(map(len, micro_batch_rows))
    uniform = ranks.layout.pp > 1  # its schedule sends tensors of one shape
    per_rank = micro_batches // ranks.data_ranks
    batches = []
    for part in micro_batch_rows[ranks.data_rank * per_rank : (ranks.data_rank + 1) * per_rank]:
        rows = part or [_masked_example(units[0][0])]  # Megatron's balance loss without any token is NaN
        width = max_width if uniform else max(len(row.ids) for row in rows) - 1
        batches.append(_batch(rows, max_rows if uniform else len(rows), _round_up(width, ranks), pad_id))
    return RankBatch(batches, _round_up(max_width, ranks), targets)


def _masked_example(row: Example) -> Example:
    """A row without a loss."""
    return Example(row.ids[:2], 2, dict.fromkeys(row.row, 0.0), dict.fromkeys(row.tokens, ()))


def _round_up(width: int, ranks: Ranks) -> int:
    multiple = max(ALIGN, ranks.layout.width_unit)
    return -(-width // multiple) * multiple


def _batch(rows: Sequence[Example], count: int, width: int, pad_id: int) -> Batch:
    shape = (count, width)
    ids = torch.full(shape, pad_id)
    labels = torch.full(shape, pad_id)
    mask, padding = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    extras = {name: torch.zeros(count) for name in rows[0].row} | {name: torch.zeros(shape) for name in rows[0].tokens}
    for i, example in enumerate(rows):
        length, start = len(example.ids) - 1, example.start - 1
        ids[i, :length], labels[i, :length] = torch.tensor(example.ids[:-1]), torch.tensor(example.ids[1:])
        mask[i, start:length], padding[i, :length] = 1, False
        for name, value in example.row.items():
            extras[name][i] = value
        for name, values in example.tokens.items():
            extras[name][i, start:length] = torch.tensor(values)
    return Batch(ids, labels, mask, padding, extras=extras)
