"""Parts: the pieces of an artifact that are made, sealed and resumed one by one.

The recipe sets the parts, so any number of tasks makes the same bytes. A finished part is a folder in the stage's work
folder: the files at their paths inside the artifact, and `part.json` with the size and SHA-256 of each. The artifact
is joined from links to these files, in time that grows with the number of parts and not with their size.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import json_files
from pipeline.core.bounds import Range
from pipeline.core.errors import AtomError
from pipeline.core.json_files import Damaged
from pipeline.core.store import FileRow, canonical, flush_tree, hand_over_hash, rows_of

SEAL = "part.json"
# The number of parts of a source.
PartCount = Annotated[int, Range(1, 10_000, "a folder of the Hub holds as many files")]
# Matches the tables of parts, for readers outside of this code.
PART_PATTERN = "part-*.parquet"
PART_NAME = r"part-[0-9]{5}\.parquet"


class _Seal(TypedDict):
    files: list[dict[str, Any]]
    facts: dict[str, Any]


_SEAL: TypeAdapter[Any] = TypeAdapter(_Seal)


@dataclass(frozen=True)
class Part:
    """A sealed part. Its `facts` are what its maker returned for the join, such as counts."""

    folder: Path
    rows: tuple[FileRow, ...]
    facts: dict[str, Any]


def part_file(number: int, suffix: str = ".parquet") -> str:
    """Returns the name of a file of part `number`, from 0."""
    return f"part-{number:05d}{suffix}"


def part_number(file: Path) -> int | None:
    """Returns the number of the part whose table a file is; None for another file."""
    return int(file.stem.removeprefix("part-")) if re.fullmatch(PART_NAME, file.name) else None


def part_tables(folder: Path) -> list[Path]:
    """Returns the tables of the parts in a folder, in order; none if there is no such folder."""
    return sorted(file for file in (folder.iterdir() if folder.is_dir() else ()) if part_number(file) is not None)


def part_slice(count: int, part: int, parts: int) -> slice:
    """Returns the items of a part where `parts` parts divide `count` items in order."""
    return slice(count * part // parts, count * (part + 1) // parts)


def shards_of(parts: Iterable[int]) -> int:
    """Returns the pieces of work of a stage that makes every part of each source.

    Sources of one part each are one piece: a job array would cost more than their work.

    Args:
        parts: Their number by source.
    """
    counts = list(parts)
    return sum(counts) if max(counts, default=1) > 1 else 1


def seal_part(work: Path, name: str, make: Callable[[Path], dict[str, Any]]) -> Part:
    """Returns the part `name` of a stage, made unless it is sealed in `work` already.

    make(folder) writes the files at their paths inside the artifact and returns the facts, as plain JSON. A part that
    is cut short or damaged is made again. Two makers at once are safe: the first to finish is used.
    """
    folder = work / name
    if (part := sealed_part(folder)) is not None:
        return part
    draft = work / f".{name}.{uuid.uuid4().hex}"  # not the process id: makers on two nodes can share one
    draft.mkdir(parents=True)
    facts = make(draft)
    rows = rows_of(draft)
    (draft / SEAL).write_bytes(canonical({"files": [row.__dict__ for row in rows], "facts": facts}))
    flush_tree(draft)
    if sealed_part(folder) is None:
        # A folder that is there already is no sealed part: it is cut short or damaged.
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(draft, folder)
        except OSError:  # another maker was first
            shutil.rmtree(draft)
    part = sealed_part(folder)
    if part is None:
        raise AtomError(f"{folder} was removed while it was sealed; run again")
    return part


def require_sealed(folder: Path) -> Part:
    """Returns the sealed part in a folder. Raises AtomError if it was removed or damaged since it was sealed."""
    part = sealed_part(folder)
    if part is None:
        raise AtomError(f"{folder} was removed or damaged before it was joined; run again")
    return part


def sealed_part(folder: Path) -> Part | None:
    """Returns the sealed part in a folder; None if there is none, or if a file is missing or has another size."""
    try:
        seal = json_files.read(folder / SEAL, _SEAL)
        rows = tuple(FileRow(**row) for row in seal["files"])
        if any((folder / row.path).stat().st_size != row.size for row in rows):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Damaged as error:
        json_files.report(error, "the part is made again")
        return None
    return Part(folder, rows, seal["facts"])


def link_parts(parts: Iterable[Part], out: Path) -> None:
    """Puts the files of sealed parts into `out` without copying or hashing them where the file system has links.

    Raises:
        AtomError: A part was removed.
    """
    for part in parts:
        for row in part.rows:
            source, target = part.folder / row.path, out / row.path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except FileExistsError:
                raise AtomError(f"two parts have the file {row.path}; this is a fault of the stage") from None
            except OSError:  # no links here, or work and out are on different file systems
                require_sealed(part.folder)
                shutil.copyfile(source, target)
            hand_over_hash(target, row.sha256)
