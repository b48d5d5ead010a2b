"""Files that are replaced as a whole: a reader sees the old content or the new one, whatever happens meanwhile.

A draft has a name of its own, since processes of two nodes can share an id. A killed process leaves it, hidden, beside
the file; nothing reads it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """The path of a draft, which takes the place of `path` when the block ends without an error, and is removed
    otherwise. durable: the draft is on disk before, so that a crash of the machine leaves no empty file. Raises
    OSError."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield draft
        if durable:
            with open(draft, "rb") as file:
                os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        if str(error.filename) == str(draft):
            error.filename = str(path)  # so messages do not differ each time
        raise
    finally:
        draft.unlink(missing_ok=True)


def write(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Writes a file through a draft; text in UTF-8. Raises OSError."""
    with replacing(path, durable) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
