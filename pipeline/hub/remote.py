"""A repository on the Hub: what it contains, as the Hub lists it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.hub.client import api, parsing


@dataclass(frozen=True)
class Refs:
    """{name: commit} of the branches and tags of a repository."""

    branches: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True)
class Snapshot:
    """A revision of a repository. paths: of its files."""

    commit: str
    paths: list[str]


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
                {branch.name: branch.target_commit for branch in refs.branches},
                {tag.name: tag.target_commit for tag in refs.tags},
            )

    def first_commit(self) -> str:
        commits = api().list_repo_commits(self.id, repo_type=self.kind)
        with parsing():
            return str(commits[-1].commit_id)

    def commit(self, revision: str) -> str:
        """The commit of a branch, a tag, or a commit."""
        info = api().repo_info(self.id, repo_type=self.kind, revision=revision)
        with parsing():
            return str(info.sha)

    def snapshot(self, revision: str) -> Snapshot:
        info = api().repo_info(self.id, repo_type=self.kind, revision=revision)
        with parsing():
            return Snapshot(str(info.sha), [str(row.rfilename) for row in info.siblings or ()])

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
    """Whether a path leads outside its folder, or into the client's own files."""
    parts = path.split("/")
    return not path.isprintable() or "\\" in path or any(part in ("", ".", "..", ".cache", ".git") for part in parts)
