"""The steps of a publication that change a repository: send, move what was verified into place, tag.

A private repository is filled in place. What is public already never holds unverified files under a name that anyone
pulls: they go to the branch `upload-v<version>` (`upload-v<version>-<branch>` for a checkpoint's), and come to their
own branch in one commit when they were pulled back and verified; the Hub then has their bytes, so only names move.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import sha256_file
from release.hub import limits
from release.hub.client import api, endpoint, load, parsing, translate_errors
from release.layout import PUBLIC_KEY, SIGNATURE, SUMS
from release.repositories import Repository, files_of

FILES_PER_COMMIT = 50
SENT_LAST = (SUMS, PUBLIC_KEY, SIGNATURE)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Published:
    """One revision of one repository as it is on the Hub now."""

    repo: str
    kind: str
    revision: str
    commit: str
    files_sent: int


class Journal:
    """One JSON line a call that changed something on the Hub."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, call: str, **fields: Any) -> None:
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "endpoint": endpoint(),
            "call": call,
            **fields,
        }
        with open(self.path, "a") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Difference:
    """What a revision lacks of a folder, and has too much."""

    missing: list[str]
    surplus: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus)


def staging_branch(tag: str, branch: str) -> str:
    return f"upload-{tag}" + ("" if branch == "main" else f"-{branch}")


def refuse_changed_version(release: Path, repository: Repository, repo: str, tag: str) -> None:
    """Raises AtomError if the version is on the Hub with another checksum file. Changes nothing."""
    with translate_errors(f"reading {repo}"):
        if repository.branch != "main" or not api().repo_exists(repo, repo_type=repository.kind):
            return
        refs = api().list_repo_refs(repo, repo_type=repository.kind)
        with parsing():
            tags = {t.name for t in refs.tags}
        if tag not in tags:
            return
        published_files = _tree(repo, repository.kind, tag)
    if published_files.get(SUMS) not in _file_ids(release / repository.folder / SUMS):
        raise _version_conflict(repo, tag)


def upload(
    release: Path, repository: Repository, repo: str, tag: str, journal: Journal, progress: Progress
) -> Published:
    """Sends what a revision of a repository lacks: to its own branch, or to a staging branch if it is public."""
    client = api()
    with translate_errors(f"creating {repo}"):
        if not client.repo_exists(repo, repo_type=repository.kind):
            client.create_repo(repo, repo_type=repository.kind, private=True, exist_ok=True)
            journal.write("create_repo", repo=repo, kind=repository.kind, private=True)
        info = client.repo_info(repo, repo_type=repository.kind)
        with parsing():
            public = not info.private
        heads = _heads(repo, repository.kind)
    folder = release / repository.folder
    last_files = [path for path in SENT_LAST if (folder / path).exists()]
    file_ids = {path: _file_ids(folder / path) for path in [*files_of(release, repository), *last_files]}
    branch = repository.branch
    difference = _difference(file_ids, repo, repository.kind, branch if branch in heads else None)
    if public and difference:
        branch = staging_branch(tag, repository.branch)
    _ensure_branch(repo, repository.kind, branch, heads.get(repository.branch), journal)
    if branch != repository.branch:
        difference = _difference(file_ids, repo, repository.kind, branch)
    sent = 0
    chunks = _chunks(difference)
    for number, chunk in enumerate(chunks, 1):
        part = Difference(chunk, difference.surplus if number == 1 else [])
        _commit(folder, repo, repository.kind, branch, part, f"Release part {number} of {len(chunks)}", journal)
        sent += len(chunk)
        progress(f"{repo}@{branch}: {sent} of {len(difference.missing)} files sent")
    return Published(repo, repository.kind, branch, _heads(repo, repository.kind)[branch], sent)


def promote(release: Path, repository: Repository, staged: Published, journal: Journal) -> Published:
    """Makes the place's own branch equal to the verified staging branch; does nothing where there is none."""
    if staged.revision == repository.branch:
        return staged
    heads = _heads(staged.repo, staged.kind)
    _ensure_branch(staged.repo, staged.kind, repository.branch, heads.get(repository.branch), journal)
    verified = _tree(staged.repo, staged.kind, staged.commit)
    file_ids = {path: (name, name) for path, name in verified.items() if path != ".gitattributes"}
    # One commit, whatever its size: a reader sees the old release or the new one, never a mixture.
    if difference := _difference(file_ids, staged.repo, staged.kind, repository.branch):
        _commit(
            release / repository.folder,
            staged.repo,
            staged.kind,
            repository.branch,
            difference,
            "Verified release",
            journal,
        )
    head = _heads(staged.repo, staged.kind)[repository.branch]
    if _tree(staged.repo, staged.kind, head) != verified:
        raise CheckFailed(
            f"{staged.repo}@{repository.branch} is not what was verified in {staged.revision}; publish again"
        )
    return replace(staged, revision=repository.branch, commit=head)


def tag_mains(published: list[Published], tag: str, journal: Journal) -> None:
    """Tags each main branch with the version. A version is published once: other bytes need another version."""
    client = api()
    for revision in published:
        if revision.revision != "main":
            continue
        with translate_errors(f"tagging {revision.repo}"):
            refs = client.list_repo_refs(revision.repo, repo_type=revision.kind)
            with parsing():
                tags = {t.name: t.target_commit for t in refs.tags}
            if tag not in tags:
                client.create_tag(
                    revision.repo, tag=tag, revision=revision.commit, repo_type=revision.kind, exist_ok=True
                )
                journal.write("create_tag", repo=revision.repo, kind=revision.kind, tag=tag, commit=revision.commit)
                continue
        if tags[tag] != revision.commit and _tree(revision.repo, revision.kind, tag) != _tree(
            revision.repo, revision.kind, revision.commit
        ):
            raise _version_conflict(revision.repo, tag)


def clear_staging(repositories: list[Repository], published: list[Published], tag: str, journal: Journal) -> None:
    """Deletes the staging branches of this version, those of an interrupted publication too."""
    for repository, revision in zip(repositories, published, strict=True):
        branch = staging_branch(tag, repository.branch)
        with translate_errors(f"deleting {revision.repo}@{branch}"):
            if branch in _heads(revision.repo, revision.kind):
                api().delete_branch(revision.repo, repo_type=revision.kind, branch=branch)
                journal.write("delete_branch", repo=revision.repo, kind=revision.kind, branch=branch)


def _version_conflict(repo: str, tag: str) -> AtomError:
    return AtomError(f"{repo} has a tag {tag} with other bytes; raise the recipe's version and build again")


def _heads(repo: str, kind: str) -> dict[str, str]:
    """{branch: commit}"""
    with translate_errors(f"reading {repo}"):
        refs = api().list_repo_refs(repo, repo_type=kind)
        with parsing():
            return {b.name: b.target_commit for b in refs.branches}


def _ensure_branch(repo: str, kind: str, branch: str, start: str | None, journal: Journal) -> None:
    """Makes a branch if there is none, from `start` or from the repository's first commit."""
    if branch in _heads(repo, kind):
        return
    with translate_errors(f"creating {repo}@{branch}"):
        commits = [] if start else api().list_repo_commits(repo, repo_type=kind)
        with parsing():
            start = start or commits[-1].commit_id
        api().create_branch(repo, repo_type=kind, branch=branch, revision=start, exist_ok=True)
        journal.write("create_branch", repo=repo, kind=kind, branch=branch)


def _difference(file_ids: dict[str, tuple[str, str]], repo: str, kind: str, revision: str | None) -> Difference:
    published_files = _tree(repo, kind, revision) if revision else {}
    missing = [path for path, names in file_ids.items() if published_files.get(path) not in names]
    return Difference(missing, sorted(set(published_files) - set(file_ids) - {".gitattributes"}))


def _chunks(difference: Difference) -> list[list[str]]:
    """Paths by commit; checksum file and signature go last and alone, so that a cut upload is seen to be one."""
    paths = [path for path in difference.missing if path not in SENT_LAST]
    chunks = [paths[i : i + FILES_PER_COMMIT] for i in range(0, len(paths), FILES_PER_COMMIT)]
    last_files = [path for path in difference.missing if path in SENT_LAST]
    chunks += [last_files] if last_files else []
    return chunks or ([[]] if difference else [])


def _commit(
    folder: Path, repo: str, kind: str, branch: str, difference: Difference, message: str, journal: Journal
) -> None:
    hub = load()
    operations = [hub.CommitOperationAdd(path, folder / path) for path in difference.missing]
    operations += [hub.CommitOperationDelete(path) for path in difference.surplus]
    size = sum((folder / path).stat().st_size for path in difference.missing)
    with translate_errors(f"uploading to {repo}@{branch}"), limits.transfer(size):
        commit_info = api().create_commit(repo, operations, commit_message=message, repo_type=kind, revision=branch)
        with parsing():
            commit = commit_info.oid
    journal.write("create_commit", repo=repo, kind=kind, branch=branch, commit=commit, files=difference.missing)


def _tree(repo: str, kind: str, revision: str) -> dict[str, str]:
    """{path: git blob id, or SHA-256 of an LFS file} of a revision."""
    with translate_errors(f"reading {repo}@{revision}"):
        entries = api().list_repo_tree(repo, recursive=True, revision=revision, repo_type=kind)
        with parsing():
            return {e.path: (e.lfs.sha256 if e.lfs else e.blob_id) for e in entries if hasattr(e, "blob_id")}


def _file_ids(path: Path) -> tuple[str, str]:
    """The two names under which a Hub may know a file: its SHA-256 and its git blob id."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return sha256_file(path), digest.hexdigest()
