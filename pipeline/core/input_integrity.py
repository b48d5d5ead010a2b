"""Verifies sealed inputs: hashes their files again before they feed a stage, once in each run.

`logs/<run>/hashed/<key>.<n>.json` records the size, time and inode of each file in a part of an artifact when its bytes
matched the manifest; a file that still has the three is not read again. A part is some GB. The holder of its lease
hashes it, so many tasks share the parts and no part is hashed twice.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.core import atomic_files, json_files
from pipeline.core.errors import AtomError
from pipeline.core.json_files import Damaged, printable
from pipeline.core.lease import Lease
from pipeline.core.store import Artifact, FileRow, sha256_file

PART_BYTES = 4 * 2**30
PART_FILES = 10_000
THREADS = 16
POLL = 0.5
State = tuple[int, int, int]
"""Size, time of the last change in nanoseconds, and inode of a file."""
RECORD: TypeAdapter[dict[str, list[int]]] = TypeAdapter(dict[str, list[int]])


def check(run: Path, artifacts: Iterable[Artifact]) -> None:
    """Hashes the files that this run has not hashed yet or that have changed since; waits for parts that others hash.

    run: the run's folder. Raises AtomError naming the first file that is damaged.
    """
    parts = [part for artifact in artifacts for part in _parts(run, artifact)]
    while parts:
        waiting = []
        for artifact, path, rows in parts:
            if not _unhashed(artifact, path, rows):
                continue
            lease = Lease.take(path.with_suffix(".lease"))
            if lease is None:
                waiting.append((artifact, path, rows))
                continue
            try:
                _hash(artifact, path, rows)
            finally:
                lease.release()
        parts = waiting
        time.sleep(POLL if parts else 0)


def note(run: Path, artifact: Artifact) -> None:
    """Records that an artifact was hashed in this run when it was sealed. If the record cannot be written, a warning is
    printed and the artifact is hashed again."""
    with _ignore_write_errors():
        for _, path, rows in _parts(run, artifact):
            _write(path, {row.path: _state(artifact / row.path) for row in rows})


def _parts(run: Path, artifact: Artifact) -> Iterator[tuple[Artifact, Path, list[FileRow]]]:
    """The files of an artifact in parts, each with the path of its record."""
    parts: list[list[FileRow]] = []
    size = 0
    for row in artifact.rows:
        if not parts or size + row.size > PART_BYTES or len(parts[-1]) == PART_FILES:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += row.size
    for number, rows in enumerate(parts):
        yield artifact, run / "hashed" / f"{artifact.key}.{number}.json", rows


def _hash(artifact: Artifact, path: Path, rows: list[FileRow]) -> None:
    """Hashes the files of a part that have no record, and records the intact ones. Raises AtomError for a damaged
    file."""
    unknown = _unhashed(artifact, path, rows)
    if (size := sum(row.size for row in unknown)) > PART_BYTES / 4:
        print(f"hashing {len(unknown)} files of {artifact.key}, {size / 2**30:.1f} GiB", flush=True)
    states = {row.path: _state(artifact / row.path) for row in rows}
    threads = max(1, min(THREADS, len(os.sched_getaffinity(0)), len(unknown)))
    with ThreadPoolExecutor(threads) as pool:
        hashes = pool.map(lambda row: sha256_file(artifact / row.path), unknown)
        damaged = {row.path: digest for row, digest in zip(unknown, hashes, strict=True) if digest != row.sha256}
    with _ignore_write_errors():
        _write(path, {name: state for name, state in states.items() if name not in damaged})
    for row in unknown:
        if row.path in damaged:
            raise AtomError(
                f"artifact {artifact.key}: file {printable(row.path)} is damaged: it has the SHA-256 "
                f"{damaged[row.path][:12]} instead of {row.sha256[:12]}; {artifact.advice(artifact.key)}"
            )


def _unhashed(artifact: Artifact, path: Path, rows: list[FileRow]) -> list[FileRow]:
    """The files of a part that have changed since this run hashed them, or that it has not hashed."""
    try:
        record = json_files.read(path, RECORD)
    except FileNotFoundError:
        return rows
    except Damaged as error:
        json_files.report(error, "its files are hashed again")
        return rows
    return [row for row in rows if record.get(row.path) != list(_state(artifact / row.path))]


def _state(path: Path) -> State:
    entry = path.stat()
    return entry.st_size, entry.st_mtime_ns, entry.st_ino


@contextmanager
def _ignore_write_errors() -> Iterator[None]:
    """Ignores errors in writing a record, with a warning."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"what was hashed is not written down ({error}), so it is hashed again", stacklevel=2)


def _write(path: Path, record: dict[str, State]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write(path, json.dumps(record) + "\n")
