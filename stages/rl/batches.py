"""Answers as rows of a training batch: a question and its answer side by side, padded on the right.

Rows are sorted by length and cut into micro-batches, which are dealt to data-parallel ranks in runs; the sums that the
loss is made of are the same in every layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from stages.train.data import ALIGN, Batch, Share
from stages.train.parallel import Ranks


@dataclass(frozen=True)
class Example:
    """One row. ids: question and answer; start: where the answer begins. row: numbers of the whole row by name; tokens:
    numbers of each token of the answer by name."""

    ids: Sequence[int]
    start: int
    row: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, Sequence[float]] = field(default_factory=dict)


def share(
    examples: Sequence[Example], micro_rows: int, ranks: Ranks, pad_id: int, targets: int, sort: bool = True
) -> Share:
    """This rank's part of a set of rows. targets: what the engine divides the objective's sum by.

    sort: by length, so that short rows are not padded to long ones; pairs must stay side by side and are not sorted.
    Where rows do not come out even, rows of padding follow them, with 0 in everything.
    """
    ordered = sorted(examples, key=lambda example: len(example.ids)) if sort else examples
    each = -(-len(ordered) // (micro_rows * ranks.data_ranks))
    rows: list[Example | None] = [*ordered]
    rows += [None] * (each * micro_rows * ranks.data_ranks - len(ordered))
    first = ranks.data_rank * each * micro_rows
    own = rows[first : first + each * micro_rows]
    same = ranks.layout.pipeline > 1  # its schedule sends tensors of one shape
    widest = max(len(example.ids) for example in examples) - 1
    names = sorted(examples[0].row), sorted(examples[0].tokens)
    micro = []
    for i in range(0, len(own), micro_rows):
        part = own[i : i + micro_rows]
        width = widest if same else max((len(e.ids) - 1 for e in part if e is not None), default=1)
        micro.append(_batch(part, _up(width, ranks), pad_id, *names))
    return Share(micro, _up(widest, ranks), targets)


def _up(width: int, ranks: Ranks) -> int:
    unit = max(ALIGN, ranks.layout.width_unit)
    return -(-width // unit) * unit


def _batch(rows: Sequence[Example | None], width: int, pad_id: int, row: list[str], token: list[str]) -> Batch:
    shape = (len(rows), width)
    ids = torch.full(shape, pad_id)
    labels = torch.full(shape, pad_id)
    mask, padding = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    more = {name: torch.zeros(len(rows)) for name in row} | {name: torch.zeros(shape) for name in token}
    for i, example in enumerate(rows):
        if example is None:
            continue
        n, at = len(example.ids) - 1, example.start - 1
        ids[i, :n], labels[i, :n] = torch.tensor(example.ids[:-1]), torch.tensor(example.ids[1:])
        mask[i, at:n], padding[i, :n] = 1, False
        for name in row:
            more[name][i] = example.row[name]
        for name in token:
            more[name][i, at:n] = torch.tensor(example.tokens[name])
    return Batch(ids, labels, mask, padding, more=more)
