"""`atom publish`: a release to the Hub in stages, so that nothing half-uploaded is ever public.

1. private repositories, filled in commits of at most 50 files, the checksum file of each last;
2. everything pulled back into a temporary folder and verified, and tagged with the version;
3. only then, and only if asked, public in the order data, checkpoints, models, collection.

Each call that changes something is written to `<release>.publish.jsonl` beside the release. The Hub itself is the
memory: a second run sends only what differs, so an interrupted publication is finished by running it again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import AtomError, CheckFailed
from pipeline.store import sha256_file
from release.hub_client import api, endpoint, load, plainly
from release.layout import RELEASE, SUMS, Repository, files_of, repositories
from release.pull import pull
from release.verify import verify

FILES_PER_COMMIT = 50
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Published:
    """One revision of one repository as it is on the Hub now."""

    repo: str
    kind: str
    revision: str
    commit: str
    files_sent: int


@dataclass
class PublishReport:
    """What a publication did. `collection` is its slug, if the release is public."""

    endpoint: str
    namespace: str
    tag: str
    public: bool
    repositories: list[Published] = field(default_factory=list)
    collection: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Journal:
    """One JSON line a call that changed something on the Hub."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, call: str, **what: Any) -> None:
        row = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "endpoint": endpoint(), "call": call, **what}
        with open(self.path, "a") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")


def publish(
    release: Path,
    namespace: str,
    public: bool = False,
    progress: Progress = lambda text: None,
    acknowledge: Sequence[str] = (),
) -> PublishReport:
    """Publishes a release folder under `namespace` at HF_ENDPOINT with HF_TOKEN. Without `public` all stays private.

    `acknowledge`: names of stale nodes, and `dirty` for a changed checkout, that may be made public nevertheless.
    Raises AtomError for a refused token, an unreachable endpoint, a namespace that is not ours, a version that is
    published with other bytes; CheckFailed if the release, or what comes back from the Hub, is not sound.
    """
    release = release.resolve()
    if not (release / RELEASE).is_file():
        raise AtomError(f"{release} is not a release folder; make one with `atom build`")
    progress("verifying the release before anything is sent")
    verify(release).require()
    about = json.loads((release / RELEASE).read_text())
    _publishable(about, namespace, public, acknowledge)
    with plainly("asking who the token belongs to"):
        api().whoami()

    journal = Journal(release.with_name(f"{release.name}.publish.jsonl"))
    report = PublishReport(endpoint(), namespace, f"v{about['version']}", public)
    places = repositories(release)
    for place in places:
        report.repositories.append(_upload(release, place, place.id(namespace, about["name"]), journal, progress))
    _pull_back(release, places, report, progress)
    journal.write("verified", repositories=[asdict(row) for row in report.repositories])
    _tag(places, report, journal)
    if public:
        _open(report, about, journal, progress)
    return report


def _publishable(about: dict[str, Any], namespace: str, public: bool, acknowledge: Sequence[str]) -> None:
    if about["namespace"] != namespace:
        raise AtomError(
            f"the cards of this release name repositories of {about['namespace']}; publish to {about['namespace']}, "
            f"or set release.namespace: {namespace} in the recipe and build again"
        )
    doubts = [*about["stale"], *(["dirty"] if about["dirty"] else [])]
    open_doubts = [name for name in doubts if name not in acknowledge]
    if public and open_doubts:
        why = "was made by other code than today's" if open_doubts[0] != "dirty" else "checkout had uncommitted changes"
        raise AtomError(f"{open_doubts[0]} {why}; make it again, or acknowledge it by name: {', '.join(open_doubts)}")


def _upload(release: Path, place: Repository, repo: str, journal: Journal, progress: Progress) -> Published:
    """Makes a revision of a repository equal to its folder, sending only what differs."""
    hub, client = load(), api()
    with plainly(f"creating {repo}"):
        if not client.repo_exists(repo, repo_type=place.kind):
            client.create_repo(repo, repo_type=place.kind, private=True)
            journal.write("create_repo", repo=repo, kind=place.kind, private=True)
        if place.branch != "main" and place.branch not in {
            b.name for b in client.list_repo_refs(repo, repo_type=place.kind).branches
        }:
            first = client.list_repo_commits(repo, repo_type=place.kind)[-1].commit_id
            client.create_branch(repo, repo_type=place.kind, branch=place.branch, revision=first)
            journal.write("create_branch", repo=repo, kind=place.kind, branch=place.branch)
    folder = release / place.folder
    wanted = [*files_of(release, place), SUMS]
    with plainly(f"reading {repo}@{place.branch}"):
        there = _remote(client, repo, place)
    missing = [path for path in wanted if there.get(path) not in _identities(folder / path)]
    surplus = sorted(set(there) - set(wanted) - {".gitattributes"})
    # The checksum file goes last, so that a cut upload is seen to be one.
    chunks = [missing[i : i + FILES_PER_COMMIT] for i in range(0, len(missing), FILES_PER_COMMIT)]
    if SUMS in missing and len(missing) > 1:
        chunks = [[path for path in chunk if path != SUMS] for chunk in chunks]
        chunks = [chunk for chunk in chunks if chunk] + [[SUMS]]
    sent = 0
    for number, chunk in enumerate(chunks or ([[]] if surplus else []), 1):
        operations = [hub.CommitOperationAdd(path, folder / path) for path in chunk]
        operations += [hub.CommitOperationDelete(path) for path in surplus] if number == 1 else []
        with plainly(f"uploading to {repo}@{place.branch}"):
            made = client.create_commit(
                repo,
                operations,
                commit_message=f"Release part {number} of {max(len(chunks), 1)}",
                repo_type=place.kind,
                revision=place.branch,
            )
        sent += len(chunk)
        journal.write("create_commit", repo=repo, kind=place.kind, branch=place.branch, commit=made.oid, files=chunk)
        progress(f"{repo}@{place.branch}: {sent} of {len(missing)} files sent")
    with plainly(f"reading {repo}@{place.branch}"):
        commit = client.repo_info(repo, repo_type=place.kind, revision=place.branch).sha
    return Published(repo, place.kind, place.branch, commit, sent)


def _remote(client: Any, repo: str, place: Repository) -> dict[str, str]:
    """{path: git blob id, or SHA-256 of an LFS file} of a revision."""
    entries = client.list_repo_tree(repo, recursive=True, revision=place.branch, repo_type=place.kind)
    return {e.path: (e.lfs.sha256 if e.lfs else e.blob_id) for e in entries if hasattr(e, "blob_id")}


def _identities(path: Path) -> tuple[str, str]:
    """The two names under which a Hub may know a file: its SHA-256 and its git blob id."""
    import hashlib

    size = path.stat().st_size
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return sha256_file(path), digest.hexdigest()


def _pull_back(release: Path, places: list[Repository], report: PublishReport, progress: Progress) -> None:
    """Downloads every repository at the commit just made, into the shape of the release, and verifies that."""
    with tempfile.TemporaryDirectory(prefix="atom-publish-") as temporary:
        copy = Path(temporary) / release.name
        for place, done in sorted(zip(places, report.repositories, strict=True), key=lambda pair: pair[0].folder):
            progress(f"pulling back {done.repo}@{done.revision}")
            pull(done.repo, done.kind, done.commit, copy / place.folder)
        for leftover in [*copy.rglob(".cache"), *copy.rglob(".gitattributes")]:
            _remove(leftover)
        progress("verifying what came back")
        verdict = verify(copy)
        verdict.subject = f"{endpoint()}/{report.namespace}"
        verdict.require()
        if (copy / RELEASE).read_bytes() != (release / RELEASE).read_bytes():
            raise CheckFailed(f"{verdict.subject}: what came back is another release; publish again")


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _tag(places: list[Repository], report: PublishReport, journal: Journal) -> None:
    """Tags each main branch with the version. A version is published once: other bytes need another version."""
    client = api()
    for done in report.repositories:
        if done.revision != "main":
            continue
        with plainly(f"tagging {done.repo}"):
            tags = {t.name: t.target_commit for t in client.list_repo_refs(done.repo, repo_type=done.kind).tags}
            if report.tag not in tags:
                client.create_tag(done.repo, tag=report.tag, revision=done.commit, repo_type=done.kind)
                journal.write("create_tag", repo=done.repo, kind=done.kind, tag=report.tag, commit=done.commit)
            elif tags[report.tag] != done.commit:
                raise AtomError(
                    f"{done.repo} has a tag {report.tag} with other bytes; raise the recipe's version and build again"
                )


def _open(report: PublishReport, about: dict[str, Any], journal: Journal, progress: Progress) -> None:
    """Public, in the order of `repositories`: data first, so that no model is ever public without its data."""
    client = api()
    for done in report.repositories:
        if done.revision != "main":
            continue
        with plainly(f"making {done.repo} public"):
            if client.repo_info(done.repo, repo_type=done.kind).private:
                client.update_repo_settings(done.repo, repo_type=done.kind, private=False)
                journal.write("make_public", repo=done.repo, kind=done.kind)
        progress(f"{done.repo} is public")
    with plainly("making the collection"):
        title = f"{about['title']} {about['version']}"
        collection = client.create_collection(title, namespace=report.namespace, private=False, exists_ok=True)
        for done in report.repositories:
            if done.revision == "main":
                client.add_collection_item(collection.slug, done.repo, done.kind, exists_ok=True)
    journal.write("collection", slug=collection.slug)
    report.collection = collection.slug
