"""Versions of the cards, and the version in which each part last changed.

A published card is compared only with the parts of its own version. A new or changed part has the number of the next
schema: a table in its line of `card_tables.py`, any other part in PARTS. Published cards then stay valid: verification
does not require later parts, and reports the parts that it skips.
"""

from __future__ import annotations

SCHEMA = 7
"""7: an answer that a reader can draw again. 6: tasks in long texts, the ladder of a prediction on the page, the
composition of the data, example documents, the field's words for settings. 5: in the order of a reader, with
further plots; no table twice in a release, and none wider than the Hub's column. 4: the phases that learn from
preferences have other names. 3: cards state their versions, and start with caveats."""
ESCAPED = 3
"""The schema that introduced the escaping of unprintable characters in model output."""
FIGURES: dict[str, int] = {}
"""{figure of a scores.json, with dots between names: the schema that added it}. Older files may lack it."""
PARTS = {"metadata": 2, "plots": 2, "eval_results": 4, "croissant": 4, "attestations": 2, "standards": 7, "page": 6}
"""{part other than a table: the schema in which it last changed}. In an older card it is not compared."""
PAGE_SOURCES = 6, "5a98ab1e72a842e7828d4add16008541e4486c6ee60936a113f89756bf1f4935"
"""The number of "page" in PARTS, and the digest of release/web_page with that number, by `tests/unit/test_web_page.py`:
a change of the page fails that test until somebody has decided whether the number must rise."""


def skip_reason(changed: int, schema: int) -> str:
    """The reason why a part that last changed in the schema `changed` is not compared for a card of another known
    schema; "" if it is compared."""
    if schema < changed:
        return f"the card has schema {schema}, and this atom renders it as in schema {changed}"
    return ""
