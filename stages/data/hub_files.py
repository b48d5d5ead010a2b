"""Files of a dataset repository of the Hub: what a revision has, and pulling them, whose digests are then compared."""

from __future__ import annotations

import os
import re
import shutil
import time
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.lease import Lease
from pipeline.core.text import printable, shown
from pipeline.hub import limits
from pipeline.hub.client import RemoteRepository, api, endpoint, is_unsafe, online, translate_errors
from stages.data.lock_file import COMMIT, DIGEST, LockedFile, LockedSource
from stages.data.readers.base import MAX_ENTRIES

POLL = 1.0
MOST_BYTES = 10**15


def resolve(name: str, repo: str, revision: str, pattern: str) -> LockedSource:
    """What the Hub states of a source: the commit of its revision, and the files that match the pattern. Raises
    AtomError."""
    remote, title = RemoteRepository(repo, "dataset"), f"source {name}: {repo}@{revision}"
    with translate_errors(f"pinning {title}"):
        commit = remote.commit(revision)
        entries = remote.files(commit)
    if not re.fullmatch(COMMIT, commit) or (re.fullmatch(COMMIT, revision) and commit != revision):
        raise AtomError(
            f"{title}: the Hub answers with the commit {shown(commit)}, which is another; check HF_ENDPOINT"
        )
    files = []
    for path, entry in sorted(entries.items()):
        if fnmatchcase(path, pattern):
            files.append(LockedFile(path, entry.size, f"{'git' if len(entry.id) == 40 else 'sha256'}:{entry.id}"))
            _require_valid(title, files[-1])
    if not files:
        raise RecipeError(f"{title} has no file that matches {pattern!r} among {len(entries)}; set reader.pattern")
    if len(files) > MAX_ENTRIES:
        raise RecipeError(f"{title}: more than {MAX_ENTRIES} files match {pattern!r}; set reader.pattern")
    lines = "".join(f"{file.digest} {file.size} {file.path}\n" for file in files)
    return LockedSource(repo=repo, requested=revision, revision=commit, pattern=pattern, files=lines)


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


def _require_valid(title: str, file: LockedFile) -> None:
    """Raises AtomError for a file that no Hub has."""
    if is_unsafe(file.path) or not DIGEST.fullmatch(file.digest) or not 0 <= file.size <= MOST_BYTES:
        raise AtomError(
            f"{title}: the Hub lists {shown(file.path)} of {file.size} bytes with the digest {shown(file.digest)}, "
            "which is no file of a dataset; check HF_ENDPOINT"
        )
