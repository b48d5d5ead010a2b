"""The steps of a publication that change a repository: upload, promote the verified branch, tag, clear up.

A private repository is filled in place. A branch of a public repository never holds unverified files: they go to the
branch `upload-v<version>` (`upload-v<version>-<branch>` for a checkpoint's), and are moved to their final branch in one
commit after they were pulled back and verified. The Hub then has their bytes, so that commit uploads none.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import sha256_file
from pipeline.hub.client import (
    FILE_BYTES,
    FOLDER_FILES,
    Changed,
    RemoteFile,
    RemoteRepository,
    api,
    endpoint,
    load,
    translate_errors,
)
from release.layout import PUBLIC_KEY, SIGNATURE, SUMS
from release.repositories import Repository, files_of

# Files of a commit. The Hub recommends less than a hundred; larger uploads have more, to stay below COMMITS.
FILES_PER_COMMIT = 50
# Commits of one upload to a branch: the Hub refuses more than 128 commits to a repository within an hour. Branches of
# one repository, such as those of checkpoints, are counted together there, and not here.
COMMITS = 100
# Files that end an upload, so that an interrupted one is recognized.
SENT_LAST = (SUMS, PUBLIC_KEY, SIGNATURE)
Progress = Callable[[str], None]
# {path: the ids under which a Hub may list the file}
FileIds = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Published:
    """One revision of one repository as it is on the Hub now; its fields are those of the JSON report.

    Attributes:
        repo: The id of the repository.
        kind: model, dataset or space.
        revision: The branch.
        commit: The commit of the branch.
        files_sent: Number of files that this publication sent.
    """

    repo: str
    kind: str
    revision: str
    commit: str
    files_sent: int


@dataclass(frozen=True)
class Difference:
    """The difference of a revision to the wanted files.

    Attributes:
        missing: Paths that it lacks or has with other bytes.
        surplus: Its extra paths.
    """

    missing: list[str]
    surplus: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus)


class Journal:
    """A file with one JSON line for each call that changed the Hub.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, call: str, **fields: Any) -> None:
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "endpoint": endpoint(),
            "call": call,
            **fields,
        }
        # Appended call by call, so that an interrupted publication leaves its record.
        with open(self.path, "a") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Destination:
    """A repository of a release, and its place on the Hub.

    Attributes:
        release: The folder of the release.
        repository: The repository.
        remote: The repository on the Hub.
        tag: The tag of the version.
        journal: The record of the calls that change the Hub.
    """

    release: Path
    repository: Repository
    remote: RemoteRepository
    tag: str
    journal: Journal

    @property
    def folder(self) -> Path:
        return self.release / self.repository.folder

    @property
    def branch(self) -> str:
        """The branch that readers pull."""
        return self.repository.branch

    @property
    def staging_branch(self) -> str:
        """The branch that takes unverified files of a public repository."""
        if self.branch == "main":
            return f"upload-{self.tag}"
        return f"upload-{self.tag}-{self.branch}"

    def refuse_changed_version(self) -> None:
        """Refuses a version that was published with other bytes. Changes nothing.

        Raises:
            AtomError: If the version has another checksum file on the Hub, or a later one took its place in main.
        """
        with translate_errors(f"reading {self.remote.id}"):
            # Only main branches are tagged; checkpoints are branches without a version.
            if self.branch != "main" or not self.remote.exists() or self.tag not in self.remote.refs().tags:
                return
        # The checksum file stands for all files of the version.
        published = self._files(self.tag).get(SUMS)
        if published is None or published.id not in _file_ids(self.folder / SUMS):
            raise self._version_conflict()
        if (latest := self._files("main").get(SUMS)) is None or latest.id != published.id:
            raise AtomError(
                f"{self.remote.id} has another version in main since {self.tag} was published, which would move back; "
                f"{self.tag} stays as it is"
            )

    def refuse_beyond_limits(self) -> None:
        """Refuses a folder with more files, or a file with more bytes, than the Hub takes. Changes nothing.

        Raises:
            AtomError: If there is one.
        """
        paths = files_of(self.release, self.repository)
        for folder, count in Counter(path.rpartition("/")[0] for path in paths).items():
            if count > FOLDER_FILES:
                raise AtomError(
                    f"{self.folder / folder} has {count} files, and a folder on the Hub has at most {FOLDER_FILES}; "
                    "divide the source into fewer parts, or into several sources"
                )
        for file in (self.folder / path for path in paths):
            if (size := file.stat().st_size) > FILE_BYTES:
                raise AtomError(
                    f"{file} has {size} bytes, and a file on the Hub has at most {FILE_BYTES}; `atom plan` says what "
                    "to set for smaller ones"
                )

    def upload(self, progress: Progress) -> Published:
        """Uploads the files that the branch lacks.

        They go to the branch itself, or to the staging branch if the repository is public.

        Raises:
            AtomError: If the Hub refuses it.
        """
        # Another publication may have ended since the version was looked at.
        self.refuse_changed_version()
        remote = self.remote
        with translate_errors(f"creating {remote.id}"):
            if not remote.exists():
                sdk = "static" if remote.kind == "space" else None
                api().create_repo(remote.id, repo_type=remote.kind, private=True, exist_ok=True, space_sdk=sdk)
                self.journal.write("create_repo", repo=remote.id, kind=remote.kind, private=True)
            private = remote.is_private()
            branches = self._branches()

        # Nothing unverified may be on a branch that everybody reads.
        file_ids = self._wanted_ids()
        branch = self.branch
        difference = self._difference(file_ids, branches.get(branch))
        if difference and not private:
            branch = self.staging_branch
        # A staging branch begins with the present files, so that only those that differ are sent.
        head = self._ensure_branch(branch, branches.get(self.branch))
        # The staging branch of an interrupted upload may have some of the files already.
        if head != branches.get(self.branch):
            difference = self._difference(file_ids, head)

        sent = 0
        chunks = _chunks(difference, len(file_ids))
        for number, chunk in enumerate(chunks, 1):
            part = Difference(chunk, difference.surplus if number == 1 else [])
            head = self._commit(branch, part, f"Release part {number} of {len(chunks)}", head)
            sent += len(chunk)
            progress(f"{remote.id}@{branch}: {sent} of {len(difference.missing)} files sent")
        if chunks and self._difference(file_ids, head):
            raise self._changed(branch)
        return Published(remote.id, remote.kind, branch, head, sent)

    def differs(self, revision: str) -> bool:
        """Returns True if a revision has other files than the folder."""
        return bool(self._difference(self._wanted_ids(), revision))

    def replace_files(self) -> None:
        """Makes the branch equal to the folder in one commit. Raises AtomError if the Hub refuses it."""
        head = self._head(self.branch)
        if difference := self._difference(self._wanted_ids(), head):
            self._commit(self.branch, difference, "Retracted on request", head)

    def promote(self, staged: Published) -> Published:
        """Makes the branch equal to the verified staging branch, unless the upload went to the branch itself.

        Raises:
            CheckFailed: If the branch then differs from the verified files.
        """
        if staged.revision == self.branch:
            return staged
        head = self._ensure_branch(self.branch, None)
        verified = self._files(staged.commit)
        # The Hub adds .gitattributes by itself.
        file_ids: FileIds = {path: (file.id,) for path, file in verified.items() if path != ".gitattributes"}
        # One commit, whatever its size: a reader sees the old release or the new one, never a mixture.
        if difference := self._difference(file_ids, head):
            head = self._commit(self.branch, difference, "Verified release", head)
        if self._files(head) != verified:
            raise CheckFailed(
                f"{self.remote.id}@{self.branch} is not what was verified in {staged.revision}; publish again"
            )
        return replace(staged, revision=self.branch, commit=head)

    def tag_main(self, commit: str) -> None:
        """Tags the commit of a main branch with the version.

        Raises:
            AtomError: If the tag is there with other bytes: a version is published once.
        """
        if self.branch != "main":
            return
        remote, tag = self.remote, self.tag
        with translate_errors(f"tagging {remote.id}"):
            tags = remote.refs().tags
            if tag not in tags:
                api().create_tag(remote.id, tag=tag, revision=commit, repo_type=remote.kind, exist_ok=True)
                self.journal.write("create_tag", repo=remote.id, kind=remote.kind, tag=tag, commit=commit)
                tags = {tag: commit, **remote.refs().tags}  # another publication may have made it just before
        # Commits differ after an interrupted publication, and their files may be equal.
        if tags[tag] != commit and self._files(tag) != self._files(commit):
            raise self._version_conflict()

    def clear_staging(self) -> None:
        """Deletes the staging branch of this version, also that of an interrupted publication."""
        remote, branch = self.remote, self.staging_branch
        # Nothing is lost: what was verified is on the final branch as well. Changed means that another publication
        # deleted the staging branch.
        with suppress(Changed), translate_errors(f"deleting {remote.id}@{branch}"):
            if branch in self._branches():
                api().delete_branch(remote.id, repo_type=remote.kind, branch=branch)
                self.journal.write("delete_branch", repo=remote.id, kind=remote.kind, branch=branch)

    def _wanted_ids(self) -> FileIds:
        """Returns the ids of the files of the folder; those that end an upload come last."""
        last_files = [path for path in SENT_LAST if (self.folder / path).exists()]
        paths = [*files_of(self.release, self.repository), *last_files]
        return {path: _file_ids(self.folder / path) for path in paths}

    def _version_conflict(self) -> AtomError:
        return AtomError(
            f"{self.remote.id} has a tag {self.tag} with other bytes; raise the recipe's version and build again"
        )

    def _branches(self) -> dict[str, str]:
        """Returns {branch: commit}."""
        with translate_errors(f"reading {self.remote.id}"):
            return self.remote.refs().branches

    def _files(self, revision: str) -> dict[str, RemoteFile]:
        with translate_errors(f"reading {self.remote.id}@{revision}"):
            return self.remote.files(revision)

    def _head(self, branch: str) -> str:
        """Returns the commit of a branch. Raises Changed if the branch has vanished."""
        try:
            return self._branches()[branch]
        except KeyError:
            raise self._changed(branch) from None

    def _changed(self, branch: str) -> Changed:
        return Changed(f"{self.remote.id}@{branch} was changed by somebody else meanwhile")

    def _ensure_branch(self, branch: str, start: str | None) -> str:
        """Makes a branch if it is missing, and returns its commit.

        A new branch begins at the commit `start`, by default at the first one of the repository.
        """
        if head := self._branches().get(branch):
            return head
        remote = self.remote
        with translate_errors(f"creating {remote.id}@{branch}"):
            start = start or remote.first_commit()
            api().create_branch(remote.id, repo_type=remote.kind, branch=branch, revision=start, exist_ok=True)
            self.journal.write("create_branch", repo=remote.id, kind=remote.kind, branch=branch)
        return self._head(branch)

    def _difference(self, file_ids: FileIds, revision: str | None) -> Difference:
        """Returns the difference between the wanted files and a revision; None is an empty revision."""
        files = self._files(revision) if revision else {}
        missing = [path for path, ids in file_ids.items() if path not in files or files[path].id not in ids]
        return Difference(missing, sorted(set(files) - set(file_ids) - {".gitattributes"}))

    def _commit(self, branch: str, difference: Difference, message: str, parent: str) -> str:
        """Changes a branch whose commit is `parent`, and returns its new commit.

        Raises:
            Changed: If the branch has another commit: somebody else has committed meanwhile.
        """
        hub, remote = load(), self.remote
        operations = [hub.CommitOperationAdd(path, self.folder / path) for path in difference.missing]
        # Additions and deletions are one commit, so no reader sees one without the other.
        operations += [hub.CommitOperationDelete(path) for path in difference.surplus]
        position = {"repo_type": remote.kind, "revision": branch, "parent_commit": parent}
        try:
            with translate_errors(f"uploading to {remote.id}@{branch}"):
                commit_info = api().create_commit(remote.id, operations, commit_message=message, **position)
                commit = str(commit_info.oid)
        except Changed:
            # It may be this very commit, if the answer to it was lost and the client repeated it.
            commit = self._head(branch)
            sent_ids: dict[str, tuple[str, ...]] = {path: _file_ids(self.folder / path) for path in difference.missing}
            remaining = self._difference(sent_ids, commit)
            # Every other file of the branch is surplus here, so only those that this commit deletes count.
            if remaining.missing or set(remaining.surplus) & set(difference.surplus):
                raise self._changed(branch) from None
        fields = {"branch": branch, "commit": commit, "files": difference.missing}
        self.journal.write("create_commit", repo=remote.id, kind=remote.kind, **fields)
        return commit


def _chunks(difference: Difference, file_count: int) -> list[list[str]]:
    """Returns the paths of each commit. The whole upload has `file_count` files."""
    paths = [path for path in difference.missing if path not in SENT_LAST]
    # The size follows from the whole upload, so that an upload that goes on after a kill makes no smaller commits.
    size = max(FILES_PER_COMMIT, math.ceil(file_count / COMMITS))
    chunks = [paths[start : start + size] for start in range(0, len(paths), size)]
    if last_files := [path for path in difference.missing if path in SENT_LAST]:
        chunks.append(last_files)
    # Surplus files alone need a commit as well.
    return chunks or ([[]] if difference else [])


def _file_ids(path: Path) -> tuple[str, str]:
    """Returns the SHA-256 of a file and its git blob id; the Hub lists the one or the other."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return sha256_file(path), digest.hexdigest()
