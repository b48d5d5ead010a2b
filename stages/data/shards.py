"""Check Megatron shards before they are read: Megatron's reader ends in an assertion or in wrong tokens."""

from __future__ import annotations

import struct
from pathlib import Path

from pipeline.core.errors import AtomError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_BYTES_A_TOKEN = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}


def check_shard(prefix: Path) -> int:
    """The number of sequences in `<prefix>.bin` and `.idx`. Raises AtomError with the damaged file.

    Checks the header, the size of the index, that sequences are contiguous, and that all tokens exist.
    """
    import numpy as np

    index, tokens = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    advice = f"remove {prefix.parent.parent} and run again to rebuild it"
    for path in (index, tokens):
        if not path.is_file():
            raise AtomError(f"token shard {path} is missing; {advice}")
    data = index.read_bytes()
    if len(data) < _HEADER.size:
        raise AtomError(f"token index {index} has only {len(data)} bytes; {advice}")
    magic, version, code, sequences, documents = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != 1 or code not in _BYTES_A_TOKEN:
        raise AtomError(f"token index {index} is not a Megatron index of version 1; {advice}")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if len(data) != expected:
        raise AtomError(f"token index {index} has {len(data)} bytes where its header asks for {expected}; {advice}")
    lengths = np.frombuffer(data, np.int32, sequences, _HEADER.size).astype(np.int64)
    pointers = np.frombuffer(data, np.int64, sequences, _HEADER.size + 4 * sequences)
    ends = np.cumsum(lengths) * _BYTES_A_TOKEN[code]
    if sequences and ((lengths <= 0).any() or (pointers != np.concatenate(([0], ends[:-1]))).any()):
        raise AtomError(f"token index {index} does not list its sequences one behind the other; {advice}")
    needed = int(ends[-1]) if sequences else 0
    if tokens.stat().st_size != needed:
        raise AtomError(f"token shard {tokens} has {tokens.stat().st_size} bytes instead of {needed}; {advice}")
    return int(sequences)
