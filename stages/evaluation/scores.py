"""The fields of the JSON files of evaluation, which cards, gates and checks of a release read.

They are `scores.json` of the stages evaluate, solve, prefer and harness, and `report.json` of the stage
contamination.

Each has `engine`, the package and version of vLLM, if a server computed it; without, transformers did, in fp32.

docs/formats.md explains the fields. A name in these files is published and never changes its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from stages.confidence import Mean, Ratio

# On a test item compared with the training data, from the best to the worst.
VERDICTS = ("clean", "overlap", "contaminated")


# `scores.json` of the stage harness: by task set, task, and `metric,filter`.
HarnessScores = dict[str, dict[str, dict[str, Mean]]]


class ContextGain(TypedDict):
    """Bits per byte of the same bytes with a short and a long context, and the difference within documents.

    Attributes:
        short_tokens: Most tokens of the short context, with the scored one.
        tokens: Tokens of a document.
    """

    short_tokens: int
    tokens: int
    short: Ratio
    long: Ratio
    gain: Ratio


class LongContextScores(TypedDict, total=False):
    """The scores on long texts, if the recipe measures them.

    Attributes:
        passkey: Share of keys found, by length of the text.
        passkey_by_depth: The same by length and depth.
        loss_by_position: Bits per token by `first-last`.
        context: Gain from a long context on the same bytes.
    """

    passkey: dict[str, Mean]
    passkey_by_depth: dict[str, dict[str, Mean]]
    loss_by_position: dict[str, Ratio]
    context: ContextGain


class Proportion(Mean):
    """A share, with Wilson's 95 % interval from `low` to `high`."""

    low: float
    high: float


class ItemScores(TypedDict):
    """The share of right answers to items of one kind, that of a byte n-gram model, and that of a guess."""

    accuracy: Proportion
    baseline: Proportion
    chance: float


class ModelScores(LongContextScores):
    """`scores.json` of the stage evaluate.

    Attributes:
        bits_per_byte: Bits per byte by source.
        accuracy: Accuracy by task.
        text_items: Scores of items of held-out text by kind, if the recipe has some.
    """

    bits_per_byte: dict[str, Ratio]
    bits_per_byte_all: Ratio
    accuracy: dict[str, Mean]
    accuracy_all: Mean
    text_items: NotRequired[dict[str, ItemScores]]
    engine: NotRequired[str]


class AnswerStatistics(TypedDict):
    """Answers to items of one kind: their mean score, as `accuracy` of problems or as `reward` of judged requests."""

    accuracy: NotRequired[Mean]
    reward: NotRequired[Mean]
    tokens: float
    truncated: float
    reasoning: float


# k answers to each item: their tokens and pass@k.
SeveralAnswers = TypedDict("SeveralAnswers", {"tokens": float, "pass": Mean})


class ProblemScores(TypedDict):
    """Problems of one kind.

    Attributes:
        at: Scores of several answers, by k.
        at_subset: The same on the problems with further answers, up to a larger k.
    """

    greedy: AnswerStatistics
    samples: AnswerStatistics
    at: dict[str, SeveralAnswers]
    at_subset: NotRequired[dict[str, SeveralAnswers]]


class AnswerScores(TypedDict):
    """`scores.json` of the stage solve.

    Attributes:
        problems, judged: By kind.
    """

    problems: dict[str, ProblemScores]
    problems_all: ProblemScores | None
    judged: dict[str, AnswerStatistics]
    engine: NotRequired[str]


def pass_at_1(scores: Mapping[str, AnswerScores]) -> dict[str, Mean]:
    """Returns the accuracy of answers drawn at temperature 1 to all problems, by model.

    Models that answered no problem are left out.
    """
    totals = {name: model_scores["problems_all"] for name, model_scores in scores.items()}
    return {name: total["samples"]["accuracy"] for name, total in totals.items() if total}


class SideScores(TypedDict):
    """The answers of one of two compared models.

    Attributes:
        parts: Parts of the reward.
    """

    parts: dict[str, Mean]
    tokens: float
    truncated: float


class PairScores(TypedDict):
    """`scores.json` of the stage prefer, without the models' names.

    Attributes:
        sides: `model` and `before`.
        examples: Some of the pairs.
    """

    win_rate: Proportion
    wins: int
    ties: int
    losses: int
    sides: dict[str, SideScores]
    examples: list[dict[str, Any]]
    engine: NotRequired[str]


class ComparisonScores(PairScores):
    """`scores.json` of the stage prefer."""

    model: str
    before: str


class VerdictCounts(TypedDict):
    """Counts of verdicts by split, and by phase and split."""

    items: dict[str, dict[str, int]]
    phases: dict[str, dict[str, dict[str, int]]]


class ScoresByVerdict(TypedDict):
    """The mean score of one kind of item on two sets of items; None for fewer than two items."""

    full: Mean | None
    clean: Mean | None


class ContaminationReport(VerdictCounts):
    """`report.json` of the stage contamination.

    Attributes:
        read: Texts by phase.
        scores: Scores by input and kind.
    """

    thresholds: dict[str, Any]
    read: dict[str, int]
    scores: dict[str, dict[str, ScoresByVerdict]]
