"""Verifies sealed inputs: hashes their files again before they feed a stage, once in each run.

`logs/<run>/hashed/<key>.<n>.json` records the size, time and inode of each file in a part of an artifact when its bytes
matched the manifest; a file that still has the three is not read again. A part is some GB. The holder of its lease
hashes it, so many tasks, and the ranks of one, share the parts and no part is hashed twice. `hashed/progress` is
touched while any of them hashes, so those that wait know that the work goes on.
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
from pipeline.core.json_files import printable
from pipeline.core.lease import Lease, SharedProgress
from pipeline.core.store import Artifact, FileRow, sha256_file

# The most bytes and files of one part.
PART_BYTES = 4 * 2**30
PART_FILES = 10_000
THREADS = 16
POLL = 0.5
# The longest time from one sign of progress to the next of a process that hashes.
PROGRESS_SECONDS = 5.0
# Size, time of the last change in nanoseconds, and inode of a file.
State = tuple[int, int, int]
# An artifact, the record of some of its files, and these files.
Part = tuple[Artifact, Path, list[FileRow]]
RECORD: TypeAdapter[dict[str, list[int]]] = TypeAdapter(dict[str, list[int]])


def check(run: Path, artifacts: Iterable[Artifact]) -> None:
    """Hashes the files that this run has not hashed yet or that have changed since; waits for parts that others hash.

    Args:
        run: The run's folder.
        artifacts: The sealed inputs.

    Raises:
        AtomError: A file is damaged. The message names the first one.
    """
    parts = [part for artifact in artifacts for part in _parts(run, artifact)]
    # Parts of a process that dies meanwhile are hashed here once its lease has expired.
    while parts := _hash_free(parts, shared_progress(run)):
        time.sleep(POLL)


def help_to_check(run: Path, artifacts: Iterable[Artifact], rank: int, ranks: int) -> None:
    """Hashes this rank's share of the files for rank 0, which is in `check`.

    Parts that others hash are left to them. Raises AtomError as `check`.
    """
    parts = [part for artifact in artifacts for part in _parts(run, artifact)]
    _hash_free(parts[rank::ranks], shared_progress(run))


def shared_progress(run: Path) -> SharedProgress:
    """Returns the progress of all processes that hash inputs of this run."""
    return SharedProgress(run / "hashed" / "progress", PROGRESS_SECONDS)


def _hash_free(parts: list[Part], shared: SharedProgress) -> list[Part]:
    """Hashes the files of those parts that no other process hashes, several parts at once. Returns the other parts."""
    unhashed = [part for part in parts if _unhashed(*part)]
    threads = max(1, min(THREADS, len(os.sched_getaffinity(0))))
    at_once = max(1, min(threads, len(unhashed)))

    def hash_if_free(part: Part) -> bool:
        lease = Lease.take(part[1].with_suffix(".lease"))
        if lease is None:
            return False
        try:
            # The threads are divided among the parts that are hashed at once.
            _hash(*part, threads // at_once, shared)
        finally:
            lease.release()
        return True

    with ThreadPoolExecutor(at_once) as pool:
        was_free = list(pool.map(hash_if_free, unhashed))
    return [part for part, free in zip(unhashed, was_free, strict=True) if not free]


def note(run: Path, artifact: Artifact) -> None:
    """Records that an artifact was hashed in this run when it was sealed.

    If the record cannot be written, a warning is printed and the artifact is hashed again.
    """
    with _ignore_write_errors():
        for _, path, rows in _parts(run, artifact):
            _write(path, {row.path: _state(artifact / row.path) for row in rows})


def _parts(run: Path, artifact: Artifact) -> Iterator[Part]:
    """Yields the files of an artifact in parts, each with the path of its record."""
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


def _hash(artifact: Artifact, path: Path, rows: list[FileRow], threads: int, shared: SharedProgress) -> None:
    """Hashes the files of a part that have no record, and records the intact ones.

    Raises AtomError for a damaged file.
    """
    unknown = _unhashed(artifact, path, rows)
    if (size := sum(row.size for row in unknown)) > PART_BYTES / 4:
        print(f"hashing {len(unknown)} files of {artifact.key}, {size / 2**30:.1f} GiB", flush=True)
    # Taken before the files are read: a file that changes meanwhile differs from its record, and is hashed again.
    states = {row.path: _state(artifact / row.path) for row in rows}
    with ThreadPoolExecutor(max(1, min(threads, len(unknown)))) as pool:
        hashes = pool.map(lambda row: sha256_file(artifact / row.path, shared.report), unknown)
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
    """Returns the files of a part that have changed since this run hashed them, or that it has not hashed."""
    record = json_files.read_optional(path, RECORD, "its files are hashed again") or {}
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
