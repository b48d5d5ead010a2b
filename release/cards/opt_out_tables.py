"""The data card's table about opt-outs."""

from __future__ import annotations

from pipeline.core.text import escaped
from release.assembly.data_facts import DataFacts
from release.cards.tables import count, table

KINDS = ("id", "content_hash", "url", "host", "copy", "near_duplicate", "derived")
SENTENCE = (
    "Documents that were left out because somebody asked for it, by the SHA-256 of the reference of each request; a "
    "document of several requests counts for each. Copies, near duplicates and rewrites of a document are those of its "
    "request. The receipt of a request is in the evidence repository."
)


def opt_outs(data: DataFacts) -> list[str]:
    """One row for each request; none for a corpus without a deny-list."""
    if not data.opt_outs:
        return []
    body = []
    for row in data.opt_outs:
        named = sum(number for kind, number in row.removed.items() if kind not in KINDS[4:])
        others = [count(row.removed[kind]) for kind in KINDS[4:]]
        body.append([f"`{escaped(row.request[:16])}`", escaped(row.date), count(named), *others])
    head = ["request", "date", "named", "copies", "near duplicates", "rewrites"]
    return [SENTENCE, "", *table(head, body)]
