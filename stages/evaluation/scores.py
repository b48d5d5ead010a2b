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


class BenchmarkChange(TypedDict):
    """The difference of two models on the same items."""

    set: str
    """task set"""
    task: str
    """task; empty for all tasks of the set together"""
    metric: str
    """metric, as in `scores.json` of the stage harness"""
    before: str
    """the earlier model"""
    after: str
    """the later model"""
    change: Mean
    """mean over items of the later model's value less that of the earlier one"""
    low: float
    """lower end of its 95 % interval, by Student's distribution"""
    high: float
    """upper end"""
    verdict: str
    """`better`, `worse`, or `no clear change` inside the noise: the interval has 0, or of right and wrong answers the
    exact test of McNemar gives more than 0.05"""


class BenchmarkChanges(TypedDict):
    """`changes.json` of the stage benchmark-changes."""

    models: list[str]
    """models, in the order of training"""
    changes: list[BenchmarkChange]
    """each model against the one before it, and the last against the first"""


class ContextGain(TypedDict):
    """Bits per byte of the same bytes with a short and a long context, and the difference within documents."""

    short_tokens: int
    """most tokens of the short context, with the scored one"""
    tokens: int
    """tokens of a document"""
    short: Ratio
    """bits per byte with the short context"""
    long: Ratio
    """bits per byte with all tokens before"""
    gain: Ratio
    """difference within documents, above 0 if the long context helps"""


class LongContextScores(TypedDict, total=False):
    """The scores on long texts, if the recipe measures them."""

    passkey: dict[str, Mean]
    """share of keys found, by length of the text"""
    passkey_by_depth: dict[str, dict[str, Mean]]
    """share of keys found, by length and depth"""
    loss_by_position: dict[str, Ratio]
    """bits per token, by `first-last`"""
    context: ContextGain
    """gain from a long context on the same bytes"""


class Proportion(Mean):
    """A share, with Wilson's 95 % interval from `low` to `high`."""

    low: float
    high: float


class ItemScores(TypedDict):
    """The share of right answers to items of one kind, that of a byte n-gram model, and that of a guess."""

    accuracy: Proportion
    """share of right answers of the model"""
    baseline: Proportion
    """share of right answers of a byte n-gram model"""
    chance: float
    """expected share of right answers of a guess"""


class ModelScores(LongContextScores):
    """`scores.json` of the stage evaluate."""

    bits_per_byte: dict[str, Ratio]
    """bits per byte of held-out documents, by source"""
    bits_per_byte_all: Ratio
    """bits per byte of the documents of all sources"""
    accuracy: dict[str, Mean]
    """share of correct answers, by task"""
    accuracy_all: Mean
    """share of correct answers to all problems"""
    text_items: NotRequired[dict[str, ItemScores]]
    """items of held-out text, by kind, if the recipe has some"""
    engine: NotRequired[str]
    """package and version of the engine, below"""


class Compressed(TypedDict):
    """The `bits` that xz needs for the documents of a source, and their number for each byte as `value`."""

    value: float
    bits: int


class SourceBaselines(TypedDict):
    """Bits per byte of baselines on the documents of one source that a model was scored on."""

    xz: Compressed
    """of xz, with the training text before the documents"""
    ngram: Ratio
    """of the byte n-gram model"""
    unigram: Ratio
    """of the frequencies of single bytes"""
    less_ngram: Ratio
    """of the model, less those of the n-gram model, with the standard error over the same documents"""


class KnownText(TypedDict):
    """The training text of a source that the baselines know."""

    documents: int
    """its documents"""
    bytes: int
    """its bytes"""
    all_bytes: int
    """bytes of the source's whole training split"""


class Overlap(TypedDict):
    """The share of the scored bytes of a source that are in matches with the training split."""

    value: float
    """the share"""
    bytes: int
    """scored bytes"""


class BaselineReport(TypedDict):
    """`report.json` of the stage baselines."""

    order: int
    """bytes of an n-gram"""
    models: dict[str, dict[str, SourceBaselines]]
    """figures by model and source, below"""
    training: dict[str, KnownText]
    """training text that the baselines know, by source"""
    overlap: dict[str, Overlap]
    """overlap of the scored text with the training split, by source"""


class AnswerStatistics(TypedDict):
    """Answers to items of one kind."""

    accuracy: NotRequired[Mean]
    """share of correct answers, of problems"""
    reward: NotRequired[Mean]
    """mean reward, of judged requests"""
    tokens: float
    """mean number of tokens of an answer"""
    truncated: float
    """share of answers that did not end by themselves"""
    reasoning: float
    """share of answers that have a reasoning"""


# k answers to each item: their tokens and pass@k.
SeveralAnswers = TypedDict("SeveralAnswers", {"tokens": float, "pass": Mean})


class ProblemScores(TypedDict):
    """Problems of one kind."""

    greedy: AnswerStatistics
    """the greedy answers"""
    samples: AnswerStatistics
    """the answers drawn at temperature 1"""
    at: dict[str, SeveralAnswers]
    """by k: generated tokens of k answers, and pass@k, an exact expectation over all subsets of k samples"""
    at_subset: NotRequired[dict[str, SeveralAnswers]]
    """the same on the problems with further answers, up to a larger k"""


class AnswerScores(TypedDict):
    """`scores.json` of the stage solve."""

    problems: dict[str, ProblemScores]
    """problems, by kind"""
    problems_all: ProblemScores | None
    """the same over all kinds; null without problems"""
    judged: dict[str, AnswerStatistics]
    """requests whose answers a reward judges, by kind"""
    engine: NotRequired[str]
    """as in [evaluate](#evaluate)"""


def pass_at_1(scores: Mapping[str, AnswerScores]) -> dict[str, Mean]:
    """Returns the accuracy of answers drawn at temperature 1 to all problems, by model.

    Models that answered no problem are left out.
    """
    totals = {name: model_scores["problems_all"] for name, model_scores in scores.items()}
    return {name: total["samples"]["accuracy"] for name, total in totals.items() if total}


class SideScores(TypedDict):
    """The answers of one of two compared models."""

    parts: dict[str, Mean]
    """mean of each part of the reward"""
    tokens: float
    """mean number of tokens of an answer"""
    truncated: float
    """share of answers that did not end by themselves"""


class PairScores(TypedDict):
    """`scores.json` of the stage prefer, without the models' names."""

    win_rate: Proportion
    """share of wins, ties as half, with Wilson's interval of 95 %"""
    wins: int
    """requests on which `model` wins"""
    ties: int
    """requests without a winner"""
    losses: int
    """requests on which `before` wins"""
    sides: dict[str, SideScores]
    """the answers of `model` and of `before`"""
    examples: list[dict[str, Any]]
    """the eight pairs with the smallest SHA-256 of their id"""
    engine: NotRequired[str]
    """as in [evaluate](#evaluate)"""


class ComparisonScores(PairScores):
    """`scores.json` of the stage prefer."""

    model: str
    """name of the model"""
    before: str
    """name of the model that it is compared with"""


class VerdictCounts(TypedDict):
    """Counts of verdicts by split, and by phase and split."""

    items: dict[str, dict[str, int]]
    """number of items by split and by the worst verdict of an item"""
    phases: dict[str, dict[str, dict[str, int]]]
    """number of items by phase, split and verdict"""


class ScoresByVerdict(TypedDict):
    """The mean score of one kind of item on two sets of items; None for fewer than two items."""

    full: Mean | None
    clean: Mean | None


class ContaminationReport(VerdictCounts):
    """`report.json` of the stage contamination."""

    thresholds: dict[str, Any]
    """thresholds of the verdicts"""
    read: dict[str, int]
    """number of texts that were searched, by phase"""
    scores: dict[str, dict[str, ScoresByVerdict]]
    """by table and kind, the mean score of all items and of the clean ones"""
