"""Pulls a repository, or a whole release, from the Hub into a folder of its own."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import AtomError
from release.hub_client import api, endpoint, plainly


def pull(repo: str, kind: str, revision: str, target: Path) -> Path:
    """One revision of one repository, below `target`."""
    with plainly(f"pulling {repo}@{revision}"):
        api().snapshot_download(repo, repo_type=kind, revision=revision, local_dir=target)
    return target


def pull_named(name: str, target: Path) -> Path:
    """`namespace/name[@revision]`, whichever kind of repository has that name: models are looked up first.

    Raises AtomError if there is no such repository that HF_TOKEN may read.
    """
    repo, _, revision = name.partition("@")
    revision = revision or "main"
    for kind in ("model", "dataset"):
        with plainly(f"looking for {repo} at {endpoint()}"):
            if api().repo_exists(repo, repo_type=kind):
                return pull(repo, kind, revision, target)
    raise AtomError(f"{repo} is neither a folder here nor a repository at {endpoint()} that HF_TOKEN may read")
