"""How an update averages the losses of its answers' tokens (`Mean` of the registry). Answers that carry no loss, such
as truncated ones, are not among them."""

from __future__ import annotations

from collections.abc import Sequence


class OverTokens:
    """The mean over all tokens of the update: each token weighs the same (DAPO, arXiv 2503.14476)."""

    def weight(self, length: int) -> float:
        return 1.0

    def divisor(self, lengths: Sequence[int], max_length: int) -> int:
        return sum(lengths)


class OverAnswers:
    """The mean over answers of the mean over their tokens: each answer weighs the same (GRPO, arXiv 2402.03300)."""

    def weight(self, length: int) -> float:
        return 1.0 / length

    def divisor(self, lengths: Sequence[int], max_length: int) -> int:
        return len(lengths)


class OfSums:
    """The mean over answers of the sum over their tokens: an answer is one action (RLOO, arXiv 2402.14740)."""

    def weight(self, length: int) -> float:
        return 1.0

    def divisor(self, lengths: Sequence[int], max_length: int) -> int:
        return len(lengths)


class ByConstant(OfSums):
    """The mean of sums by the constant maximum length: no answer's length changes the weight of its tokens, nor that
    of others (Dr. GRPO, arXiv 2503.20783)."""

    def divisor(self, lengths: Sequence[int], max_length: int) -> int:
        return len(lengths) * max_length
