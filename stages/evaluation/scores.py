"""The fields of the JSON files of evaluation, which cards, gates and checks of a release read.

They are `scores.json` of the stages evaluate, solve, prefer and harness, and `report.json` of the stages
baselines and contamination.

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


class LongContextScores(TypedDict, total=False):
    """The scores on long texts, if the recipe measures them.

    Attributes:
        passkey: Share of keys found, by length of the text.
        passkey_by_depth: The same by length and depth.
        loss_by_position: Bits per token by `first-last`.
    """

    passkey: dict[str, Mean]
    passkey_by_depth: dict[str, dict[str, Mean]]
    loss_by_position: dict[str, Ratio]


class ModelScores(LongContextScores):
    """`scores.json` of the stage evaluate.

    Attributes:
        bits_per_byte: Bits per byte by source.
        accuracy: Accuracy by task.
    """

    bits_per_byte: dict[str, Ratio]
    bits_per_byte_all: Ratio
    accuracy: dict[str, Mean]
    accuracy_all: Mean
    engine: NotRequired[str]


class Compressed(TypedDict):
    """What xz needs for the documents of a source: `bits`, and their number for each byte as `value`."""

    value: float
    bits: int


class SourceBaselines(TypedDict):
    """Bits per byte of baselines on the documents of one source that a model was scored on.

    Attributes:
        xz: Of xz, with the training text before the documents.
        ngram: Of the byte n-gram model.
        unigram: Of the frequencies of single bytes.
        less_ngram: Of the model, less those of the n-gram model, with the standard error over the same documents.
    """

    xz: Compressed
    ngram: Ratio
    unigram: Ratio
    less_ngram: Ratio


class KnownText(TypedDict):
    """The training text of a source that the baselines know.

    Attributes:
        documents: Its documents.
        bytes: Its bytes.
        all_bytes: The bytes of the source's whole training split.
    """

    documents: int
    bytes: int
    all_bytes: int


class Overlap(TypedDict):
    """The share of the scored bytes of a source that are in matches with the training split."""

    value: float
    bytes: int


class BaselineReport(TypedDict):
    """`report.json` of the stage baselines.

    Attributes:
        order: The order of the n-gram model.
        models: Figures by model and source.
        training: By source.
        overlap: By source.
    """

    order: int
    models: dict[str, dict[str, SourceBaselines]]
    training: dict[str, KnownText]
    overlap: dict[str, Overlap]


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
    """

    greedy: AnswerStatistics
    samples: AnswerStatistics
    at: dict[str, SeveralAnswers]


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


class Proportion(Mean):
    """A share, with Wilson's 95 % interval from `low` to `high`."""

    low: float
    high: float


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
