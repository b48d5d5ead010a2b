"""Pulls a file of a dataset repository of the Hub, and compares its digest with that of the lock file."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from pipeline.core.errors import AtomError
from pipeline.core.lease import Lease
from pipeline.core.text import printable
from pipeline.hub import limits
from pipeline.hub.client import api, endpoint, online, translate_errors
from stages.data.lock_file import LockedFile, LockedSource

POLL = 1.0


def pull(source: str, locked: LockedSource, file: LockedFile, target: Path) -> None:
    """Brings a file to `target`, unless it is there already with its digest; waits if another process pulls it.

    Raises AtomError if the Hub does not have it, or has other bytes under its name; MachineError if the Hub does not
    answer, or refuses for now.
    """
    while not _is_intact(file, target):
        lease = Lease.take(target.parent)
        if lease is None:
            time.sleep(POLL)
            continue
        try:
            if not _is_intact(file, target):
                _download(source, locked, file, target)
            return
        finally:
            lease.release()


def _is_intact(file: LockedFile, path: Path) -> bool:
    try:
        return path.stat().st_size == file.size and file.digest_of(path) == file.digest
    except (FileNotFoundError, NotADirectoryError):
        return False


def _download(source: str, locked: LockedSource, file: LockedFile, target: Path) -> None:
    name = f"source {source}: {printable(file.path)} of {locked.repo}@{locked.revision[:12]}"
    draft = target.parent / ".pulling"
    shutil.rmtree(draft, ignore_errors=True)  # what a killed process has left
    if file.size > (free := shutil.disk_usage(target.parent).free):
        raise AtomError(f"{name} has {file.size} bytes, and {target.parent} has room for {free}; make room")
    try:
        with translate_errors(f"pulling {name}"), online(), limits.transfer(file.size):
            pulled = api().hf_hub_download(
                locked.repo, file.path, repo_type="dataset", revision=locked.revision, local_dir=draft
            )
        if (digest := file.digest_of(Path(pulled))) != file.digest:
            raise AtomError(
                f"{name} has the digest {digest} at {endpoint()}, but is pinned to {file.digest}; if the change "
                "is right, pin it anew by `atom pin RECIPE`"
            )
        os.replace(pulled, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
