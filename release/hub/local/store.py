"""The storage of the local Hub: blobs by SHA-256, and repositories as refs and commits in one JSON file each.

A repository file is replaced atomically, so a killed server leaves the last complete commit. One server owns one root.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Endings of files that go through LFS whatever their size.
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".idx", ".gz", ".zst", ".gguf", ".npy")
# The .gitattributes of a new repository.
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
# The text that git holds in place of an LFS file.
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


class HubError(Exception):
    """An answer other than success; `code` is the `X-Error-Code` by which the client picks its exception class."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclass(frozen=True)
class File:
    """A file at a commit.

    Attributes:
        blob: SHA-256 of its bytes.
        oid: Its git object id; of the pointer if it is an LFS file.
        size: In bytes.
        lfs: True if git-lfs holds it.
    """

    blob: str
    oid: str
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
        # As on the Hub: the SHA-256 of an LFS file, the git id of any other.
        return self.blob if self.lfs else self.oid


@dataclass
class Commit:
    parent: str | None
    title: str
    body: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    """A repository.

    Attributes:
        kind: model, dataset or space.
        id: namespace/name.
        private: True if only its namespace may read it.
        created: Time of its creation.
        branches: {branch: commit}.
        tags: {tag: commit}.
        commits: {id: commit}, a parent before its children.
        lfs: {SHA-256: name, size and date} of every pushed object that was not deleted, even without a commit.
    """

    kind: str
    id: str
    private: bool
    created: str
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def resolve(self, revision: str) -> str:
        """Returns the commit of a branch, tag, full or shortened commit id. Raises HubError 404 as the Hub does."""
        # Clients name a branch or a tag with and without its full ref.
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = self.branches.get(name) or self.tags.get(name)
        # git shortens commit ids to seven digits or more, and a shorter text may be any name.
        if sha is None and len(name) >= 7:
            sha = next((commit for commit in self.commits if commit.startswith(name)), None)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def add(self, branch: str, commit: Commit) -> str:
        """Puts a commit on a branch and returns its id (40 hex digits, as the client insists)."""
        # With kind and id, so that equal commits of two repositories differ.
        sha = hashlib.sha1(json.dumps([self.kind, self.id, asdict(commit)], sort_keys=True).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = commit, sha
        for path, file in commit.files.items():
            if file.lfs:
                # An object keeps the name under which it was pushed first.
                self.lfs.setdefault(file.blob, {"filename": path, "size": file.size, "pushedAt": commit.date})
        return sha

    def drop_unreachable(self) -> None:
        """Drops the commits that no branch and no tag leads to."""
        reachable: set[str] = set()
        for head in (*self.branches.values(), *self.tags.values()):
            sha: str | None = head
            while sha and sha not in reachable:
                reachable.add(sha)
                sha = self.commits[sha].parent
        self.commits = {sha: commit for sha, commit in self.commits.items() if sha in reachable}


def current_time(seconds_ago: float = 0) -> str:
    """Returns a time in the Hub's form, ISO 8601 in milliseconds."""
    moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def git_blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubStore:
    """Repositories, blobs and collections below one folder.

    The bytes of a repository's file grow with its changes, not with commits times files.
    """

    def __init__(self, root: Path) -> None:
        self.blobs, self.repos, self.collections = root / "blobs", root / "repos", root / "collections"
        # By file: its version, and the repository that was read from it.
        self._views: dict[Path, tuple[tuple[int, int, int], Repo | None]] = {}
        for folder in (self.blobs, self.repos, self.collections):
            folder.mkdir(parents=True, exist_ok=True)

    def _file(self, kind: str, repo_id: str) -> Path:
        return self.repos / kind / (repo_id.replace("/", "__") + ".json")

    def load(self, kind: str, repo_id: str) -> Repo | None:
        """Reads a repository; None if there is none."""
        try:
            data = json.loads(self._file(kind, repo_id).read_text())
        except FileNotFoundError:
            return None
        commits: dict[str, Commit] = {}
        for sha, row in data["commits"].items():
            files = {path: File(**file) for path, file in row["files"].items()}
            deleted = row.pop("deleted", None)
            if deleted is not None:  # the commit was written as its changes
                files = {**commits[row["parent"]].files, **files}
                for path in deleted:
                    del files[path]
            commits[sha] = Commit(**{**row, "files": files})
        return Repo(**{**data, "commits": commits})

    def view(self, kind: str, repo_id: str) -> Repo | None:
        """Reads a repository for a caller that changes nothing."""
        path = self._file(kind, repo_id)
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        # A download asks twice for a file that has all paths of all commits: each version of it is parsed once.
        version = status.st_ino, status.st_mtime_ns, status.st_size
        if self._views.get(path, (None, None))[0] != version:
            self._views[path] = version, self.load(kind, repo_id)
        return self._views[path][1]

    def save(self, repo: Repo) -> None:
        """Writes the repository.

        A commit whose parent stands before it is written as its changes: `deleted` paths and other `files`.
        """
        rows, written = {}, dict[str, Commit]()
        for sha, commit in repo.commits.items():
            row, files = dict(vars(commit)), commit.files
            parent = written.get(commit.parent or "")
            if parent is not None:
                row["deleted"] = [path for path in parent.files if path not in commit.files]
                files = {path: file for path, file in files.items() if parent.files.get(path) != file}
            row["files"] = {path: vars(file) for path, file in files.items()}
            rows[sha], written[sha] = row, commit
        write_json(self._file(repo.kind, repo.id), {**vars(repo), "commits": rows})

    def create(self, kind: str, repo_id: str, private: bool, author: str) -> Repo:
        """Creates a repository with its first commit, which has `.gitattributes` as on the Hub."""
        repo = Repo(kind, repo_id, private, current_time())
        files = {".gitattributes": self.text_file(ATTRIBUTES)}
        repo.add("main", Commit(None, "initial commit", "", author, current_time(), files))
        self.save(repo)
        return repo

    def delete(self, repo: Repo) -> None:
        self._file(repo.kind, repo.id).unlink()

    def blob(self, sha256: str) -> Path:
        return self.blobs / sha256

    def drop_blobs(self, candidates: Iterable[str]) -> None:
        """Deletes those of the blobs that no repository has any more: in a commit, or as an LFS object."""
        used: set[str] = set()
        for path in self.repos.glob("*/*.json"):
            body = json.loads(path.read_text())
            # Commits that are written as their changes name their new files, and parents name the others.
            used |= {file["blob"] for commit in body["commits"].values() for file in commit["files"].values()}
            used |= set(body["lfs"])
        for blob in set(candidates) - used:
            self.blob(blob).unlink(missing_ok=True)

    def put(self, data: bytes) -> str:
        """Stores bytes and returns their SHA-256."""
        digest = hashlib.sha256(data).hexdigest()
        # Blobs never change, so an existing one needs no second copy.
        if not self.blob(digest).exists():
            temporary = self.blobs / f"{digest}.new"
            temporary.write_bytes(data)
            os.replace(temporary, self.blob(digest))
        return digest

    def accept(self, upload: Path, sha256: str) -> None:
        """Stores an uploaded file as the blob with the stated digest. Raises HubError 422 if its bytes have another."""
        with open(upload, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != sha256:
            upload.unlink()
            raise HubError(422, f"the uploaded object is {digest}, not {sha256}")
        os.replace(upload, self.blob(sha256))

    def text_file(self, data: bytes) -> File:
        """Stores bytes as a file that git holds."""
        return File(self.put(data), git_blob_oid(data), len(data), False)

    def lfs_file(self, sha256: str) -> File:
        """Returns an uploaded object as a file. Raises HubError 400 if it was never uploaded."""
        if not self.blob(sha256).exists():
            raise HubError(400, f"LFS object {sha256} was never uploaded")
        size = self.blob(sha256).stat().st_size
        return File(sha256, git_blob_oid(LFS_POINTER.format(sha256, size).encode()), size, True)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)
