"""Bytes by bin, in memory up to a limit and then in files, for data that is too large for one process."""

from __future__ import annotations

from pathlib import Path

LIMIT = 16 << 20
"""Bytes in memory."""


class Spill:
    """folder: an existing one for the files, which belongs to this object alone."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self.buffers: dict[int, bytearray] = {}
        self.size = 0

    def add(self, number: int, data: bytes) -> None:
        """Appends data to a bin."""
        self.buffers.setdefault(number, bytearray()).extend(data)
        self.size += len(data)
        if self.size > self.limit:
            for each, buffer in self.buffers.items():
                with (self.folder / str(each)).open("ab") as file:
                    file.write(buffer)
            self.buffers, self.size = {}, 0

    def take(self, number: int) -> bytes:
        """All data of a bin, in the order in which it was added; the bin is then empty."""
        path = self.folder / str(number)
        data = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        buffer = self.buffers.pop(number, bytearray())
        self.size -= len(buffer)
        return data + bytes(buffer)
