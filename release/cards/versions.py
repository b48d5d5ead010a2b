"""Versions of the cards, and from which of them on a part of a card is as it is rendered today.

A published card is compared with today's tables as far as its own version had them. What is added to a card goes into
ADDED, what is rendered otherwise than before into CHANGED, each with the number of the next schema; then cards that are
out in the world stay right: verification demands nothing that came later, and says what it did not compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

SCHEMA = 4
"""4: the phases that learn from preferences have other names.
3: cards state their versions, and open with what the figures do not flatter."""
ESCAPED = 3
"""The schema from which on characters that no text has are escaped in what a model wrote."""
ADDED: dict[str, int] = {"caveats": 3, "caveats_rule": 3, "unread": 3, "reward_parts": 3}
"""{table: the schema that brought it}. Older cards have no such table, and none is asked for."""
FIGURES: dict[str, int] = {}
"""{figure of a scores.json, with dots between names: the schema that brought it}. Older files may lack it."""
CHANGED: dict[str, int] = dict.fromkeys(
    (
        "evaluation", "chat_test", "chat_fresh", "preferences", "preference_samples", "scores", "spikes",
        "experts_by_phase", "eval_results", "order", "contamination", "clean_scores", "croissant", "detector",
        "sources", "licenses",
    ),
    4,
)  # fmt: skip
"""{part: the schema in which it last changed}. In an older card it is not compared. Parts are tables, by the names that
render.py gives them, and `metadata`, `eval_results`, `plots`, `croissant`, `attestations`, `goldens`, `scores`."""


def skipped(part: str, schema: int) -> str | None:
    """Why a part of a card of that schema, which this atom knows, is not compared; None if it is."""
    if schema < CHANGED.get(part, 0):
        return f"the card has schema {schema}, and this atom renders it as in schema {CHANGED[part]}"
    return None


def comparable(tables: Mapping[str, T], schema: int) -> tuple[dict[str, T], dict[str, str]]:
    """Of rendered tables, those that a card of that schema must hold; and those that are not compared, with reasons."""
    expected = {name: lines for name, lines in tables.items() if ADDED.get(name, 0) <= schema}
    reasons = {name: reason for name in expected if (reason := skipped(name, schema))}
    return {name: lines for name, lines in expected.items() if name not in reasons}, reasons
