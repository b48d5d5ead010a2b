"""The documents that `atom retract` is given: deny-lists, and ids with the reference of their request."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.core.errors import AtomError
from stages.data.curate.deny_list import DENY_LIST, DenyList


def deny_list_of(documents: Sequence[str], request: str | None, date: str | None) -> DenyList:
    """documents: files of deny-lists, or ids. Raises AtomError for an id without a reference."""
    return DenyList(_lines(documents, request, date))


def _lines(documents: Sequence[str], request: str | None, date: str | None) -> Iterator[tuple[str, bytes]]:
    for document in documents:
        if Path(document).is_file():
            yield from DENY_LIST.lines(Path(document))
        elif request is None:
            raise AtomError(
                f"there is no deny-list {document}; if that is the id of a document, give --request with the reference "
                "of the request"
            )
        else:
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            entry = {"request": request, "date": date or today, "id": document}
            yield f"--documents {document}", json.dumps(entry).encode()
