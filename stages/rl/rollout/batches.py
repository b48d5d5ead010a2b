"""Answers as packed training rows: questions and answers side by side, without padding between them.

A question that consecutive examples share is computed once: their answers continue the same tokens. Logits are computed
for answers alone.

The recipe sets the number of micro-batches of an update. Examples are spread evenly over them, and a layout deals
complete micro-batches to its data-parallel ranks. So every layout computes the same sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from stages.train.data import ALIGN, Batch, RankBatch
from stages.train.parallel import Ranks


@dataclass(frozen=True)
class Example:
    """A question and its answer.

    Attributes:
        ids: Token ids of both.
        start: Index of the answer's first token.
        row: Numbers of the example by name.
        tokens: Numbers of each token of the answer by name.
        mask: True for each token of the answer that is a target, by default for all. The others, such as results of
            tools, are only read.
    """

    ids: Sequence[int]
    start: int
    row: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, Sequence[float]] = field(default_factory=dict)
    mask: Sequence[bool] | None = None

    @property
    def targets(self) -> int:
        """The number of tokens that carry a loss."""
        return len(self.ids) - self.start if self.mask is None else sum(self.mask)

    def continues(self, other: Example | None) -> bool:
        """Returns True if its question is the other's."""
        return other is not None and self.start == other.start and self.ids[: self.start] == other.ids[: other.start]


def build_rank_batch(
    units: Sequence[Sequence[Example]], micro_batches: int, ranks: Ranks, pad_id: int, targets: int
) -> RankBatch:
    """Returns this rank's part of an update.

    Args:
        units: Examples that must stay together, such as the two of a pair, those of one question in succession.
        micro_batches: Micro-batches of the update, over all data-parallel ranks.
        ranks: The ranks of the trainer.
        pad_id: Id of the padding token.
        targets: The divisor of the objective's sum.
    """
    assert micro_batches % ranks.data_ranks == 0, "the recipe's check"
    sizes = [sum(len(example.ids) for example in unit) for unit in units]
    parts: list[list[Example]] = [[] for _ in range(micro_batches)]
    for unit, size, end in zip(units, sizes, accumulate(sizes), strict=True):
        # By the middle of each unit on the line of all tokens, so that the parts are about equal for any number of
        # them.
        parts[(2 * end - size) * micro_batches // (2 * sum(sizes))] += unit  # where its middle is
    parts = [part or [_masked_example(units[0][0])] for part in parts]  # Megatron's balance loss of no token is NaN
    widths = [_round_up(_tokens(part), ranks) for part in parts]
    if ranks.layout.pp > 1:  # its schedule sends tensors of one shape
        widths = [max(widths)] * len(widths)
    per_rank = micro_batches // ranks.data_ranks
    mine = slice(ranks.data_rank * per_rank, (ranks.data_rank + 1) * per_rank)
    batches = [_batch(part, width, pad_id) for part, width in zip(parts[mine], widths[mine], strict=True)]
    return RankBatch(batches, max(widths), targets)


def _masked_example(example: Example) -> Example:
    """Returns an example without a loss."""
    # Both tokens are the question, so that none is a target.
    return Example(example.ids[:2], 2, dict.fromkeys(example.row, 0.0), dict.fromkeys(example.tokens, ()))


def _round_up(width: int, ranks: Ranks) -> int:
    multiple = math.lcm(ALIGN, ranks.layout.width_unit)
    return -(-width // multiple) * multiple


def _tokens(examples: Sequence[Example]) -> int:
    """Returns the width of a row with the examples."""
    return sum(end - begin for begin, end, *_ in _segments(examples))


Segment = tuple[int, int, int, int, Sequence[int]]


def _segments(examples: Sequence[Example]) -> list[Segment]:
    """Returns a row's segments from left to right: first position, end, both of the question that it continues, tokens.

    A question has one segment, or none if the example before has it; then comes the answer without its last token.
    """
    segments: list[Segment] = []
    before: Example | None = None
    question, end = (0, 0), 0
    for example in examples:
        if not example.continues(before):
            question = end, end + example.start
            segments.append((*question, 0, 0, example.ids[: example.start]))
            end += example.start
        ids = example.ids[example.start : -1]
        segments.append((end, end + len(ids), *question, ids))
        before, end = example, end + len(ids)
    return segments


def _batch(examples: Sequence[Example], width: int, pad_id: int) -> Batch:
    """Returns one row of `width` tokens.

    Labels, loss mask and extras have a row for each example, a column for each token of its answer.

    Args:
        examples: The examples of the row, from left to right.
        width: Tokens of the row, padding included.
        pad_id: Id of the padding token.
    """
    segments = _segments(examples)
    ids, padding = torch.full((1, width), pad_id), torch.ones(1, width, dtype=torch.bool)
    length = segments[-1][1]
    # Padding is a segment of its own, which begins after the last answer.
    starts, prefixes = torch.full((1, width), length), torch.zeros(2, 1, width, dtype=torch.long)
    for begin, end, first, last, tokens in segments:
        ids[0, begin:end], padding[0, begin:end], starts[0, begin:end] = torch.tensor(tokens), False, begin
        prefixes[0, 0, begin:end], prefixes[1, 0, begin:end] = first, last

    shape = len(examples), max(1, *(len(example.ids) - example.start for example in examples))
    labels, mask = torch.full(shape, pad_id), torch.zeros(shape)
    extras = {name: torch.zeros(shape[0]) for name in examples[0].row}
    extras |= {name: torch.zeros(shape) for name in examples[0].tokens}
    inputs, cells = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
    answers = [segment for segment in segments if segment[3]]
    for i, (example, (begin, end, _, question_end, _)) in enumerate(zip(examples, answers, strict=True)):
        if count := len(example.ids) - example.start:
            # Logits are computed for targets alone, and results of tools are none.
            columns = torch.arange(count) if example.mask is None else torch.tensor(example.mask).nonzero()[:, 0]
            labels[i, :count], mask[i, columns] = torch.tensor(example.ids[example.start :]), 1
            # The last token of the question predicts the first one of the answer.
            inputs.append(torch.cat((torch.tensor([question_end - 1]), torch.arange(begin, end)))[columns])
            cells.append(i * shape[1] + columns)
        for name, value in example.row.items():
            extras[name][i] = value
        for name, values in example.tokens.items():
            extras[name][i, :count] = torch.tensor(values)
    targets = torch.stack((torch.cat(inputs), torch.cat(cells)))
    if not targets.numel():  # the first input predicts a token that the loss mask leaves out
        targets = torch.zeros(2, 1, dtype=torch.long)
    return Batch(ids, labels, mask, padding, starts, prefixes, targets, extras)
