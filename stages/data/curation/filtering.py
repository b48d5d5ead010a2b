"""Filtering: the steps of a source, then decontamination, on a shard of its documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NotRequired, TypedDict

from pipeline.core.errors import AtomError
from stages.data.curation.decontamination import ContaminationIndex
from stages.data.filters.base import Filter, Removal
from stages.data.table import DocumentRow


class RemovedDocument(TypedDict):
    """The rule that removed a document; `match`: the evaluation item that occurs in it."""

    id: str
    rule: str
    value: float
    threshold: float
    match: NotRequired[str]


class FilterResults(TypedDict):
    """kept: (id, text) of each document that passes; edits: documents that each step edited, by step."""

    kept: list[tuple[str, str]]
    removed: list[RemovedDocument]
    edits: dict[str, int]


def filter_documents(
    source: str, steps: Sequence[Filter], rows: Sequence[DocumentRow], index: ContaminationIndex
) -> FilterResults:
    """Sends every document through the steps in order and through decontamination, until one removes it.

    Raises AtomError if a step returns neither a text nor a removal.
    """
    functions = [(step.step, step.function()) for step in steps]
    edits = Counter[str]()
    kept: list[tuple[str, str]] = []
    removed: list[RemovedDocument] = []
    for row in rows:
        id, text = row["id"], row["text"]
        for step, function in functions:
            result = function(text)
            if isinstance(result, Removal):
                rule = f"{step}/{result.reason}"
                removed.append({"id": id, "rule": rule, "value": result.value, "threshold": result.threshold})
                break
            if not isinstance(result, str):
                raise AtomError(
                    f"source {source}: step {step} returned {result!r} for document {id}; a filter returns the text or "
                    "a Removal"
                )
            edits[step] += result != text
            text = result
        else:
            match = index.find(text)
            if match is None:
                kept.append((id, text))
                continue
            item, words = match
            removal: RemovedDocument = {"id": id, "rule": "decontamination", "value": words, "threshold": index.ngram}
            removed.append({**removal, "match": item})
    return {"kept": kept, "removed": removed, "edits": dict(+edits)}
