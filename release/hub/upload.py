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
from release.hub.client import api, endpoint, load, parsing, plainly
from release.layout import PUBLIC_KEY, SIGNATURE, SUMS, Repository, files_of

FILES_PER_COMMIT = 50
LAST = (SUMS, PUBLIC_KEY, SIGNATURE)
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

    def write(self, call: str, **what: Any) -> None:
        row = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "endpoint": endpoint(), "call": call, **what}
        with open(self.path, "a") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Difference:
    """What a revision lacks of a folder, and has too much."""

    missing: list[str]
    surplus: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus)


def staging(tag: str, branch: str) -> str:
    return f"upload-{tag}" + ("" if branch == "main" else f"-{branch}")


def refuse_other_bytes(release: Path, place: Repository, repo: str, tag: str) -> None:
    """Raises AtomError if the version is on the Hub with another checksum file. Changes nothing."""
    with plainly(f"reading {repo}"):
        if place.branch != "main" or not api().repo_exists(repo, repo_type=place.kind):
            return
        refs = api().list_repo_refs(repo, repo_type=place.kind)
        with parsing():
            tags = {t.name for t in refs.tags}
        if tag not in tags:
            return
        there = _tree(repo, place.kind, tag)
    if there.get(SUMS) not in _identities(release / place.folder / SUMS):
        raise _other_bytes(repo, tag)


def upload(release: Path, place: Repository, repo: str, tag: str, journal: Journal, progress: Progress) -> Published:
    """Sends what a revision of a repository lacks: to its own branch, or to a staging branch if it is public."""
    client = api()
    with plainly(f"creating {repo}"):
        if not client.repo_exists(repo, repo_type=place.kind):
            client.create_repo(repo, repo_type=place.kind, private=True, exist_ok=True)
            journal.write("create_repo", repo=repo, kind=place.kind, private=True)
        info = client.repo_info(repo, repo_type=place.kind)
        with parsing():
            public = not info.private
        heads = _heads(repo, place.kind)
    folder = release / place.folder
    last = [path for path in LAST if (folder / path).exists()]
    wanted = {path: _identities(folder / path) for path in [*files_of(release, place), *last]}
    branch = place.branch
    difference = _difference(wanted, repo, place.kind, branch if branch in heads else None)
    if public and difference:
        branch = staging(tag, place.branch)
    _branch(repo, place.kind, branch, heads.get(place.branch), journal)
    if branch != place.branch:
        difference = _difference(wanted, repo, place.kind, branch)
    sent = 0
    chunks = _chunks(difference)
    for number, chunk in enumerate(chunks, 1):
        part = Difference(chunk, difference.surplus if number == 1 else [])
        _commit(folder, repo, place.kind, branch, part, f"Release part {number} of {len(chunks)}", journal)
        sent += len(chunk)
        progress(f"{repo}@{branch}: {sent} of {len(difference.missing)} files sent")
    return Published(repo, place.kind, branch, _heads(repo, place.kind)[branch], sent)


def promote(release: Path, place: Repository, done: Published, journal: Journal) -> Published:
    """Makes the place's own branch equal to the verified staging branch; does nothing where there is none."""
    if done.revision == place.branch:
        return done
    heads = _heads(done.repo, done.kind)
    _branch(done.repo, done.kind, place.branch, heads.get(place.branch), journal)
    verified = _tree(done.repo, done.kind, done.commit)
    wanted = {path: (name, name) for path, name in verified.items() if path != ".gitattributes"}
    # One commit, whatever its size: a reader sees the old release or the new one, never a mixture.
    if difference := _difference(wanted, done.repo, done.kind, place.branch):
        _commit(release / place.folder, done.repo, done.kind, place.branch, difference, "Verified release", journal)
    head = _heads(done.repo, done.kind)[place.branch]
    if _tree(done.repo, done.kind, head) != verified:
        raise CheckFailed(f"{done.repo}@{place.branch} is not what was verified in {done.revision}; publish again")
    return replace(done, revision=place.branch, commit=head)


def tag_mains(published: list[Published], tag: str, journal: Journal) -> None:
    """Tags each main branch with the version. A version is published once: other bytes need another version."""
    client = api()
    for done in published:
        if done.revision != "main":
            continue
        with plainly(f"tagging {done.repo}"):
            refs = client.list_repo_refs(done.repo, repo_type=done.kind)
            with parsing():
                tags = {t.name: t.target_commit for t in refs.tags}
            if tag not in tags:
                client.create_tag(done.repo, tag=tag, revision=done.commit, repo_type=done.kind, exist_ok=True)
                journal.write("create_tag", repo=done.repo, kind=done.kind, tag=tag, commit=done.commit)
                continue
        if tags[tag] != done.commit and _tree(done.repo, done.kind, tag) != _tree(done.repo, done.kind, done.commit):
            raise _other_bytes(done.repo, tag)


def clear_staging(places: list[Repository], published: list[Published], tag: str, journal: Journal) -> None:
    """Deletes the staging branches of this version, those of an interrupted publication too."""
    for place, done in zip(places, published, strict=True):
        branch = staging(tag, place.branch)
        with plainly(f"deleting {done.repo}@{branch}"):
            if branch in _heads(done.repo, done.kind):
                api().delete_branch(done.repo, repo_type=done.kind, branch=branch)
                journal.write("delete_branch", repo=done.repo, kind=done.kind, branch=branch)


def _other_bytes(repo: str, tag: str) -> AtomError:
    return AtomError(f"{repo} has a tag {tag} with other bytes; raise the recipe's version and build again")


def _heads(repo: str, kind: str) -> dict[str, str]:
    """{branch: commit}"""
    with plainly(f"reading {repo}"):
        refs = api().list_repo_refs(repo, repo_type=kind)
        with parsing():
            return {b.name: b.target_commit for b in refs.branches}


def _branch(repo: str, kind: str, branch: str, start: str | None, journal: Journal) -> None:
    """Makes a branch if there is none, from `start` or from the repository's first commit."""
    if branch in _heads(repo, kind):
        return
    with plainly(f"creating {repo}@{branch}"):
        commits = [] if start else api().list_repo_commits(repo, repo_type=kind)
        with parsing():
            start = start or commits[-1].commit_id
        api().create_branch(repo, repo_type=kind, branch=branch, revision=start, exist_ok=True)
        journal.write("create_branch", repo=repo, kind=kind, branch=branch)


def _difference(wanted: dict[str, tuple[str, str]], repo: str, kind: str, revision: str | None) -> Difference:
    there = _tree(repo, kind, revision) if revision else {}
    missing = [path for path, names in wanted.items() if there.get(path) not in names]
    return Difference(missing, sorted(set(there) - set(wanted) - {".gitattributes"}))


def _chunks(difference: Difference) -> list[list[str]]:
    """Paths by commit; checksum file and signature go last and alone, so that a cut upload is seen to be one."""
    paths = [path for path in difference.missing if path not in LAST]
    chunks = [paths[i : i + FILES_PER_COMMIT] for i in range(0, len(paths), FILES_PER_COMMIT)]
    last = [path for path in difference.missing if path in LAST]
    chunks += [last] if last else []
    return chunks or ([[]] if difference else [])


def _commit(folder: Path, repo: str, kind: str, branch: str, what: Difference, message: str, journal: Journal) -> None:
    hub = load()
    operations = [hub.CommitOperationAdd(path, folder / path) for path in what.missing]
    operations += [hub.CommitOperationDelete(path) for path in what.surplus]
    size = sum((folder / path).stat().st_size for path in what.missing)
    with plainly(f"uploading to {repo}@{branch}"), limits.transfer(size):
        made = api().create_commit(repo, operations, commit_message=message, repo_type=kind, revision=branch)
        with parsing():
            commit = made.oid
    journal.write("create_commit", repo=repo, kind=kind, branch=branch, commit=commit, files=what.missing)


def _tree(repo: str, kind: str, revision: str) -> dict[str, str]:
    """{path: git blob id, or SHA-256 of an LFS file} of a revision."""
    with plainly(f"reading {repo}@{revision}"):
        entries = api().list_repo_tree(repo, recursive=True, revision=revision, repo_type=kind)
        with parsing():
            return {e.path: (e.lfs.sha256 if e.lfs else e.blob_id) for e in entries if hasattr(e, "blob_id")}


def _identities(path: Path) -> tuple[str, str]:
    """The two names under which a Hub may know a file: its SHA-256 and its git blob id."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return sha256_file(path), digest.hexdigest()
