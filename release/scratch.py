"""Temporary folders, and the download of a repository of a release into one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import AtomError, CheckFailed, MachineError
from pipeline.core.text import printable
from pipeline.hub.client import RemoteRepository, api, endpoint, translate_errors, unsafe_path


@contextmanager
def folder() -> Iterator[Path]:
    """Gives a new folder in TMPDIR, and removes it at the end. Raises MachineError if none can be made there."""
    try:
        holder = tempfile.TemporaryDirectory(prefix="atom-scratch-", ignore_cleanup_errors=True)
    except OSError as error:
        raise MachineError(
            f"no temporary folder can be made in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to another place"
        ) from None
    with holder as name:
        yield Path(name)


def pull(remote: RemoteRepository, revision: str, target: Path) -> Path:
    """Downloads one revision of a repository into `target`. Returns `target`.

    Raises AtomError if the Hub does not serve it or the disk has no room for it, CheckFailed if it contains a path that
    no release contains, which could lead outside `target`.
    """
    name = f"{remote.id}@{revision}"
    with translate_errors(f"pulling {name}"):
        # A branch may move during the download, and a commit does not.
        commit = remote.commit(revision)
        files = remote.files(commit)
        if (unsafe := unsafe_path(files)) is not None:
            raise CheckFailed(f"{name} has a file {printable(unsafe)}, which no release has")
        size = sum(file.size for file in files.values())
        target.mkdir(parents=True, exist_ok=True)
        if size > (free := shutil.disk_usage(target).free):
            raise AtomError(f"{name} has {size} bytes, and {target} has room for {free}; set TMPDIR")
        api().download_files(remote.id, remote.kind, commit, list(files), target)
    return target


def remove_client_files(folder: Path) -> None:
    """Removes the files that the Hub and its client add to a pulled repository."""
    for leftover in [*folder.rglob(".cache"), *folder.rglob(".gitattributes")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            # It may have lain in a folder that is removed already.
            leftover.unlink(missing_ok=True)


def pull_named(name: str, target: Path) -> Path:
    """Downloads `namespace/name[@revision]`, a model or else a dataset, into `target`. Returns `target`.

    Raises AtomError if there is no such repository that HF_TOKEN may read, and the errors of `pull`.
    """
    repo, _, revision = name.partition("@")
    for kind in ("model", "dataset"):
        remote = RemoteRepository(repo, kind)
        with translate_errors(f"looking for {repo} at {endpoint()}"):
            exists = remote.exists()
        if exists:
            return pull(remote, revision or "main", target)
    raise AtomError(f"{repo} is neither a folder here nor a repository at {endpoint()} that HF_TOKEN may read")
