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
    """Yields the path of a draft, which replaces `path` if the block ends without an error.

    After an error in the block the draft is removed, and `path` is as it was.

    Args:
        path: The file to replace.
        durable: Both the content and the name are on disk at the end, so that a crash of the machine leaves neither an
            empty file nor the old one.

    Raises:
        OSError: The draft cannot be moved or flushed.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield draft
        if durable:
            flush(draft)
        os.replace(draft, path)
        if durable:
            # The new name is an entry of the folder, which is flushed by itself.
            flush(path.parent)
    except OSError as error:
        if str(error.filename) == str(draft):
            error.filename = str(path)  # so messages do not differ each time
        raise
    finally:
        # After a rename nothing has this name, so only the draft of a failed block is removed.
        draft.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file or the entries of a folder are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Writes a file through a draft; text in UTF-8. Raises OSError."""
    with replacing(path, durable) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
