"""Blocks with our words agree with those with spaCy's on real text, and the figures of bench/agreement.yaml say how far."""

from __future__ import annotations

from functools import cache

import pytest

from bench.agreement import agreement_of, our_reasons, read_figures
from bench.stock_blocks import BLOCKS
from tests.fixtures.agreement_fixtures import documents


@cache
def reasons_of(name: str) -> list[str | None]:
    return our_reasons(name, [row["text"] for row in documents()])


@pytest.mark.parametrize("name", BLOCKS)
def test_the_published_figures_are_those_of_the_steps(name: str) -> None:
    measured = agreement_of(reasons_of(name), [row["reference"][name] for row in documents()])
    figures = read_figures()
    assert figures["rules"][name] == measured, "bench/agreement.py writes the figures again"
    assert figures["documents"] == len(documents()) >= 2000
    assert measured["agreement"] >= 0.97 and measured["kappa"] >= 0.9
    kept = measured["reference_kept"]
    assert 30 <= kept <= len(documents()) - 30, "documents of both kinds, or agreement would say nothing"


@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_rule_removes(name: str) -> None:
    pairs = zip(reasons_of(name), (row["reference"][name] for row in documents()), strict=True)
    assert sum(a == b for a, b in pairs) >= 0.97 * len(documents())


def test_agreement_counts_verdicts_and_not_reasons() -> None:
    figures = agreement_of(["short", None, None, "long"], ["other", None, "short", None])
    assert figures == {"agreement": 0.5, "kappa": 0.0, "kept": 2, "reference_kept": 2}
    assert agreement_of([None, None], [None, None])["kappa"] == 1.0
