"""A repository on the Hub: what it contains, as the Hub lists it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.core.text import shown
from pipeline.hub.client import api, parsing

FILE_BYTES = 50 * 10**9
"""The largest file that the Hub's client reads without Xet (`MAX_HTTP_DOWNLOAD_SIZE` of huggingface_hub 2.4). The Hub
itself recommends files below 200 GB and stores none above 500 GB (`docs/hub/storage-limits.md` of
github.com/huggingface/hub-docs, read at commit 003e04e94a59)."""
FOLDER_FILES = 10_000
REPOSITORY_FILES = 100_000
"""A recommendation: the Hub refuses no repository for its files."""
PART_BYTES, PATH_BYTES = 240, 1000
"""The longest part of a path and the longest path of a repository. File systems take 255 bytes and 4,096, of which the
client needs some for its own files beside them."""


@dataclass(frozen=True)
class Refs:
    """{name: commit} of the branches and tags of a repository."""

    branches: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a revision. id: its git blob id, or its SHA-256 if it is an LFS file. size: in bytes."""

    id: str
    size: int


@dataclass(frozen=True)
class RemoteRepository:
    """A repository at HF_ENDPOINT, read with HF_TOKEN. id: namespace/name; kind: model, dataset or space.

    Every method raises what the client raises, and MalformedAnswer: call it inside `translate_errors`.
    """

    id: str
    kind: str

    def exists(self) -> bool:
        return bool(api().repo_exists(self.id, repo_type=self.kind))

    def is_private(self) -> bool:
        info = api().repo_info(self.id, repo_type=self.kind)
        with parsing():
            return bool(info.private)

    def refs(self) -> Refs:
        refs = api().list_repo_refs(self.id, repo_type=self.kind)
        with parsing():
            return Refs(
                {branch.name: _commit_id(branch.target_commit) for branch in refs.branches},
                {tag.name: _commit_id(tag.target_commit) for tag in refs.tags},
            )

    def first_commit(self) -> str:
        commits = api().list_repo_commits(self.id, repo_type=self.kind)
        with parsing():
            return _commit_id(commits[-1].commit_id)

    def commit(self, revision: str) -> str:
        """The commit of a branch, a tag, or a commit."""
        info = api().repo_info(self.id, repo_type=self.kind, revision=revision)
        with parsing():
            return _commit_id(info.sha)

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """{path: file} of a revision."""
        entries = api().list_repo_tree(self.id, recursive=True, revision=revision, repo_type=self.kind)
        with parsing():
            return {
                entry.path: RemoteFile(entry.lfs.sha256 if entry.lfs else entry.blob_id, int(entry.size))
                for entry in entries
                if hasattr(entry, "blob_id")
            }


def is_unsafe(path: str) -> bool:
    """Returns True if a path leads outside its folder or into the client's own files, or is too long for a file
    system."""
    if not path.isprintable() or "\\" in path or len(path.encode()) > PATH_BYTES:
        return True
    parts = path.split("/")
    reserved = ("", ".", "..", ".cache", ".git")
    return any(part in reserved or len(part.encode()) > PART_BYTES for part in parts)


def unsafe_path(paths: Iterable[str]) -> str | None:
    """The first of the paths of a repository that `is_unsafe`, or that is a file and also a folder of another."""
    every = sorted(paths)
    if unsafe := next(filter(is_unsafe, every), None):
        return unsafe
    folders = {str(parent) for path in every for parent in PurePosixPath(path).parents}
    return next((path for path in every if path in folders), None)


def _commit_id(value: object) -> str:
    """The id of a commit, as the Hub states it. Raises ValueError for anything else: the client makes paths of it."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{40}", value):
        raise ValueError(f"{shown(value)} is no commit")
    return value
