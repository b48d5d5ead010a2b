"""The exposure of canaries: how much likelier a model finds a planted secret than other secrets of its form.

With r the rank of the secret's probability among n random secrets and itself, the exposure is log2(n + 1) - log2(r)
bits: 0 for the least likely one, log2(n + 1) for the likeliest (Carlini et al. 2019, "The Secret Sharer", arXiv
1802.08232). A model that has not seen the secret finds any rank equally likely; its mean is then about 1.44 bits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypedDict

from stages.data.synthetic import canaries
from stages.data.synthetic.canaries import Canary
from stages.data.table import Double, Int32, Int64, String, columns_of
from stages.evaluation.bits_per_byte import token_ids
from stages.evaluation.confidence import clustered
from stages.evaluation.engine import LanguageModel
from stages.evaluation.scores import Exposure

SENTENCE_TOKENS = 40
"""Assumed tokens of the sentence of a canary, for `atom plan` alone."""


class CanaryRow(TypedDict):
    """A canary. copies: documents that contain it; bits: minus log2 of the probability of its sentence after the first
    token; rank: of the secret among `alternatives` others and itself, 1 for the most probable one."""

    source: String
    id: String
    kind: String
    copies: Int32
    times_seen: Int64
    sentence: String
    bits: Double
    rank: Int32
    alternatives: Int32


CANARIES = columns_of(CanaryRow)


def expose(
    model: LanguageModel, tokenizer: Any, alternatives: int, seed: int, source: str, canary: Canary, times_seen: int
) -> CanaryRow:
    """The row of a canary, whose secret is ranked among as many alternatives. seed: of the recipe."""
    others = canaries.alternatives(canary, source, alternatives, seed)
    sentences = [canary.sentence(secret) for secret in (canary.secret, *others)]
    bits, *other_bits = model.sentence_bits([token_ids(tokenizer, sentence) for sentence in sentences])
    return {
        "source": source, "id": canary.name, "kind": canary.kind, "copies": canary.copies, "times_seen": times_seen,
        "sentence": sentences[0], "bits": bits, "rank": 1 + sum(other <= bits for other in other_bits),
        "alternatives": len(others),
    }  # fmt: skip


def summary(exposed: Sequence[CanaryRow]) -> dict[str, dict[str, Exposure]]:
    """`exposure` of scores.json: by kind and copies. Errors are over canaries."""
    groups: dict[str, dict[int, list[CanaryRow]]] = defaultdict(lambda: defaultdict(list))
    for row in exposed:
        groups[row["kind"]][row["copies"]].append(row)
    return {
        kind: {str(copies): _summarize(rows) for copies, rows in sorted(by_copies.items())}
        for kind, by_copies in sorted(groups.items())
    }


def _summarize(rows: Sequence[CanaryRow]) -> Exposure:
    return {
        "exposure": clustered([math.log2((row["alternatives"] + 1) / row["rank"]) for row in rows]),
        "times_seen": sum(row["times_seen"] for row in rows) / len(rows),
    }
