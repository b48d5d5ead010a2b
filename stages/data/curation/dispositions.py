"""The disposition of every acquired document: kept, or removed by one rule. See docs/formats.md."""

from __future__ import annotations

from pipeline.core.errors import AtomError
from stages.data.curation.filtering import Removed
from stages.data.table import DispositionRow, DocumentRow


def kept_disposition(row: DocumentRow, kept_hash: str) -> DispositionRow:
    """Of an acquired document that passes filtering; deduplication decides on its split. Raises AtomError for a
    document without a license."""
    return {**_undecided(row), "disposition": "kept", "kept_hash": kept_hash}


def removed_disposition(row: DocumentRow, removed: Removed) -> DispositionRow:
    """Of an acquired document that a rule removed. Raises AtomError for a document without a license."""
    return {
        **_undecided(row),
        "disposition": "removed",
        "rule": removed.rule,
        "value": float(removed.value),
        "threshold": float(removed.threshold),
        "match": removed.match,
    }


def _undecided(row: DocumentRow) -> DispositionRow:
    if not row["license"]:
        raise AtomError(f"document {row['id']} has no license; acquire its source with a license")
    return {
        "id": row["id"],
        "source": row["source"],
        "license": row["license"],
        "content_hash": row["content_hash"],
        "bytes": len(row["text"].encode()),
        "disposition": "",
        "split": None,
        "rule": None,
        "value": None,
        "threshold": None,
        "duplicate_of": None,
        "match": None,
        "kept_hash": None,
    }
