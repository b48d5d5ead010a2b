"""Zstandard files, of one or several frames. The library's own reader takes a file that is cut short as whole."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

# Bytes of memory that a frame may ask for: `zstd --ultra --long=31`, as some large corpora are packed.
MAX_WINDOW = 2**31
# Bytes of input at a time: a block of 4 bytes can hold 128 KiB, so a piece of output has at most 128 MiB.
CHUNK = 2**12


def open_zstd(path: Path) -> IO[bytes]:
    """Returns the decompressed bytes of a file.

    Reading raises EOFError if it is cut short, and OSError if it is corrupt.
    """
    return decompressed(open(path, "rb"))


def decompressed(file: IO[bytes]) -> IO[bytes]:
    """Returns the decompressed bytes of an open file, which is closed with the result.

    Errors are those of `open_zstd`.
    """
    return cast(IO[bytes], io.BufferedReader(_Decompressed(file), 2**20))


class _Decompressed(io.RawIOBase):
    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._chunks, self._rest = file, _decompress(file), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = next(self._chunks, b"")
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _decompress(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the decompressed bytes in pieces that are not empty."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    frame = None
    try:
        while data := file.read(CHUNK):
            # A file may have several frames, as parallel compressors and concatenation write them.
            while data:
                frame = frame or decompressor.decompressobj()
                if piece := frame.decompress(data):
                    yield piece
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None
    # An open frame at the end of the file is a file that was cut short.
    if frame is not None:
        raise EOFError("the last frame does not end")
