"""Reads the files of `$ATOM_HOME`, which may be damaged: with bounds and types, and with one sentence for each damage.

A caller that needs the file lets `Damaged` pass: it is an AtomError. A caller that can continue without it uses
`read_optional` or `reporting`, so that every command names the file and continues.
"""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from pipeline.core.errors import AtomError
from pipeline.core.text import escaped

# Flags for reading a file without waiting for the writer of a pipe.
READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
# The largest accepted file, in bytes. A statement has some 50 kB, a manifest 150 bytes for each file.
LIMIT = 64 * 2**20


class Damaged(AtomError):
    """A damaged file of the home.

    Attributes:
        path: The file.
        why: The damage, in a few words.
    """

    def __init__(self, path: Path, why: str, advice: str = "") -> None:
        super().__init__(f"{printable(path)} is damaged ({why})" + (f"; {advice}" if advice else ""))
        self.path, self.why = path, why


class DamagedFile(UserWarning):
    """A damaged file that a command skipped."""


# `_reported` decides which warnings are repeated; Python's own filter would go by the line of the call.
warnings.simplefilter("always", DamagedFile)
_reported: set[str] = set()


def report(error: Damaged, consequence: str) -> None:
    """Warns of a damaged file and its consequence, once in a process."""
    note(f"{printable(error.path)} is damaged ({error.why}); {consequence}")


@contextmanager
def reporting(consequence: str) -> Iterator[None]:
    """Reports a damaged file that stops the block, and goes on after it."""
    try:
        yield
    except Damaged as error:
        report(error, consequence)


def note(text: str) -> None:
    """Warns once in a process of something that a command skipped."""
    if text not in _reported:
        _reported.add(text)
        warnings.warn(text, DamagedFile, stacklevel=3)


def printable(path: Path | str) -> str:
    """Returns a path as one line of plain text, for any bytes in its name."""
    return escaped(os.fsencode(path).decode("utf-8", "backslashreplace"))


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading. Raises FileNotFoundError if nothing has that name, else Damaged."""
    try:
        # READ does not wait for the writer of a pipe of that name.
        file = open(os.open(path, READ), "rb")  # noqa: SIM115 (the caller's)
    except FileNotFoundError:
        if path.is_symlink():
            raise Damaged(path, "it is a link that leads nowhere") from None
        raise
    except OSError as error:
        raise Damaged(path, str(error.strerror)) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Damaged(path, "it is no regular file")
    return file


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """Returns the content of a regular file of at most `limit` bytes. Raises FileNotFoundError or Damaged."""
    with open_file(path) as file:
        try:
            # Python allocates what is asked of a file, not what it holds: ask for its size, and one byte more.
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, limit) + 1)
            if size < len(data) <= limit:  # it grows, or is one of /proc
                data += file.read(limit + 1 - len(data))
        except OSError as error:
            raise Damaged(path, str(error.strerror)) from error
    if len(data) > limit:
        raise Damaged(path, f"it has more than {limit:,} bytes")
    return data


def read_text(path: Path, limit: int = LIMIT) -> str:
    """Returns the content of such a file as UTF-8. Raises FileNotFoundError or Damaged."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError:
        raise Damaged(path, "it is not text") from None


def read(path: Path, kind: TypeAdapter[Any], limit: int = LIMIT) -> Any:
    """Returns a JSON file whose value is of that type. Raises FileNotFoundError or Damaged."""
    return parse(read_bytes(path, limit), path, kind)


def read_optional(path: Path, kind: TypeAdapter[Any], consequence: str) -> Any:
    """Reads a JSON file that a caller can do without: None if it is missing, or damaged, which is reported."""
    with reporting(consequence):
        try:
            return read(path, kind)
        except FileNotFoundError:
            pass
    return None


def parse(data: bytes, path: Path, kind: TypeAdapter[Any], location: str = "") -> Any:
    """Returns JSON whose value is of that type.

    Args:
        data: The text, in UTF-8.
        path: The file that it is from, for messages.
        kind: The type of the value. Unknown fields stay.
        location: The place in the file, for messages.

    Raises:
        Damaged: It is no JSON, or of another type.
    """
    try:
        value = json.loads(data)
        # An escaped lone surrogate is valid JSON, and cannot be printed: encoding it raises.
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
        kind.validate_python(value, strict=True)
    except ValidationError as error:
        first_error = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first_error["loc"])
        problem = f"{field}: {first_error['msg']}" if field else first_error["msg"]
    except RecursionError:
        problem = "its brackets are nested too deeply"
    except UnicodeError:
        problem = "it is not text"
    except ValueError as error:
        problem = "it is empty" if not data.strip() else f"it is no JSON: {error}"
    else:
        return value
    raise Damaged(path, f"{location}{printable(problem)}")


def names(folder: Path) -> list[str]:
    """Returns the sorted names in a folder; none if it is missing. Raises Damaged if it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        if folder.is_symlink():
            raise Damaged(folder, "it is a link that leads nowhere") from None
        return []
    except OSError as error:
        raise Damaged(folder, str(error.strerror)) from error
