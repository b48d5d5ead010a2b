"""The trash of `$ATOM_HOME`: folders that `atom gc` moved away, by date. They can be moved back.

    trash/2026-11-26/artifacts/<key>, trash/2026-11-26/work/<key>, trash/2026-11-26/code/<digest>
    trash/2026-11-26/work/<key>/out.3      an unfinished product, without the rest of the work

The path below the date is the path below `$ATOM_HOME`, so that `mv` restores it, too. A second folder of the same name
and day is under `2026-11-26.2`. No link below the trash is followed: its target may be in use.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline.core import json_files
from pipeline.core.errors import AtomError
from pipeline.core.json_files import Damaged
from pipeline.core.store import Store

GRACE_DAYS = 14
KEY = re.compile(r"[A-Za-z0-9][\w@.-]*-[0-9a-f]{12}")
CODE = re.compile(r"[0-9a-f]{16}")
KINDS = {"artifacts": KEY, "work": KEY, "code": CODE}
PRODUCT = re.compile(r"out\.\S+")


def freed(paths: Iterable[Path]) -> dict[Path, int]:
    """The bytes that become free if all of these are removed, by path: files whose links are all in them, counted once
    at the path of the first link."""
    links: dict[tuple[int, int], int] = {}
    bytes_by_path: dict[Path, int] = {}
    first_link: dict[tuple[int, int], tuple[Path, os.stat_result]] = {}
    for path in paths:
        bytes_by_path[path] = 0
        for entry in _files(path):
            inode = (entry.st_dev, entry.st_ino)
            links[inode] = links.get(inode, 0) + 1
            first_link.setdefault(inode, (path, entry))
    for inode, (path, entry) in first_link.items():
        if links[inode] == entry.st_nlink:
            bytes_by_path[path] += entry.st_size
    return bytes_by_path


def _files(path: Path) -> Iterator[os.stat_result]:
    if path.is_dir() and not path.is_symlink():
        for root, _, names in os.walk(path):
            yield from (os.lstat(os.path.join(root, name)) for name in names)
    elif os.path.lexists(path):
        yield path.lstat()


@dataclass(frozen=True)
class Entry:
    """A folder in the trash. place: its path below `$ATOM_HOME` before; since: the day on which it was moved there."""

    path: Path
    place: Path
    since: date

    @property
    def names(self) -> tuple[str, ...]:
        """The names that identify it: a key or the digest of code, and its path in the home or in the trash."""
        return self.place.parts[1], str(self.place), str(self.path)

    @property
    def until(self) -> date:
        """The last day of its grace time."""
        return self.since + timedelta(days=GRACE_DAYS)

    def json(self) -> dict[str, Any]:
        return {"path": str(self.path), "since": self.since.isoformat(), "until": self.until.isoformat()}


def today() -> date:
    return datetime.now(UTC).date()


def entries(store: Store) -> list[Entry]:
    """The entries of the trash, the oldest first. Other files and folders are reported and left alone."""
    trash, days = store.home / "trash", []
    for name in _names(trash):
        match = re.fullmatch(r"([0-9]{4}-[0-9]{2}-[0-9]{2})(?:\.([0-9]{1,9}))?", name)
        try:
            days.append((date.fromisoformat(match[1] if match else name), int((match and match[2]) or 1), name))
        except ValueError:
            json_files.report(Damaged(trash / name, "its name is no date"), "it is left alone")
    return [
        Entry(path, path.relative_to(trash / name), since) for since, _, name in sorted(days)
        for path in _moved_folders(trash / name)
    ]  # fmt: skip


def _moved_folders(day: Path) -> Iterator[Path]:
    """The folders that were moved to a folder of the trash."""
    for kind in _names(day):
        if kind not in KINDS:
            json_files.report(Damaged(day / kind, "it is of no known kind"), "it is left alone")
            continue
        for path in (day / kind / name for name in _names(day / kind)):
            if not KINDS[kind].fullmatch(path.name):
                json_files.report(Damaged(path, "its name is none of that kind"), "it is left alone")
                continue
            # work that was moved as a whole contains its leases
            products = _names(path) if kind == "work" and path.is_dir() and not path.is_symlink() else []
            only_products = products and all(PRODUCT.fullmatch(name) for name in products)
            yield from (path / name for name in products) if only_products else (path,)


def _names(folder: Path) -> list[str]:
    try:
        if folder.is_symlink() and folder.name != "trash":
            raise Damaged(folder, "it is a link")
        return json_files.names(folder)
    except Damaged as error:
        json_files.report(error, "it is left alone")
        return []


def move(store: Store, path: Path) -> Path:
    """Moves a folder of the home to the trash; returns its new path."""
    for number in itertools.count(1):
        day = today().isoformat() + (f".{number}" if number > 1 else "")
        target = store.home / "trash" / day / path.relative_to(store.home)
        parents = [parent for parent in target.parents if parent.is_relative_to(store.home / "trash" / day)]
        if not os.path.lexists(target) and all(map(_can_hold_entries, parents)):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, target)
            return target
    raise AssertionError("there is always a next number")


def _can_hold_entries(folder: Path) -> bool:
    """Whether the path can take entries: it is a folder, or it does not exist yet."""
    return not os.path.lexists(folder) or (folder.is_dir() and not folder.is_symlink())


def restore(store: Store, name: str) -> list[Path]:
    """Moves the entry with that name back, the latest if several have one place; returns its new path.

    name: a key, the digest of code, or a path as `Entry.names` has it. Raises AtomError if there is none, or if its
    place is taken.
    """
    latest = {entry.place: entry for entry in entries(store) if name in entry.names}
    if not latest:
        raise AtomError(f"there is no {name} in {store.home / 'trash'}; `atom gc --json` lists what is there")
    for target in (store.home / original for original in latest):
        if os.path.lexists(target):
            raise AtomError(f"{target} is there already, so what lies in the trash stays there")
    for original, entry in sorted(latest.items()):
        (store.home / original).parent.mkdir(parents=True, exist_ok=True)
        os.rename(entry.path, store.home / original)
        _remove_empty_folders(entry.path.parent)
    return [store.home / original for original in sorted(latest)]


def put_back(path: Path, target: Path) -> None:
    """Undoes a move. Raises OSError if it cannot be undone, for example if the place is taken again."""
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "it exists again", str(target))
    os.rename(path, target)
    _remove_empty_folders(path.parent)


def empty(store: Store, everything: bool = False) -> int:
    """Deletes the entries older than the grace time, or all; returns the freed bytes."""
    expired = [entry for entry in entries(store) if everything or entry.until < today()]
    sizes = freed(entry.path for entry in expired)
    for entry in expired:
        if entry.path.is_symlink() or not entry.path.is_dir():
            entry.path.unlink()
        else:
            shutil.rmtree(entry.path)
        _remove_empty_folders(entry.path.parent)
    return sum(sizes.values())


def _remove_empty_folders(folder: Path) -> None:
    """Removes an empty folder of the trash and its empty parents."""
    while folder.name != "trash" and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
