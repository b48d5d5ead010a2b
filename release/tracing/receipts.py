"""Receipts of opt-outs, one file for each request: what was removed.

A receipt is a tombstone: it holds the hash of the request's reference, and no text, address or name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from release.facts.document_facts import OptOut, removed_documents
from release.facts.published_tables import read_json
from release.layout import OPT_OUTS
from release.schema import ReleaseInfo
from stages.data.curate.deny_list import OPT_OUT_RULE

SCHEMA = 1
MOST_LISTED = 1_000
"""The maximum number of documents of a request that a receipt lists."""


class Receipt(TypedDict):
    """The receipt of one request."""

    schema: int
    """1"""
    request: str
    """SHA-256 of the reference of the request"""
    date: str
    """day of the request"""
    release: dict[str, str]
    """`name` and `version` of this release"""
    deny_list: str
    """digest of the deny-list"""
    entries: dict[str, int]
    """number of its lines by kind"""
    rule: str
    """`opt_out`"""
    removed: dict[str, int]
    """number of removed documents by how they were found"""
    documents: list[dict[str, Any]]
    """the first 1,000: `id`, `source`, `found`, `duplicate_of`, `content_hash`"""


def write_receipts(dataset: Path, release: ReleaseInfo, opt_outs: Sequence[OptOut]) -> Iterator[tuple[str, Receipt]]:
    """Yields (request, receipt) of each request of a dataset folder."""
    documents: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in removed_documents(dataset) if opt_outs else ():
        requests = row.pop("requests")
        for request in requests:
            # A request for a whole site may name millions of documents.
            if len(documents[request]) < MOST_LISTED:
                documents[request].append({key: value for key, value in row.items() if key != "rule"})
    for opt_out in opt_outs:
        yield (
            opt_out.request,
            {
                "schema": SCHEMA,
                "request": opt_out.request,
                "date": opt_out.date,
                "release": {"name": release.name, "version": release.version},
                "deny_list": read_json(dataset / OPT_OUTS)["deny_list"],
                "entries": opt_out.entries,
                "rule": OPT_OUT_RULE,
                "removed": dict(sorted(opt_out.removed.items())),
                "documents": documents[opt_out.request],
            },
        )


def receipt_path(request: str) -> str:
    """Returns the path of the receipt of a request in a release."""
    return f"evidence/opt_out/{request}.json"


def receipts_below(release: Path) -> Iterable[Path]:
    return sorted((release / "evidence/opt_out").glob("*.json"))
