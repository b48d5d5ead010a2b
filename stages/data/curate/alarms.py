"""Rules that remove a large share of a source: an alarm, and a stop unless the data recipe acknowledges it.

The share is that of the documents that reached the rule. Else a deduplication that takes everything that filters left
of a source would hide behind the filters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from pipeline.core.bounds import Key, Range
from pipeline.core.errors import AtomError
from pipeline.core.stage import Report
from stages.data.curate.deny_list import OPT_OUT_RULE
from stages.data.curate.source_filter import SECRETS

AlarmShare = Annotated[float, Range(0, 1)]
# By rule, the share of a source that it may remove.
Acknowledged = Annotated[dict[Key, AlarmShare], Field(max_length=200)]
# Of fewer documents, a large share is no news.
MIN_DOCUMENTS = 20
BEFORE_STEPS = (OPT_OUT_RULE, "license", "failed", "generation")
DECONTAMINATION, DEDUPLICATION = "decontamination", "deduplication"
# The rules of every source beside its steps. Deduplication: exact and near duplicates.
RULES = (*BEFORE_STEPS, SECRETS, DECONTAMINATION, DEDUPLICATION)


@dataclass(frozen=True)
class Loss:
    """The documents of a source that a rule removed, among those that reached it."""

    source: str
    rule: str
    removed: int
    documents: int

    @property
    def share(self) -> float:
        return self.removed / self.documents if self.documents else 0.0

    def __str__(self) -> str:
        return f"{self.source}: {self.rule} removes {self.removed} of {self.documents} documents"


def filter_losses(source: str, steps: Sequence[str], documents: int, removed: Mapping[str, int]) -> list[Loss]:
    """Returns the losses by the rules of filtering, in their order.

    Args:
        source: Name of the source.
        steps: Names of its steps.
        documents: Number of its acquired documents.
        removed: Removed documents by full rule, such as `c4/javascript`.
    """
    by_rule = Counter[str]()
    for rule, count in removed.items():
        by_rule[rule.partition("/")[0]] += count
    order = dict.fromkeys([*BEFORE_STEPS, *steps, SECRETS, DECONTAMINATION])
    losses = []
    for rule in [*order, *(rule for rule in by_rule if rule not in order)]:
        losses.append(Loss(source, rule, by_rule[rule], documents))
        # A rule only sees what those before it have left.
        documents -= by_rule[rule]
    return losses


def dedup_losses(source: str, documents: int, kept: int, removed: Mapping[str, int]) -> list[Loss]:
    """Returns the losses by deduplication and by all opt-outs.

    Args:
        source: Name of the source.
        documents: Number of its acquired documents.
        kept: Number of its kept documents.
        removed: Removed documents by rule, those of filtering too.
    """
    duplicates = removed.get("exact_duplicate", 0) + removed.get("near_duplicate", 0)
    opted_out = removed.get(OPT_OUT_RULE, 0)
    return [
        Loss(source, OPT_OUT_RULE, opted_out, documents),
        # A share of the documents that reached deduplication, not of all acquired ones.
        Loss(source, DEDUPLICATION, duplicates, kept + duplicates),
    ]


def require_acknowledged(
    losses: Sequence[Loss], alarm_share: float, acknowledged: Mapping[str, Acknowledged], report: Report | None
) -> None:
    """Notes the losses above the alarm share.

    Args:
        losses: The losses of all sources.
        alarm_share: The share of a source above which a loss must be acknowledged.
        acknowledged: By source, the shares that the recipe acknowledges by rule.
        report: Takes the notes; None: there are none of a sample.

    Raises:
        AtomError: A loss is not acknowledged, or is above the acknowledged share.
    """
    open_losses = []
    for loss in losses:
        # Small sources lose large shares by chance.
        if loss.documents < MIN_DOCUMENTS or loss.share <= alarm_share:
            continue
        allowed = acknowledged.get(loss.source, {}).get(loss.rule)
        if allowed is None or loss.share > allowed:
            open_losses.append(loss)
        elif report:
            report.note(f"alarm: {loss}, which the data recipe acknowledges up to {allowed:g}")
    if open_losses:
        first, others = open_losses[0], ", ".join(map(str, open_losses[1:4]))
        limit = acknowledged.get(first.source, {}).get(first.rule, alarm_share)
        further = f"; also {others}{', …' if len(open_losses) > 4 else ''}" if others else ""
        # The suggested share is rounded up, so that it suffices.
        raise AtomError(
            f"source {first}, a larger share than {limit:g}; look at what it removes and change it, or acknowledge it "
            f"in the data recipe by acknowledged_removals: {{{first.rule}: {math.ceil(first.share * 100) / 100:g}}} of "
            f"that source{further}"
        )
