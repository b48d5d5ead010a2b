"""Held-out documents for evaluation, drawn by a fixed lottery: those with the smallest content hashes.

Two passes: the first one reads no texts, the second one only the row groups with drawn documents. Memory holds the
drawn documents alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypedDict

from pipeline.core.errors import AtomError
from stages.formats.table import part_files, rows_at, sources_of, stream_batches

MOST_DOCUMENTS = 100_000
MOST_BYTES = 2**27
"""Bounds of the held-out text for long contexts."""


class HeldoutDocument(TypedDict):
    """The columns that are read of a curated document."""

    id: str
    text: str
    source: str
    content_hash: str
    split: str
    prompt_chars: int


Ticket = tuple[str, str, Path, int]
"""content hash, id, file and row of a held-out document."""


def heldout_documents(folder: Path, limit: int) -> list[HeldoutDocument]:
    """Up to `limit` held-out documents of every source, by source and id. folder: of the kept documents.

    Raises AtomError if a source has a single one, or if there are none.
    """
    documents: list[HeldoutDocument] = []
    for source in sources_of(folder):
        drawn = heapq.nsmallest(limit, _tickets(part_files(folder, source)))
        if len(drawn) == 1:  # none: some sources have no held-out split, such as problems
            raise AtomError(f"evaluate: source {source} has 1 held-out document, two are needed for an error bar")
        documents += sorted(_read(drawn), key=lambda row: row["id"])
    if not documents:
        raise AtomError("evaluate: the curated corpus has no held-out document")
    return documents


def heldout_texts(folder: Path) -> list[HeldoutDocument]:
    """The held-out documents without a prompt of all sources, in the order of the lottery, up to MOST_DOCUMENTS and
    until their texts have MOST_BYTES."""
    tickets = (
        ticket for source in sources_of(folder) for ticket in _tickets(part_files(folder, source), prompts=False)
    )
    drawn = heapq.nsmallest(MOST_DOCUMENTS, tickets)
    places = {ticket[1]: place for place, ticket in enumerate(drawn)}
    chosen: list[tuple[int, int, HeldoutDocument]] = []  # (minus the place, bytes, document), the last place first
    size = 0
    for document in _read(drawn):
        length = len(document["text"].encode())
        heapq.heappush(chosen, (-places[document["id"]], length, document))
        size += length
        while size - chosen[0][1] >= MOST_BYTES:
            size -= heapq.heappop(chosen)[1]
    return [document for _, _, document in sorted(chosen, key=lambda entry: -entry[0])]


def _tickets(files: Sequence[Path], prompts: bool = True) -> Iterator[Ticket]:
    """Every held-out document of some files. prompts: also those that begin with a prompt."""
    import pyarrow.compute as pc

    for path in files:
        first = 0
        for batch in stream_batches(path, ["id", "content_hash", "split", "prompt_chars"]):
            mask = pc.equal(batch["split"], "heldout")
            if not prompts:
                mask = pc.and_(mask, pc.equal(batch["prompt_chars"], 0))
            numbers = pc.indices_nonzero(mask)
            for number, row in zip(numbers.to_pylist(), batch.take(numbers).to_pylist(), strict=True):
                yield row["content_hash"], row["id"], path, first + number
            first += batch.num_rows


def _read(tickets: Iterable[Ticket]) -> Iterator[HeldoutDocument]:
    """The documents of the tickets, in the order of files and rows."""
    columns = list(HeldoutDocument.__annotations__)
    for path, drawn in groupby(sorted(tickets, key=lambda ticket: ticket[2:]), key=lambda ticket: ticket[2]):
        yield from rows_at(path, [ticket[3] for ticket in drawn], columns)
