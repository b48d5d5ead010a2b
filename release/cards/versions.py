"""Versions of the cards, and from which of them on a part of a card is as it is rendered today.

A published card is compared with today's parts as far as its own version had them. What is added to a card, or is
rendered otherwise than before, gets the number of the next schema: a table in its line of `card_tables.py`, any other
part in PARTS. Then cards that are out in the world stay right: verification demands nothing that came later, and says
what it did not compare.
"""

from __future__ import annotations

SCHEMA = 4
"""4: the phases that learn from preferences have other names.
3: cards state their versions, and open with what the figures do not flatter."""
ESCAPED = 3
"""The schema from which on characters that no text has are escaped in what a model wrote."""
FIGURES: dict[str, int] = {}
"""{figure of a scores.json, with dots between names: the schema that brought it}. Older files may lack it."""
PARTS = {"metadata": 2, "plots": 2, "eval_results": 4, "croissant": 4, "attestations": 2}
"""{part that is no table: the schema in which it last changed}. In an older card it is not compared."""


def skip_reason(changed: int, schema: int) -> str:
    """Why a part of a card of a schema, which this atom knows, is not compared, where it last changed in the schema
    `changed`; "" if it is."""
    if schema < changed:
        return f"the card has schema {schema}, and this atom renders it as in schema {changed}"
    return ""
