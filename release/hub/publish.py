"""`atom publish`: uploads a release to the Hub in stages, so that no partial upload is ever public.

1. private repositories, filled in commits of at most 50 files, the checksum file of each last; the missing files of a
public repository go to a staging branch (see `upload`); 2. everything pulled back into a temporary folder and verified,
moved from the staging branches, and tagged; the page, as a Space (see `space`); 3. only then, and only with
`--public`, public in the order data, checkpoints, models, Space, collection.

Each changing call is recorded in `<release>.publish.jsonl` beside the release. No other state is kept: a second run
uploads only the differences to the Hub, so it finishes an interrupted publication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.hub.client import Changed, api, endpoint, parsing, translate_errors
from pipeline.hub.remote import RemoteRepository
from release import schema, scratch
from release.audit.replay.report import read_certificates
from release.audit.verify import verify
from release.hub.space import publish_space
from release.hub.upload import Destination, Journal, Progress, Published
from release.layout import PUBLIC_KEY, RELEASE, SIGNATURE
from release.pull import pull, remove_client_files
from release.repositories import repositories
from release.schema import ReleaseInfo
from release.signing import ANYONE, Trust


@dataclass(frozen=True)
class PublishReport:
    """A finished publication. tag: of its version. repositories: in the order of `repositories`, then the Space if the
    release has a page. collection: its slug, if the release is public."""

    endpoint: str
    namespace: str
    tag: str
    public: bool
    repositories: list[Published]
    collection: str | None

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

    acknowledge: names of stale nodes, and `dirty` for a changed checkout, that may be made public anyway.

    Raises AtomError for a refused token, an unreachable endpoint, another namespace than the release's, a version that
    is published with different bytes, or a certificate of a replay that is not about the release; CheckFailed if the
    release, or its copy pulled from the Hub, is not valid.
    """
    release = release.resolve()
    if not (release / RELEASE).is_file():
        raise AtomError(f"{release} is not a release folder; make one with `atom build`")
    progress("verifying the release before anything is sent")
    verify(release).require()
    release_info = schema.read_release(release)
    _require_publishable(release_info, namespace, public, acknowledge)
    certificates = read_certificates(release)
    with translate_errors("asking who the token belongs to"):
        api().whoami()

    tag, journal = release_info.tag, Journal(release.with_name(f"{release.name}.publish.jsonl"))
    destinations = []
    for repository in repositories(release):
        remote = RemoteRepository(repository.id(namespace, release_info.name), repository.kind)
        destinations.append(Destination(release, repository, remote, tag, journal))
    for destination in destinations:
        destination.refuse_beyond_limits()
        destination.refuse_changed_version()
    try:
        staged = [destination.upload(progress) for destination in destinations]
        _verify_published(release, f"{endpoint()}/{namespace}", destinations, staged, progress)
        journal.write("verified", repositories=[asdict(row) for row in staged])
        published = [destination.promote(row) for destination, row in zip(destinations, staged, strict=True)]
        for destination, row in zip(destinations, published, strict=True):
            destination.tag_main(row.commit)
        for destination in destinations:
            destination.clear_staging()
        space = publish_space(release, release_info, certificates, journal, progress)
    except Changed as error:
        raise AtomError(
            f"{error}: another publication is at work, or was just now; run this again once it has ended"
        ) from None
    published += [space] if space else []
    collection = None
    if public:
        mains = [destination.remote for destination in destinations if destination.branch == "main"]
        mains += [RemoteRepository(space.repo, space.kind)] if space else []
        _make_public(mains, journal, progress)
        collection = _make_collection(mains, f"{release_info.title} {release_info.version}", namespace, journal)
    return PublishReport(endpoint(), namespace, tag, public, published, collection)


def _require_publishable(release_info: ReleaseInfo, namespace: str, public: bool, acknowledge: Sequence[str]) -> None:
    if (card_namespace := release_info.namespace) != namespace:
        raise AtomError(
            f"the cards of this release name repositories of {card_namespace}; publish to {card_namespace}, "
            f"or set release.namespace: {namespace} in the recipe and build again"
        )
    doubts = [*release_info.stale, *(["dirty"] if release_info.dirty else [])]
    open_doubts = [name for name in doubts if name not in acknowledge]
    if public and open_doubts:
        reason = (
            "was made by other code than today's" if open_doubts[0] != "dirty" else "checkout had uncommitted changes"
        )
        raise AtomError(
            f"{open_doubts[0]} {reason}; make it again, or acknowledge it by name: {', '.join(open_doubts)}"
        )


def _verify_published(
    release: Path, subject: str, destinations: Sequence[Destination], staged: Sequence[Published], progress: Progress
) -> None:
    """Downloads every repository at its new commit, in the layout of the release, and verifies the copy.

    subject: its name in messages. Raises CheckFailed if it differs from the uploaded release.
    """
    with scratch.folder() as temporary:
        copy = temporary / release.name
        pairs = zip(destinations, staged, strict=True)
        for destination, revision in sorted(pairs, key=lambda pair: pair[0].repository.folder):
            progress(f"pulling back {revision.repo}@{revision.revision}")
            pull(destination.remote, revision.commit, copy / destination.repository.folder)
        remove_client_files(copy)
        progress("verifying what was pulled back")
        key = release / PUBLIC_KEY
        verdict = verify(copy, trust=Trust(str(key)) if key.exists() else ANYONE)
        verdict.subject = subject
        verdict.require()
        folders = [destination.repository.folder for destination in destinations]
        for name in (f"{folder}/{file}" for folder in folders for file in (SIGNATURE, PUBLIC_KEY)):
            if _read_if_file(copy / name) != _read_if_file(release / name):  # no checksum covers them
                raise CheckFailed(f"{verdict.subject}: {name} differs from the uploaded file; publish again")
        if (copy / RELEASE).read_bytes() != (release / RELEASE).read_bytes():
            raise CheckFailed(f"{verdict.subject}: what was pulled back is another release; publish again")


def _read_if_file(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _make_public(mains: Sequence[RemoteRepository], journal: Journal, progress: Progress) -> None:
    """Makes repositories public in their order: data first, so that no model is ever public without its data."""
    for remote in mains:
        with translate_errors(f"making {remote.id} public"):
            if remote.is_private():
                api().update_repo_settings(remote.id, repo_type=remote.kind, private=False)
                journal.write("make_public", repo=remote.id, kind=remote.kind)
        progress(f"{remote.id} is public")


def _make_collection(mains: Sequence[RemoteRepository], title: str, namespace: str, journal: Journal) -> str:
    """Makes the collection of the repositories, or completes it. Returns its slug."""
    client = api()
    with translate_errors("making the collection"):
        collection = client.create_collection(title, namespace=namespace, private=False, exists_ok=True)
        with parsing():
            slug = str(collection.slug)
        for remote in mains:
            client.add_collection_item(slug, remote.id, remote.kind, exists_ok=True)
    journal.write("collection", slug=slug)
    return slug
