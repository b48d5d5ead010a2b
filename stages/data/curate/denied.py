"""Documents that filtering removes on request, and what deduplication needs to find their copies: hashes, no text.

A copy in another source is edited by the steps of that source. So the hashes are those of the text as acquired, and of
the text as the steps of each source would leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from stages.data.curate.deny_list import OPT_OUT_RULE, Denial, DenyList
from stages.data.curate.filters.base import FilterFunction
from stages.data.curate.source_filter import Removed, to_document
from stages.formats.table import DERIVED, DocumentRow, hash_columns, row_writer, stream_rows

# The folders of the artifact of filter with the denied documents, and with the parents of kept ones, by part. They
# are there only for a recipe with a deny-list.
DENIED, PARENTS = "denied", "derived"
# row: of the document in the table of kept ones.
PARENT_COLUMNS = {"row": "int64", "parent": "string"}
# A text of a denied document: its id, the SHA-256 of each reference with spaces between them, its origin, and the text
# as acquired or as the steps of a source leave it.
DeniedText = tuple[str, str, str, str]
# Returns the text of a document and its variants.
TextsOf = Callable[[DocumentRow], list[str]]


def denied_columns(buckets: int) -> dict[str, str]:
    """Returns the columns of the table with a row for each text of a denied document.

    `requests` holds the SHA-256 of each reference, and `url` the origin of the document. The hashes follow, one for
    each of the MinHash buckets.
    """
    return {"id": "string", "requests": "string", "url": "string", **hash_columns(buckets)}


def removed_on_request(denial: Denial) -> Removed:
    return Removed(OPT_OUT_RULE, 1.0, 1.0, denial.match)


def variants_of(row: DocumentRow, pipelines: Sequence[Sequence[FilterFunction]]) -> list[str]:
    """Returns the text of a document and the texts that it has after the steps of any source, without repetitions.

    A source whose steps remove it, or fail, has none.
    """
    edited = (_edit(pipeline, row) for pipeline in pipelines)
    return list(dict.fromkeys([row["text"], *(variant for variant in edited if variant is not None)]))


def _edit(pipeline: Sequence[FilterFunction], row: DocumentRow) -> str | None:
    """Returns the text after all steps; None if one removes it or raises an exception, which removes it as well."""
    document = to_document(row)
    try:
        for function in pipeline:
            edited = function(document)
            if not isinstance(edited, str):
                return None
            document.text = edited
    except (AtomError, MemoryError, OSError):
        raise
    except Exception:
        return None
    return str(document.text)


class PartOptOut:
    """The opt-outs of one part of a source: finds them, and writes what deduplication needs.

    `texts` are those of the documents that were denied and are not written yet.
    """

    def __init__(self, stack: ExitStack, deny_list: DenyList, variants: TextsOf, acquired_parents: Path) -> None:
        """Opens the part's table of parents, `acquired_parents`, which may be missing."""
        self.stack, self.deny_list, self.variants = stack, deny_list, variants
        self.states_parents = acquired_parents.exists()
        self.rows = stream_rows(acquired_parents, list(DERIVED)) if self.states_parents else iter(())
        self.next_row: Any = next(self.rows, None)
        self.parents: list[str] = []
        self.texts: list[DeniedText] = []

    def open(self, denied: Path, parents: Path, columns: dict[str, str]) -> None:
        """Opens the tables to write."""
        self.write_denied = self.stack.enter_context(row_writer(denied, columns))
        if self.states_parents:
            self.write_parent = self.stack.enter_context(row_writer(parents, PARENT_COLUMNS))

    def find(self, row: DocumentRow) -> Removed | None:
        """Returns the removal of the next acquired document, if it is denied."""
        self.parents = []
        # The table of parents has the order of the documents, so one pass over both is enough.
        while self.next_row is not None and self.next_row["id"] == row["id"]:
            self.parents.append(self.next_row["parent"])
            self.next_row = next(self.rows, None)
        denial = self.deny_list.find(row["id"], row["origin"], [row["content_hash"]], self.parents)
        return None if denial is None else self._deny(row, denial)

    def find_edited(self, row: DocumentRow, edited: DocumentRow, number: int) -> Removed | None:
        """Returns the removal of a document that passes the steps, if the hash of its edited text is denied.

        Otherwise its parents are written. `number` is the number of its row among the kept ones.
        """
        denial = self.deny_list.find("", "", [edited["content_hash"]])
        if denial is not None:
            return self._deny(row, denial)
        for parent in self.parents:
            self.write_parent({"row": number, "parent": parent})
        return None

    def find_failed(self, row: DocumentRow) -> Removed | None:
        """Returns the removal of a document that could not be read, if its id is denied."""
        denial = self.deny_list.find(row["id"], "", ())
        return None if denial is None else removed_on_request(denial)

    def _deny(self, row: DocumentRow, denial: Denial) -> Removed:
        requests = " ".join(denial.requests)
        self.texts += [(row["id"], requests, row["origin"], text) for text in self.variants(row)]
        return removed_on_request(denial)
