"""Megatron shards: `<prefix>.bin` holds the tokens of a sequence of documents, `<prefix>.idx` the place of each.

Megatron's reader ends in an assertion or in wrong tokens if a shard is damaged. So the whole index is checked when it
is written (`check_shard`), and what a glance shows whenever it is opened (`check_sizes`).
"""

from __future__ import annotations

import struct
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import AtomError
from pipeline.core.parts import part_file, part_number, part_tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
# Bytes a token, by Megatron's codes of data types.
_BYTES_A_TOKEN = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
_CODES = {2: 8, 4: 4}  # uint16 and int32, by bytes a token
_ENTRIES = 1 << 18  # of an index that are in memory at a time
_BUFFER = 1 << 20  # bytes of tokens that are written at a time


def shard_name(split: str, source: str, part: int) -> str:
    """Returns the path, without suffix, of the shard of a part in a folder of token shards."""
    return f"{split}/{source}/{part_file(part, '')}"


def document_files(tokens: Path) -> dict[str, list[tuple[int, Path]]]:
    """Returns {source: (part, table of its documents) of each part}, in order.

    `tokens` is the tokenize artifact, or its published copy.
    """
    folders = sorted(path for path in (tokens / "documents").glob("*") if path.is_dir())
    parts = {path.name: [(int(part_number(file) or 0), file) for file in part_tables(path)] for path in folders}
    return {source: files for source, files in parts.items() if files}


class ShardWriter:
    """Writes a shard document by document; in memory are 4 bytes for each, and about a megabyte of tokens.

    No file is open between calls. The bytes are those of Megatron's and datatrove's writers.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        # two bytes a token up to 65,536 ids, as datatrove writes; the index states the width
        self.width = 2 if vocab_size <= 65_536 else 4
        self.dtype = "<u2" if self.width == 2 else "<i4"
        self.prefix, self.lengths, self.tokens = prefix, array("i"), 0
        self.buffer = bytearray()
        prefix.parent.mkdir(parents=True, exist_ok=True)
        # The file is emptied, since tokens are appended to what an earlier attempt may have left.
        _with_suffix(prefix, ".bin").write_bytes(b"")

    def add(self, ids: NDArray[Any]) -> None:
        self.buffer += ids.astype(self.dtype).tobytes()
        self.lengths.append(len(ids))
        self.tokens += len(ids)
        if len(self.buffer) >= _BUFFER:
            self._flush()

    def close(self) -> None:
        """Completes both files."""
        import numpy as np

        self._flush()
        count, lengths = len(self.lengths), np.frombuffer(self.lengths, np.int32)
        # Megatron's index: the lengths, the byte offsets, then where documents begin; each sequence is one document.
        with open(_with_suffix(self.prefix, ".idx"), "wb") as index:
            index.write(_HEADER.pack(_MAGIC, 1, _CODES[self.width], count, count + 1))
            index.write(lengths.astype("<i4").tobytes())
            end = 0
            for first in range(0, count, _ENTRIES):
                ends = end + np.cumsum(lengths[first : first + _ENTRIES], dtype=np.int64) * self.width
                index.write(np.concatenate(([end], ends[:-1])).astype("<i8").tobytes())
                end = int(ends[-1])
            for first in range(0, count + 1, _ENTRIES):
                index.write(np.arange(first, min(first + _ENTRIES, count + 1), dtype="<i8").tobytes())

    def _flush(self) -> None:
        with open(_with_suffix(self.prefix, ".bin"), "ab") as file:
            file.write(self.buffer)
        self.buffer.clear()


def check_sizes(folder: Path, name: str) -> int:
    """Returns the number of sequences of the shard `name` in a folder of token shards.

    Raises AtomError with the damaged file. Checks the header, and the sizes of both files by the last entries of the
    index, in constant time.
    """
    return _Shard(folder, name).sequences


def check_shard(folder: Path, name: str) -> int:
    """Returns the number of sequences like `check_sizes`, and also checks that they lie one behind the other.

    Reads the index in pieces.
    """
    import numpy as np

    shard, end = _Shard(folder, name), 0
    for first in range(0, shard.sequences, _ENTRIES):
        count = min(_ENTRIES, shard.sequences - first)
        lengths = np.fromfile(shard.index, "<i4", count, offset=shard.lengths + 4 * first).astype(np.int64)
        pointers = np.fromfile(shard.index, "<i8", count, offset=shard.pointers + 8 * first)
        ends = end + np.cumsum(lengths) * shard.width
        if (lengths <= 0).any() or (pointers != np.concatenate(([end], ends[:-1]))).any():
            raise AtomError(
                f"token index {shard.index} does not list its sequences one behind the other; {shard.advice}"
            )
        end = int(ends[-1])
    return shard.sequences


class _Shard:
    """The two files of a shard.

    `lengths` and `pointers` are the offsets in the index of the arrays with an entry a sequence.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.sequences: int
        self.index, self.tokens = (_with_suffix(folder / name, suffix) for suffix in (".idx", ".bin"))
        self.advice = f"remove {folder} and run again to rebuild it"
        for path in (self.index, self.tokens):
            if not path.is_file():
                raise AtomError(f"token shard {path} is missing; {self.advice}")
        size = self.index.stat().st_size
        with open(self.index, "rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise AtomError(f"token index {self.index} has only {size} bytes; {self.advice}")
            magic, version, code, self.sequences, documents = _HEADER.unpack(header)
            if magic != _MAGIC or version != 1 or code not in _BYTES_A_TOKEN:
                raise AtomError(f"token index {self.index} is not a Megatron index of version 1; {self.advice}")
            self.width, self.lengths = _BYTES_A_TOKEN[code], _HEADER.size
            # Sizes are compared before entries are read, so that no read leaves the file.
            self.pointers = self.lengths + 4 * self.sequences
            expected = self.pointers + 8 * self.sequences + 8 * documents
            if size != expected:
                raise AtomError(
                    f"token index {self.index} has {size} bytes where its header asks for {expected}; {self.advice}"
                )

            def last(kind: str, end: int, entries: int) -> int:
                """Returns the last of an array's entries, 0 if there are none; the array ends at the offset `end`."""
                file.seek(end - struct.calcsize(kind))
                return int(struct.unpack(kind, file.read(struct.calcsize(kind)))[0]) if entries else 0

            length = last("<i", self.pointers, self.sequences)
            needed = last("<q", self.pointers + 8 * self.sequences, self.sequences) + length * self.width
            if last("<q", size, documents) != self.sequences:
                raise AtomError(
                    f"token index {self.index} does not end its last document with its last sequence; {self.advice}"
                )
        if self.tokens.stat().st_size != needed:
            raise AtomError(
                f"token shard {self.tokens} has {self.tokens.stat().st_size} bytes instead of {needed}; {self.advice}"
            )


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
