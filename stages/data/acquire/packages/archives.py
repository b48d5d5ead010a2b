"""The regular files of a package, a .deb or a .tar.gz, read as a stream.

A .deb is an ar archive with a tar archive in it: deb(5). Nothing is extracted, no link is followed, and memory holds
one member of at most MAX_MEMBER bytes.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.core.text import escaped
from stages.data.acquire.readers.row_files import decompressed

# Bytes of a member that is read. The longest texts of Debian's manuals have some 4 MB.
MAX_MEMBER = 2**24
# Bytes that a package unpacks to. The largest manual of Debian 13, vtk9-doc, has 2.4 GB.
MAX_UNPACKED = 2**34
MAX_MEMBERS = 1_000_000
AR_MAGIC, AR_HEADER = b"!<arch>\n", 60
# What the decoders raise on an archive that is cut short or corrupt.
CORRUPT = (EOFError, OSError, lzma.LZMAError, tarfile.TarError, zlib.error, ValueError, OverflowError, RecursionError)


class ArchiveError(Exception):
    """A package that cannot be read to its end: the message says why, in a few words."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of a package.

    Attributes:
        path: From the root of the package, without `./`.
        content: The bytes; None with a problem.
        problem: The reason why there is no content, in words.
    """

    path: str
    content: bytes | None
    problem: str = ""


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """Yields the regular files whose path is wanted, in the order of the archive.

    A file that must not or cannot be read has a problem in place of its content. Raises ArchiveError after the last
    readable member if the archive is corrupt or too large.
    """
    with ExitStack() as stack:
        try:
            stream = _Forward(_unpacked(path, stack))
            tar = stack.enter_context(tarfile.open(fileobj=cast(BinaryIO, stream), mode="r:"))
        except CORRUPT as error:
            raise ArchiveError(f"it is no package, or cut short ({_words(error)})") from None
        for _ in range(MAX_MEMBERS):
            try:
                entry = tar.next()
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every member
                if entry is None:
                    return
                if stream.tell() + entry.size > MAX_UNPACKED:
                    raise ArchiveError(f"it unpacks to more than {MAX_UNPACKED} bytes")
                member = _member(tar, entry) if entry.isreg() and wanted(_normalized(entry.name)) else None
            except CORRUPT as error:
                raise ArchiveError(f"it is cut short or corrupt ({_words(error)})") from None
            if member:
                yield member
    raise ArchiveError(f"it has more than {MAX_MEMBERS} members")


def _member(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> Member:
    path = _normalized(entry.name)
    # Nothing is extracted, but the path is published as part of an id.
    if path.startswith("/") or ".." in path.split("/"):
        return Member(path, None, "its path leaves the package")
    if entry.size > MAX_MEMBER or entry.issparse():
        return Member(path, None, f"it has {entry.size} bytes; at most {MAX_MEMBER} are read")
    file = tar.extractfile(entry)
    content = file.read() if file else b""
    # tarfile returns what is there without an error.
    if len(content) < entry.size:
        raise EOFError("unexpected end of data")
    return Member(path, content)


def _normalized(name: str) -> str:
    """Returns a member's name without empty folders and `.`.

    Bytes that are not UTF-8 and control characters are escaped.
    """
    root = "/" if name.startswith("/") else ""
    path = root + "/".join(part for part in name.split("/") if part not in ("", "."))
    return escaped(path.encode(errors="backslashreplace").decode(), 4096)


def gunzip(content: bytes) -> bytes:
    """Returns the content of a gzip member of a package.

    Raises ArchiveError if it is corrupt, or longer than MAX_MEMBER.
    """
    decoder = zlib.decompressobj(wbits=31)
    try:
        text = decoder.decompress(content, MAX_MEMBER + 1)
    except zlib.error as error:
        raise ArchiveError(f"it is not gzip ({error})") from None
    if len(text) > MAX_MEMBER:
        raise ArchiveError(f"it unpacks to more than {MAX_MEMBER} bytes")
    # zlib gives what it has of a stream without its end.
    if not decoder.eof:
        raise ArchiveError("its gzip stream is cut short")
    return text


def _unpacked(path: Path, stack: ExitStack) -> BinaryIO:
    """Returns the tar archive of a package, decompressed as it is read."""
    file = stack.enter_context(path.open("rb"))
    if not path.name.endswith(".deb"):
        return cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file)))
    name, part = _data_archive(file)
    # Debian packs with xz, and Ubuntu with Zstandard.
    if name == "data.tar.xz":
        return cast(BinaryIO, stack.enter_context(lzma.LZMAFile(part)))
    if name == "data.tar.zst":
        return cast(BinaryIO, stack.enter_context(decompressed(part)))
    raise ValueError(f"{name} has an unknown compression")


def _data_archive(file: BinaryIO) -> tuple[str, BinaryIO]:
    """Returns the name and the bytes of the member `data.tar*` of an ar archive."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise ValueError("it does not begin as an ar archive")
    end = os.fstat(file.fileno()).st_size
    while len(header := file.read(AR_HEADER)) == AR_HEADER and header[58:] == b"`\n":
        name, size = header[:16].decode("latin-1").rstrip(" /"), int(header[48:58])
        start = file.tell()
        if size < 0 or start + size > end:
            raise EOFError(f"{escaped(name, 20)} is cut short")
        if name.startswith("data.tar"):
            return name, cast(BinaryIO, io.BufferedReader(_Slice(file, size)))
        # Members of an ar archive begin at even offsets.
        file.seek(start + size + size % 2)
    raise ValueError("it has no data.tar")


class _Slice(io.RawIOBase):
    """The next `size` bytes of a file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        content = self._file.read(min(len(buffer), self._left))
        self._left -= len(content)
        buffer[: len(content)] = content
        return len(content)


class _Forward(io.RawIOBase):
    """A stream that tarfile can seek in, forward only.

    A read of more than a header or a member may have is refused: tarfile reads the extended headers of an archive
    as a whole, however long they say that they are.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._position = file, 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_MEMBER + tarfile.BLOCKSIZE:
            raise ValueError(f"a header of {size} bytes")
        content = b""
        while len(content) < size and (block := self._file.read(size - len(content))):
            content += block
        self._position += len(content)
        return content

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        while self._position < position and self.read(min(position - self._position, 2**20)):
            pass
        if whence != os.SEEK_SET or self._position != position:
            raise EOFError("unexpected end of data")
        return position


def _words(error: BaseException) -> str:
    return escaped(" ".join(str(error).split()), 200) or type(error).__name__
