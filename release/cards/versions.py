"""Versions of the cards, and the version in which each part last changed.

A published card is compared only with the parts of its own version. A new or changed part has the number of the next
schema: a table in its line of `card_tables.py`, any other part in PARTS. Published cards then stay valid: verification
does not require later parts, and reports the parts that it skips.
"""

from __future__ import annotations

SCHEMA = 7
"""7: plots name the version of matplotlib, the attestation of the gates names the code and the settings of the build,
and the card has an answer that a reader can draw again. 6: tasks in long texts, the ladder of a prediction on the
page, the composition of the data, example documents, the field's words for settings. 5: in the order of a reader,
with further plots; no table twice in a release, and none wider than the Hub's column. 4: the phases that learn from
preferences have other names. 3: cards state their versions, and start with caveats."""
ESCAPED = 3
"""The schema that introduced the escaping of unprintable characters in model output."""
FIGURES: dict[str, int] = {}
"""{figure of a scores.json, with dots between names: the schema that added it}. Older files may lack it."""
PARTS = {
    "metadata": 2,
    "sources": 2,
    "plots": 7,
    "eval_results": 4,
    "croissant": 4,
    "attestations": 7,
    "gates": 7,
    "standards": 7,
    "page": 7,
    "origins": 7,
    "tool_files": 7,
    "words": 7,
}
"""{part other than a table: the schema in which it last changed}. In an older card it is not compared."""
SOURCES = {
    "page": (7, "8f8df8971079456d9ebcb334124d198ef539478e825f280408767aa78c9492f4"),
    "words": (7, "935bd182455918d070df223688f9fcf07b26e24eb61eba012001520e17426c71"),
    "tool_files": (7, "4380a605675ae957041bb59950a618064fd69d3d6582fcb6f423d8c78fe96424"),
}
"""{part: (its number in PARTS, the digest with that number of what writes it)}, by `tests/unit/test_versions.py`: a
change of the page, of the words of the cards or of the tool's files fails that test until somebody has decided whether
the number must rise."""


def skip_reason(changed: int, schema: int) -> str:
    """The reason why a part that last changed in the schema `changed` is not compared for a card of another known
    schema; "" if it is compared."""
    if schema < changed:
        return f"the card has schema {schema}, and this atom renders it as in schema {changed}"
    return ""
