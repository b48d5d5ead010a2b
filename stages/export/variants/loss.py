"""The loss of a variant against the original: `loss.json` from tables alone, so that it can be recomputed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

from pipeline.core.errors import AtomError
from stages.confidence import Figure, Mean, Ratio, ratio
from stages.evaluation.model_evaluation import ProblemAnswer
from stages.evaluation.scores import ModelScores
from stages.export.variants.registry import VARIANTS, VariantName
from stages.formats.table import Double, Int32, String, columns_of

IN_PROCESS = "transformers in fp32, on the weights as the variant stores them"


def measured_by(engine: str = "") -> str:
    """The sentence on what measured a variant.

    engine: of scores and answers, the package of vLLM with its version; "" for transformers. Distributions are
    compared by transformers in any case.
    """
    return f"vLLM ({engine}) in fp32, and its divergence by {IN_PROCESS}" if engine else IN_PROCESS


class DivergenceRow(TypedDict):
    """The next-token distributions of original and variant at all positions of a text.

    id: of the problem, with the original's answer, or of the held-out document; sum, largest: of the
    Kullback-Leibler divergence of the variant from the original, in nats; same_likeliest: positions at which both
    have the same likeliest token.
    """

    id: String
    positions: Int32
    sum: Double
    largest: Double
    same_likeliest: Int32


DIVERGENCES = columns_of(DivergenceRow)


class Divergence(Figure):
    """Kullback-Leibler divergence in nats: mean over positions with its standard error over texts, and maximum.

    same_likeliest: share of positions with the same likeliest token.
    """

    max: float
    positions: int
    texts: int
    same_likeliest: float


class Compared(TypedDict):
    """A score of the variant beside that of the original."""

    variant: Mean | Ratio
    original: Mean | Ratio


class GreedyAgreement(TypedDict):
    """Problems to which variant and original give the same answer, token for token."""

    equal: int
    n: int


class VariantLoss(TypedDict):
    """`loss.json`. bytes: of the files of the weights, of `variant` and `original`. greedy: of answers to problems."""

    variant: str
    title: str
    bytes: Mapping[str, int]
    divergence: Divergence
    bits_per_byte: Compared
    accuracy: Compared
    greedy: GreedyAgreement
    measured_by: str


def summary(
    name: VariantName,
    sizes: Mapping[str, int],
    divergences: Sequence[DivergenceRow],
    scores: ModelScores,
    original: ModelScores,
    answers: Sequence[ProblemAnswer],
    original_answers: Mapping[str, str],
    stated_by: str,
) -> VariantLoss:
    """The content of `loss.json`.

    `sizes` are the bytes of `variant` and `original`. `scores` are those of the variant, and `original` those of the
    exported model. `original_answers` has the exported model's text by problem. `stated_by` becomes `measured_by`.

    Raises AtomError if the exported model has no answer to a problem.
    """
    if missing := [row["id"] for row in answers if row["id"] not in original_answers]:
        raise AtomError(f"the original has no answer to problem {missing[0]}; evaluate it on the same problems")
    mean = ratio([(row["sum"], row["positions"]) for row in divergences], "tokens")
    positions = sum(row["positions"] for row in divergences)
    return {
        "variant": name,
        "title": VARIANTS[name].title,
        "bytes": dict(sizes),
        "divergence": {
            "value": mean["value"],
            "se": mean["se"],
            "max": max(row["largest"] for row in divergences),
            "positions": positions,
            "texts": len(divergences),
            "same_likeliest": math.fsum(row["same_likeliest"] for row in divergences) / positions,
        },
        "bits_per_byte": {"variant": scores["bits_per_byte_all"], "original": original["bits_per_byte_all"]},
        "accuracy": {"variant": scores["accuracy_all"], "original": original["accuracy_all"]},
        "greedy": {"equal": sum(row["output"] == original_answers[row["id"]] for row in answers), "n": len(answers)},
        "measured_by": stated_by,
    }
