"""How long the ranks of a phase take to seal a release checkpoint, and to hash it, by its size and their number.

    .venv/bin/python bench/seal.py            # two minutes, 3 GB of disk
    .venv/bin/python bench/seal.py --quick    # small files, to see that it works; its figures mean nothing

Seconds are those of the processor, of the rank that takes most, unless they say that they are of the clock: what other
programs or the disk take is not among them.

A work checkpoint of random numbers is written as the ranks of a phase write it. Then one or two processes make the
release checkpoint from it, as the threads of that many ranks do: each reads the tensors of its files from the work
checkpoint, puts them together, hashes them and writes them to the disk. The peer is one process that hashes the same
files, which is also what verifying them takes. The ratio is the peer's seconds by those of one rank, for the largest
size. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pipeline.core.store import sha256_file
from stages.mcore.optimizer import ADAM, Adam
from stages.train.checkpoint import release_checkpoint, sharded_state
from stages.train.engine import Piece

SIZES = (10**7, 10**8, 10**9)
RANKS = (1, 2)
ROUNDS = 5
TENSORS, FILES, WIDTH = 48, 24, 256
TARGET = 0.2


def write_work_checkpoint(folder: Path, size: int) -> dict[str, tuple[int, ...]]:
    """A work checkpoint of two ranks, which each own half of every tensor. Returns the shapes of the tensors."""
    rows = max(2, size // 12 // TENSORS // WIDTH)
    shapes = {f"decoder.layers.{n}.mlp.linear_fc2.weight": (rows, WIDTH) for n in range(TENSORS)}
    half = rows * WIDTH // 2
    for rank in range(2):
        start, stop = (0, half) if rank == 0 else (half, rows * WIDTH)
        pieces = [Piece(name, (((0, rows), (0, WIDTH)),), start, stop) for name in shapes]
        kinds = ("weight", *ADAM.states)
        tensors = {f"{kind}.{piece.name}": torch.rand(stop - start) for piece in pieces for kind in kinds}
        sharded_state.write(folder, rank, pieces, tensors)
    return shapes


def write_share(folder: Path, parts: Path, shapes: dict[str, tuple[int, ...]], rank: int, ranks: int) -> None:
    """What the thread of a rank does."""
    torch.set_num_threads(1)
    receipts = sharded_state.receipts(folder, 2)
    assert receipts is not None
    source = sharded_state.ShardReader(folder, receipts)
    for file in release_checkpoint.plan(shapes, Adam.state_shapes(shapes))[rank::ranks]:
        release_checkpoint.write_part(parts, file, source.full)


def seal(folder: Path, shapes: dict[str, tuple[int, ...]], ranks: int) -> tuple[float, float]:
    """Seals once. Returns the seconds of the clock, and the processor's, of the rank that took most."""
    parts = folder / "parts"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    context = multiprocessing.get_context("fork")
    seconds = context.Array("d", ranks)

    def run(rank: int) -> None:
        began = time.process_time()
        write_share(folder, parts, shapes, rank, ranks)
        seconds[rank] = time.process_time() - began

    began = time.perf_counter()
    processes = [context.Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    files = release_checkpoint.plan(shapes, Adam.state_shapes(shapes))
    records = release_checkpoint.read_records(parts, files)
    assert records is not None
    release_checkpoint.join(folder / "sealed", parts, files, records, {})
    return time.perf_counter() - began, max(seconds)


def hash_all(folder: Path) -> float:
    """Hashes the files that `seal` made. Returns the processor's seconds."""
    began = time.process_time()
    for path in sorted((folder / "sealed").glob("*.safetensors")):
        sha256_file(path)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small files: does it run?")
    quick = parser.parse_args().quick
    ratios: list[float] = []
    print("bytes          ranks  clock s   seal s (least, most)     GB/s a rank   hash s   GB/s")
    for size in (10**5, 10**6) if quick else SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shapes = write_work_checkpoint(folder, size)
            release_checkpoint.SHARD_BYTES = size // FILES
            for ranks in RANKS:
                rounds = [(*seal(folder, shapes, ranks), hash_all(folder)) for _ in range(2 if quick else ROUNDS)]
                clocks, seals, hashes = zip(*rounds, strict=True)
                if ranks == 1:
                    ratios = [hashing / sealing for hashing, sealing in zip(hashes, seals, strict=True)]
                clock, sealing, hashing = (statistics.median(values) for values in (clocks, seals, hashes))
                print(
                    f"{size:<14,} {ranks:<5} {clock:8.2f} {sealing:8.3f} ({min(seals):.3f}, {max(seals):.3f})"
                    f"{size / sealing / ranks / 1e9:13.2f} {hashing:12.3f} {size / hashing / 1e9:6.2f}"
                )
    result = {
        "name": "seal",
        "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "target": TARGET,
        "unit": "seconds of hashing by those of one rank's seal",
        "machine": f"{platform.processor() or platform.machine()}, 1 thread a rank, torch {torch.__version__}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
