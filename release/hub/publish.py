"""`atom publish`: a release to the Hub in stages, so that nothing half-uploaded is ever public.

1. private repositories, filled in commits of at most 50 files, the checksum file of each last; what a public
   repository lacks goes to a staging branch (see `upload`);
2. everything pulled back into a temporary folder and verified, moved from the staging branches, and tagged;
3. only then, and only if asked, public in the order data, checkpoints, models, collection.

Each call that changes something is written to `<release>.publish.jsonl` beside the release. The Hub itself is the
memory: a second run sends only what differs, so an interrupted publication is finished by running it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from release import schema, scratch
from release.audit.verify import verify
from release.hub.client import api, endpoint, parsing, translate_errors
from release.hub.pull import pull
from release.hub.upload import (
    Journal,
    Progress,
    Published,
    clear_staging,
    promote,
    refuse_changed_version,
    tag_mains,
    upload,
)
from release.layout import PUBLIC_KEY, RELEASE, SIGNATURE
from release.repositories import Repository, repositories
from release.signing import ANYONE, Trust


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
    release_info = schema.read_release(release)
    _require_publishable(release_info, namespace, public, acknowledge)
    with translate_errors("asking who the token belongs to"):
        api().whoami()

    journal = Journal(release.with_name(f"{release.name}.publish.jsonl"))
    report = PublishReport(endpoint(), namespace, f"v{release_info['version']}", public)
    release_repositories = repositories(release)
    repos = [repository.id(namespace, release_info["name"]) for repository in release_repositories]
    for repository, repo in zip(release_repositories, repos, strict=True):
        refuse_changed_version(release, repository, repo, report.tag)
    for repository, repo in zip(release_repositories, repos, strict=True):
        report.repositories.append(upload(release, repository, repo, report.tag, journal, progress))
    _verify_published(release, release_repositories, report, progress)
    journal.write("verified", repositories=[asdict(row) for row in report.repositories])
    pairs = zip(release_repositories, report.repositories, strict=True)
    report.repositories = [promote(release, repository, revision, journal) for repository, revision in pairs]
    tag_mains(report.repositories, report.tag, journal)
    clear_staging(release_repositories, report.repositories, report.tag, journal)
    if public:
        _make_public(report, release_info, journal, progress)
    return report


def _require_publishable(
    release_info: dict[str, Any], namespace: str, public: bool, acknowledge: Sequence[str]
) -> None:
    if (card_namespace := release_info["namespace"]) != namespace:
        raise AtomError(
            f"the cards of this release name repositories of {card_namespace}; publish to {card_namespace}, "
            f"or set release.namespace: {namespace} in the recipe and build again"
        )
    doubts = [*release_info["stale"], *(["dirty"] if release_info["dirty"] else [])]
    open_doubts = [name for name in doubts if name not in acknowledge]
    if public and open_doubts:
        reason = (
            "was made by other code than today's" if open_doubts[0] != "dirty" else "checkout had uncommitted changes"
        )
        raise AtomError(
            f"{open_doubts[0]} {reason}; make it again, or acknowledge it by name: {', '.join(open_doubts)}"
        )


def _verify_published(
    release: Path, release_repositories: list[Repository], report: PublishReport, progress: Progress
) -> None:
    """Downloads every repository at the commit just made, into the shape of the release, and verifies that."""
    with scratch.folder() as temporary:
        copy = temporary / release.name
        for repository, revision in sorted(
            zip(release_repositories, report.repositories, strict=True), key=lambda pair: pair[0].folder
        ):
            progress(f"pulling back {revision.repo}@{revision.revision}")
            pull(revision.repo, revision.kind, revision.commit, copy / repository.folder)
        for leftover in [*copy.rglob(".cache"), *copy.rglob(".gitattributes")]:
            _remove(leftover)
        progress("verifying what came back")
        key = release / PUBLIC_KEY
        verdict = verify(copy, trust=Trust(str(key)) if key.exists() else ANYONE)
        verdict.subject = f"{endpoint()}/{report.namespace}"
        verdict.require()
        for name in (
            f"{repository.folder}/{file}" for repository in release_repositories for file in (SIGNATURE, PUBLIC_KEY)
        ):
            if _read_if_file(copy / name) != _read_if_file(release / name):  # no checksum covers them
                raise CheckFailed(f"{verdict.subject}: {name} did not come back as it was sent; publish again")
        if (copy / RELEASE).read_bytes() != (release / RELEASE).read_bytes():
            raise CheckFailed(f"{verdict.subject}: what came back is another release; publish again")


def _read_if_file(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _make_public(report: PublishReport, release_info: dict[str, Any], journal: Journal, progress: Progress) -> None:
    """Public, in the order of `repositories`: data first, so that no model is ever public without its data."""
    client = api()
    for revision in report.repositories:
        if revision.revision != "main":
            continue
        with translate_errors(f"making {revision.repo} public"):
            info = client.repo_info(revision.repo, repo_type=revision.kind)
            with parsing():
                private = info.private
            if private:
                client.update_repo_settings(revision.repo, repo_type=revision.kind, private=False)
                journal.write("make_public", repo=revision.repo, kind=revision.kind)
        progress(f"{revision.repo} is public")
    with translate_errors("making the collection"):
        title = f"{release_info['title']} {release_info['version']}"
        collection = client.create_collection(title, namespace=report.namespace, private=False, exists_ok=True)
        with parsing():
            slug = str(collection.slug)
        for revision in report.repositories:
            if revision.revision == "main":
                client.add_collection_item(slug, revision.repo, revision.kind, exists_ok=True)
    journal.write("collection", slug=slug)
    report.collection = slug
