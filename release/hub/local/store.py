"""The storage of the local Hub: blobs by SHA-256, and repositories as refs and commits in one JSON file each.

A repository file is replaced atomically, so a killed server leaves the last complete commit. One server owns one root.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".idx", ".gz", ".zst", ".gguf", ".npy")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


class HubError(Exception):
    """An answer other than success; `code` is the `X-Error-Code` by which the client picks its exception class."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclass(frozen=True)
class File:
    """A file at a commit: `blob` is its SHA-256, `oid` its git object id (of the pointer if it is an LFS file)."""

    blob: str
    oid: str
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
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
    """`kind` is model, dataset or space; `id` is namespace/name. `lfs`: {SHA-256: name, size and date} of every object
    that was pushed and not deleted, whether a commit refers to it or not."""

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
        """The commit of a branch, tag, full or shortened commit id. Raises HubError 404 as the Hub does."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = self.branches.get(name) or self.tags.get(name)
        if sha is None and len(name) >= 7:
            sha = next((commit for commit in self.commits if commit.startswith(name)), None)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def add(self, branch: str, commit: Commit) -> str:
        """Puts a commit on a branch and returns its id (40 hex digits, as the client insists)."""
        sha = hashlib.sha1(json.dumps([self.kind, self.id, asdict(commit)], sort_keys=True).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = commit, sha
        for path, file in commit.files.items():
            if file.lfs:
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
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)).strftime(
        "%Y-%m-%dT%H:%M:%S.%f"
    )[:-3] + "Z"


def git_blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubStore:
    """Repositories, blobs and collections below one folder. The bytes of a repository's file grow with its changes, not
    with commits times files."""

    def __init__(self, root: Path) -> None:
        self.blobs, self.repos, self.collections = root / "blobs", root / "repos", root / "collections"
        self._views: dict[Path, tuple[tuple[int, int, int], Repo | None]] = {}
        for folder in (self.blobs, self.repos, self.collections):
            folder.mkdir(parents=True, exist_ok=True)

    # repositories

    def _file(self, kind: str, repo_id: str) -> Path:
        return self.repos / kind / (repo_id.replace("/", "__") + ".json")

    def load(self, kind: str, repo_id: str) -> Repo | None:
        try:
            data = json.loads(self._file(kind, repo_id).read_text())
        except FileNotFoundError:
            return None
        commits: dict[str, Commit] = {}
        for sha, row in data["commits"].items():
            files = {path: File(**file) for path, file in row["files"].items()}
            if (deleted := row.pop("deleted", None)) is not None:
                files = {**commits[row["parent"]].files, **files}
                for path in deleted:
                    del files[path]
            commits[sha] = Commit(**{**row, "files": files})
        return Repo(**{**data, "commits": commits})

    def view(self, kind: str, repo_id: str) -> Repo | None:
        """The same, for a caller that changes nothing: it is parsed once for each version of the file. A download asks
        for it twice, and it has all paths of all commits."""
        path = self._file(kind, repo_id)
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        version = status.st_ino, status.st_mtime_ns, status.st_size
        if self._views.get(path, (None, None))[0] != version:
            self._views[path] = version, self.load(kind, repo_id)
        return self._views[path][1]

    def save(self, repo: Repo) -> None:
        """Writes the repository; a commit whose parent stands before it as its changes alone: `deleted` paths and
        other `files`."""
        rows, written = {}, dict[str, Commit]()
        for sha, commit in repo.commits.items():
            row = {**vars(commit), "files": commit.files}
            if (parent := written.get(commit.parent or "")) is not None:
                old = parent.files
                row["files"] = {path: file for path, file in commit.files.items() if old.get(path) != file}
                row["deleted"] = [path for path in old if path not in commit.files]
            row["files"] = {path: vars(file) for path, file in row["files"].items()}
            rows[sha], written[sha] = row, commit
        write_json(self._file(repo.kind, repo.id), {**vars(repo), "commits": rows})

    def create(self, kind: str, repo_id: str, private: bool, author: str) -> Repo:
        """Creates a repository with its first commit, which has `.gitattributes` as on the Hub."""
        repo = Repo(kind, repo_id, private, current_time())
        attributes = File(self.put(ATTRIBUTES), git_blob_oid(ATTRIBUTES), len(ATTRIBUTES), False)
        repo.add("main", Commit(None, "initial commit", "", author, current_time(), {".gitattributes": attributes}))
        self.save(repo)
        return repo

    def delete(self, repo: Repo) -> None:
        self._file(repo.kind, repo.id).unlink()

    # blobs

    def blob(self, sha256: str) -> Path:
        return self.blobs / sha256

    def drop_blobs(self, candidates: Iterable[str]) -> None:
        """Deletes those of the blobs that no repository has any more: in a commit, or as an LFS object."""
        used: set[str] = set()
        for path in self.repos.glob("*/*.json"):
            body = json.loads(path.read_text())
            used |= {file["blob"] for commit in body["commits"].values() for file in commit["files"].values()}
            used |= set(body.get("lfs", {}))
        for blob in set(candidates) - used:
            self.blob(blob).unlink(missing_ok=True)

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        if not self.blob(digest).exists():
            temporary = self.blobs / f"{digest}.new"
            temporary.write_bytes(data)
            os.replace(temporary, self.blob(digest))
        return digest

    def accept(self, upload: Path, sha256: str) -> None:
        """Stores an uploaded file as the blob with the stated digest. Raises HubError 422 if its bytes have another
        digest."""
        with open(upload, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != sha256:
            upload.unlink()
            raise HubError(422, f"the uploaded object is {digest}, not {sha256}")
        os.replace(upload, self.blob(sha256))

    def join(self, parts: list[Path], sha256: str) -> None:
        """Joins the parts of a multipart upload, in order, into the blob. Raises HubError 400 if a part is missing."""
        joined = self.blobs / f"{sha256}.{uuid.uuid4().hex}.joined"
        try:
            with open(joined, "wb") as target:
                for part in parts:
                    with open(part, "rb") as f:
                        shutil.copyfileobj(f, target, 1 << 20)
        except FileNotFoundError:
            joined.unlink()
            if self.blob(sha256).exists():  # the upload of an equal file was faster, and deleted the parts
                return
            raise HubError(400, f"{part.name} was never uploaded") from None
        self.accept(joined, sha256)
        for part in parts:
            part.unlink(missing_ok=True)

    def text_file(self, data: bytes) -> File:
        return File(self.put(data), git_blob_oid(data), len(data), False)

    def lfs_file(self, sha256: str) -> File:
        """An uploaded object as a file. Raises HubError 400 if it was never uploaded."""
        if not self.blob(sha256).exists():
            raise HubError(400, f"LFS object {sha256} was never uploaded")
        size = self.blob(sha256).stat().st_size
        return File(sha256, git_blob_oid(LFS_POINTER.format(sha256, size).encode()), size, True)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)
