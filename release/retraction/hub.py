"""Brings the repositories of a retracted release on the Hub to the state of the folder, and removes their history."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import CheckFailed
from pipeline.hub.client import RemoteRepository, api, translate_errors
from release.facts.tombstones import Tombstone
from release.hub.publish import space_of
from release.hub.upload import Destination, Journal, Progress
from release.repositories import repositories
from release.schema import ReleaseInfo


def preview(release: Path, info: ReleaseInfo, tombstone: Tombstone) -> Iterator[str]:
    """Yields a sentence for each change that `update` would make on the Hub."""
    space = space_of(info)
    with translate_errors(f"reading {space.id}"):
        if space.exists():
            yield f"{space.id}, the Space of the page, would be deleted"
    for destination in _destinations(release, info, tombstone):
        remote, branch = destination.remote, destination.branch
        with translate_errors(f"reading {remote.id}"):
            if not remote.exists() or branch not in remote.refs().branches:
                yield f"{remote.id}@{branch} is not published"
                continue
        yield f"{remote.id}@{branch} would be rewritten, its history squashed, and old LFS objects deleted"


def update(release: Path, info: ReleaseInfo, tombstone: Tombstone, progress: Progress) -> Iterator[str]:
    """Brings every changed branch to the state of the folder, and leaves no way to its old files.

    Yields a sentence for each change. An interrupted update may run again: nothing that is done is repeated.
    """
    yield from _delete_space(space_of(info), _journal(release))
    published: dict[str, RemoteRepository] = {}
    for destination in _destinations(release, info, tombstone):
        remote, branch = destination.remote, destination.branch
        with translate_errors(f"reading {remote.id}"):
            if not remote.exists() or branch not in remote.refs().branches:
                yield f"{remote.id}@{branch} is not published"
                continue
        published[remote.id] = remote
        progress(f"rewriting {remote.id}@{branch}")
        # The tag and the history would keep the old files; the tag is made again at the squashed commit.
        _drop_tag(destination)
        destination.replace_files()
        _squash(destination)
        if branch == "main":
            with translate_errors(f"tagging {remote.id}"):
                destination.tag_main(remote.refs().branches[branch])
        yield f"{remote.id}@{branch} is rewritten"
    # Branches of one repository share objects, so these go when all branches are rewritten.
    for remote in published.values():
        yield from _delete_lfs(remote, _journal(release))


def _delete_space(space: RemoteRepository, journal: Journal) -> Iterator[str]:
    """Deletes the Space of the page, which has texts of documents: a retracted release has no page."""
    with translate_errors(f"deleting {space.id}"):
        if space.exists():
            api().delete_repo(space.id, repo_type=space.kind)
            journal.write("delete_repo", repo=space.id, kind=space.kind)
            yield f"{space.id}, the Space of the page, is deleted"


def _journal(release: Path) -> Journal:
    # The journal of the publication, beside the release.
    return Journal(release.with_name(f"{release.name}.publish.jsonl"))


def _destinations(release: Path, info: ReleaseInfo, tombstone: Tombstone) -> list[Destination]:
    changed, destinations = {row.folder for row in tombstone.repositories}, []
    for place in repositories(release):
        if place.folder in changed:
            remote = RemoteRepository(place.id(info.namespace, info.name), place.kind)
            destinations.append(Destination(release, place, remote, info.tag, _journal(release)))
    return destinations


def _drop_tag(destination: Destination) -> None:
    """Deletes the version's tag if it has other files than the folder."""
    remote, tag = destination.remote, destination.tag
    with translate_errors(f"reading {remote.id}"):
        if destination.branch != "main" or tag not in remote.refs().tags:
            return
    # The tag was moved by an earlier attempt.
    if not destination.differs(tag):
        return
    with translate_errors(f"deleting {remote.id}@{tag}"):
        api().delete_tag(remote.id, tag=tag, repo_type=remote.kind)
    destination.journal.write("delete_tag", repo=remote.id, kind=remote.kind, tag=tag)


def _squash(destination: Destination) -> None:
    """Leaves one commit of a branch. Raises CheckFailed if the branch then has other files than the folder."""
    remote, branch = destination.remote, destination.branch
    # Only squashing removes old files from the history; a new commit would leave them there.
    with translate_errors(f"squashing {remote.id}@{branch}"):
        commits = api().list_repo_commits(remote.id, repo_type=remote.kind, revision=branch)
        # The squash was done by an earlier attempt.
        if len(commits) > 1:
            api().super_squash_history(
                remote.id, repo_type=remote.kind, branch=branch, commit_message="Retracted on request"
            )
            destination.journal.write("super_squash_history", repo=remote.id, kind=remote.kind, branch=branch)
    if destination.differs(branch):
        raise CheckFailed(f"{remote.id}@{branch} is not what was uploaded; run atom retract again")


def _delete_lfs(remote: RemoteRepository, journal: Journal) -> Iterator[str]:
    """Deletes the LFS objects of a repository that no branch and no tag has. Yields a sentence about other tags."""
    with translate_errors(f"deleting LFS objects of {remote.id}"):
        refs = remote.refs()
        revisions = {*refs.branches.values(), *refs.tags.values()}
        used = {file.id for revision in revisions for file in remote.files(revision).values()}
        unused = [row for row in api().list_lfs_files(remote.id, repo_type=remote.kind) if row.file_oid not in used]
        if unused:
            api().permanently_delete_lfs_files(remote.id, unused, repo_type=remote.kind)
            objects = sorted(row.file_oid for row in unused)
            journal.write("permanently_delete_lfs_files", repo=remote.id, kind=remote.kind, objects=objects)
            yield f"{remote.id}: {len(unused)} LFS objects are deleted"
    # A tag of another version has a commit of its own, which the squash of a branch leaves.
    heads = set(refs.branches.values())
    for tag in sorted(tag for tag, commit in refs.tags.items() if commit not in heads):
        yield f"{remote.id}@{tag} is of another release, and keeps its files; retract that release as well"
