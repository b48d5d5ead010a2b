"""Pulls a repository, or a whole release, from the Hub into a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.core.errors import AtomError, CheckFailed
from release.hub import limits
from release.hub.client import api, endpoint, parsing, translate_errors
from release.untrusted import printable


def pull(repo: str, kind: str, revision: str, target: Path) -> Path:
    """One revision of one repository, below `target`.

    Raises AtomError if the Hub does not give it or the disk has no room for it, CheckFailed if it holds files that no
    release holds, which could lie anywhere on this disk.
    """
    with translate_errors(f"pulling {repo}@{revision}"):
        client = api()
        info = client.repo_info(repo, repo_type=kind, revision=revision)
        with parsing():
            commit, names = str(info.sha), [str(row.rfilename) for row in info.siblings or ()]
        if unsafe := [name for name in names if _is_unsafe(name)]:
            raise CheckFailed(f"{repo}@{revision} holds {printable(unsafe[0])}, where no file of a release is")
        entries = client.list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind)
        with parsing():
            size = sum(int(entry.size) for entry in entries if hasattr(entry, "blob_id"))
        target.mkdir(parents=True, exist_ok=True)
        if size > (free := shutil.disk_usage(target).free):
            raise AtomError(f"{repo}@{revision} has {size} bytes, and {target} has room for {free}; set TMPDIR")
        with limits.transfer(size):
            client.snapshot_download(repo, repo_type=kind, revision=commit, local_dir=target)
    return target


def _is_unsafe(name: str) -> bool:
    """Whether a name leads elsewhere, or into what the client keeps for itself."""
    parts = name.split("/")
    return not name.isprintable() or "\\" in name or any(part in ("", ".", "..", ".cache", ".git") for part in parts)


def pull_named(name: str, target: Path) -> Path:
    """`namespace/name[@revision]`, whichever kind of repository has that name: models are looked up first.

    Raises AtomError if there is no such repository that HF_TOKEN may read.
    """
    repo, _, revision = name.partition("@")
    revision = revision or "main"
    for kind in ("model", "dataset"):
        with translate_errors(f"looking for {repo} at {endpoint()}"):
            exists = api().repo_exists(repo, repo_type=kind)
        if exists:
            return pull(repo, kind, revision, target)
    raise AtomError(f"{repo} is neither a folder here nor a repository at {endpoint()} that HF_TOKEN may read")
