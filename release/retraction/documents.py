"""The documents of a release that a deny-list reaches, with their texts: named ones, copies and near duplicates.

A release holds no provenance of rewrites, so a document that was made from a denied one is not found here unless its
text is equal or it was recognized as a near duplicate; name it in the deny-list.
"""

from __future__ import annotations

import datetime
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import AtomError
from release.facts.published_tables import stream_rows
from release.tracing.documents import find_documents
from release.tracing.release_data import ReleaseData
from stages.data.curate import deny_list
from stages.data.curate.deny_list import DenyList


def deny_list_of(documents: Sequence[str], request: str | None, date: str | None) -> DenyList:
    """Returns the deny-list that a command names.

    Args:
        documents: Files of deny-lists, or ids of documents.
        request: The reference of the request for the ids.
        date: Its date; today by default.

    Raises:
        AtomError: For an id without a reference.
    """
    return DenyList(_lines(documents, request, date))


def _lines(documents: Sequence[str], request: str | None, date: str | None) -> Iterator[tuple[str, bytes]]:
    for document in documents:
        if Path(document).is_file():
            yield from deny_list.lines(Path(document))
        elif request is None:
            raise AtomError(
                f"there is no deny-list {document}; if that is the id of a document, give --request with the reference "
                "of the request"
            )
        else:
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            entry = {"request": request, "date": date or today, "id": document}
            yield f"--documents {document}", json.dumps(entry).encode()


# Columns of the dispositions by which documents are found.
COLUMNS = ["id", "content_hash", "kept_hash", "duplicate_of", "disposition", "rule"]


@dataclass
class Reached:
    """The documents that a deny-list reaches.

    Attributes:
        kinds: {id: how it was found}.
        requests: {id: SHA-256 of the references of its requests}.
        texts: The texts of the kept documents.
        models: The models that were trained on one.
        checkpoints: The checkpoints that were trained on one.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    requests: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    texts: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    checkpoints: set[str] = field(default_factory=set)

    def add(self, id: str, kind: str, requests: set[str] | tuple[str, ...]) -> bool:
        """Adds a document. Returns True if the document or one of its requests is new."""
        is_new = id not in self.kinds or not set(requests) <= self.requests[id]
        self.kinds.setdefault(id, kind)
        self.requests[id].update(requests)
        return is_new


def find_reached(release: Path, deny_list: DenyList) -> Reached:
    """Returns the kept documents that a deny-list reaches, and the models and checkpoints trained on them."""
    data, reached = ReleaseData.locate(release), Reached()
    _find_named(data, deny_list, reached)
    # A copy may have copies and near duplicates of its own.
    while _find_related(data, reached):
        pass

    # Removed documents lead to kept ones, and have no text in the release.
    kept = {row["id"] for row in _rows(data) if row["disposition"] == "kept" and row["id"] in reached.kinds}
    reached.kinds = {id: kind for id, kind in reached.kinds.items() if id in kept}
    for row in stream_rows(data.kept(), ["id", "text"]):
        if row["id"] in kept and row["text"] is not None:
            reached.texts.add(row["text"])
    for document in find_documents(data, sorted(kept)).values():
        reached.models |= set(document.models)
        reached.checkpoints |= set(document.checkpoints or ())
    return reached


def _rows(data: ReleaseData) -> Iterator[dict[str, str]]:
    return stream_rows(data.dispositions(), COLUMNS)


def _find_named(data: ReleaseData, deny_list: DenyList, reached: Reached) -> None:
    # Dispositions have the hashes and no origins, kept documents the origins.
    for row in _rows(data):
        if denial := deny_list.find(row["id"], "", [row["content_hash"], row["kept_hash"] or ""]):
            reached.add(row["id"], denial.kind, denial.requests)
    for row in stream_rows(data.kept(), ["id", "origin"]):
        if denial := deny_list.find("", row["origin"], ()):
            reached.add(row["id"], denial.kind, denial.requests)


def _find_related(data: ReleaseData, reached: Reached) -> bool:
    """Adds the documents with the text of a reached one, and those that it duplicates. Returns True if one is new."""
    by_hash: dict[str, set[str]] = defaultdict(set)
    for row in _rows(data):
        if row["id"] in reached.kinds:
            for digest in (row["content_hash"], row["kept_hash"]):
                if digest:
                    by_hash[digest] |= reached.requests[row["id"]]
    grew = False
    for row in _rows(data):
        for digest in (row["content_hash"], row["kept_hash"]):
            if digest in by_hash:
                grew |= reached.add(row["id"], "copy", by_hash[digest])
        if row["id"] in reached.kinds and row["duplicate_of"] and row["rule"] != "opt_out":
            kind = "copy" if row["rule"] == "exact_duplicate" else "near_duplicate"
            grew |= reached.add(row["duplicate_of"], kind, reached.requests[row["id"]])
    return grew
