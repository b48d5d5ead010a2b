"""Reading token shards in parts: the right tokens with few files open, in either layout, and held-out rows by part."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.parts import part_file
from pipeline.core.store import Artifact, write_manifest
from stages.data.order import shards as megatron
from stages.data.order.shards import ShardWriter
from stages.formats.table import TOKENIZED, write_rows

LENGTH, PARTS, DOCUMENTS = 9, 40, 3


def document(part: int, ordinal: int) -> np.ndarray[Any, Any]:
    return np.arange(LENGTH, dtype=np.int32) + 100 * part + 10 * ordinal


def write_tokens(folder: Path, names: list[str], heldout: dict[int, int] | None = None) -> Artifact:
    """Token shards of the source `text`. names: of the shards by part. heldout: number of held-out documents by part;
    the other documents of the table are training documents."""
    for part, name in enumerate(names):
        writer = ShardWriter(folder / "train" / name, 65_536)
        for ordinal in range(DOCUMENTS):
            writer.add(document(part, ordinal))
        writer.close()
        rows: list[Any] = []
        for split, count in (("train", DOCUMENTS), ("heldout", (heldout or {}).get(part, 0))):
            for ordinal in range(count):
                row = {"source": "text", "split": split, "part": part, "ordinal": ordinal, "tokens": LENGTH, "bytes": 1}
                row |= {"id": f"{split}-{part}-{ordinal}", "content_hash": "", "license": "", "loss_from": 3}
                rows.append(row)
        write_rows(folder / "documents/text" / part_file(part), TOKENIZED, rows)
    counts = {"heldout": {"text": sum((heldout or {}).values())} if heldout else {}}
    (folder / "meta.json").write_text(json.dumps({"pad_id": 0, "documents": counts}))
    return write_manifest(folder, "tokenize")


def test_each_part_is_read_with_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.train.data import Segment, Shards

    monkeypatch.setattr("stages.train.data.OPEN_SHARDS", 4)
    tokens = write_tokens(tmp_path / "tokens", [f"text/part-{part:05d}" for part in range(PARTS)])
    shards = Shards(tokens, "train")
    rng, kept = np.random.default_rng(0), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as an exception while a file is closed
        warnings.filterwarnings("ignore", message="Could not determine rank")  # of Megatron 0.19, outside of a group
        for _ in range(400):
            part, ordinal, offset = (int(n) for n in rng.integers(0, (PARTS, DOCUMENTS, LENGTH - 2)))
            length = int(rng.integers(1, LENGTH - offset + 1))
            ids = shards.read(Segment("text", "", ordinal, offset, length, 0, part))
            kept.append((ids, document(part, ordinal)[offset : offset + length].tolist()))
            mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".bin" in line}
            assert (
                shards.shard.cache_info().currsize <= 4 and len(mapped) <= 4 + 8
            )  # Megatron's cache of index entries holds 8 more
    assert all(ids.tolist() == expected for ids, expected in kept)  # also after their files were closed
    with pytest.raises(AtomError, match=r"document x, which shard train/text/part-00002 does not hold; remove both"):
        shards.read(Segment("text", "x", DOCUMENTS, 0, 2, 0, 2))
    with pytest.raises(AtomError, match=r"train/text/part-00040\.idx is missing; remove .*tokens and run again"):
        shards.read(Segment("text", "x", 0, 0, 2, 0, PARTS))


def test_the_index_is_not_read_when_a_shard_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.train.data import Segment, Shards

    tokens = write_tokens(tmp_path / "tokens", ["text/part-00000"])
    monkeypatch.setattr(np, "fromfile", None)
    assert Shards(tokens, "train").read(Segment("text", "", 1, 0, LENGTH, 0)).tolist() == document(0, 1).tolist()
    os.truncate(tokens / "train/text/part-00000.idx", 50)
    with pytest.raises(AtomError, match="has 50 bytes where its header asks for"):
        Shards(tokens, "train").read(Segment("text", "", 1, 0, LENGTH, 0))


def phase(rows: int, **mix: float) -> Any:
    return SimpleNamespace(mix=mix, validation=SimpleNamespace(rows=rows), sequence_length=6)


def test_heldout_rows_are_those_of_the_first_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.train import data

    names = [f"text/part-{part:05d}" for part in range(PARTS)]
    tokens = write_tokens(tmp_path / "tokens", names, heldout={1: 2, 3: 5, 39: 1})
    read: list[str] = []
    stream = data.stream_batches
    monkeypatch.setattr(data, "stream_batches", lambda path, *rest: read.append(path.stem) or stream(path, *rest))
    rows = data.heldout_rows(tokens, phase(4, text=1.0))
    places = [(s.part, s.ordinal, s.id, s.length, s.loss_from) for row in rows for s in row.segments]
    assert places == [
        (1, 0, "heldout-1-0", 7, 2), (1, 1, "heldout-1-1", 7, 2), (3, 0, "heldout-3-0", 7, 2), (3, 1, "heldout-3-1", 7, 2)
    ]  # fmt: skip
    assert read == [f"part-{part:05d}" for part in range(4)]
    assert len(data.heldout_rows(tokens, phase(100, text=1.0))) == 8
    with pytest.raises(RecipeError, match=r"no held-out document in any source of the mix \(sums\)"):
        data.heldout_rows(tokens, phase(4, sums=1.0))


def test_a_writer_holds_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So one that is left by an error, such as a full disk, leaves none."""
    monkeypatch.setattr(megatron, "_BUFFER", 5 * 2 * LENGTH)
    before = os.listdir("/proc/self/fd")
    writer = ShardWriter(tmp_path / "shard", 65_536)
    for ordinal in range(12):
        writer.add(document(0, ordinal))
    assert os.listdir("/proc/self/fd") == before
    assert (tmp_path / "shard.bin").stat().st_size == 10 * 2 * LENGTH, "the rest is in memory"
    writer.close()
    expected = b"".join(document(0, ordinal).astype("<u2").tobytes() for ordinal in range(12))
    assert (tmp_path / "shard.bin").read_bytes() == expected


def test_a_missing_table_of_heldout_documents_is_named(tmp_path: Path) -> None:
    from stages.train.data import heldout_rows

    tokens = write_tokens(tmp_path / "tokens", ["text"], heldout={0: 3})
    (tokens / "documents/text/part-00000.parquet").unlink()
    with pytest.raises(AtomError, match="has no table of the documents of text; run tokenize again"):
        heldout_rows(tokens, phase(2, text=1.0))
