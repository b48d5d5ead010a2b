"""`atom publish`: uploads a release to the Hub in stages, so that no partial upload is ever public.

1. Private repositories are filled in commits of at most 50 files (more in a large upload), the checksum file of each
   last. The missing files of a public repository go to a staging branch (see `upload`).
2. Everything is pulled back into a temporary folder and verified, moved from the staging branches, and tagged. The page
   is published as a Space (see `space`).
3. Only then, and only with `--public`, the repositories become public, in the order data, checkpoints, models, Space,
   collection.

Each changing call is recorded in `<release>.publish.jsonl` beside the release. No other state is kept: a second run
uploads only the differences to the Hub, so it finishes an interrupted publication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.hub.client import Changed, RemoteRepository, api, endpoint, translate_errors
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
    """A finished publication.

    Attributes:
        endpoint: The address of the Hub.
        namespace: The owner of the repositories.
        tag: The tag of the version.
        public: True if everybody may read them.
        repositories: In the order of `repositories`, then the Space if the release has a page.
        collection: The slug of the collection, if the release is public.
    """

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

    Args:
        release: The release folder.
        namespace: The owner of the repositories.
        public: Makes them public at the end.
        progress: Gets a sentence for each step.
        acknowledge: Stale nodes, and `dirty` for a changed checkout, that may be made public anyway.

    Raises:
        AtomError: For a refused token, an unreachable endpoint, another namespace than the release's, a version that
            is published with different bytes, or a certificate of a replay that is not about the release.
        CheckFailed: If the release, or its copy pulled from the Hub, is not valid.
    """
    release = release.resolve()
    if not (release / RELEASE).is_file():
        raise AtomError(f"{release} is not a release folder; make one with `atom build`")
    progress("verifying the release before anything is sent")
    # A release that is not valid here would be found invalid after the upload.
    verify(release).require()
    release_info = schema.read_release(release)
    _require_publishable(release_info, namespace, public, acknowledge)
    certificates = read_certificates(release)
    # A token that the Hub refuses shows here, before anything is sent.
    with translate_errors("asking who the token belongs to"):
        api().whoami()

    tag, journal = release_info.tag, Journal(release.with_name(f"{release.name}.publish.jsonl"))
    destinations = []
    for repository in repositories(release):
        remote = RemoteRepository(repository.id(namespace, release_info.name), repository.kind)
        destinations.append(Destination(release, repository, remote, tag, journal))
    # Everything that can be refused is refused before the first byte is sent.
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
        # The Space follows the release, since it may show replays that came later.
        space = publish_space(release, release_info, certificates, journal, progress)
    except Changed as error:
        raise AtomError(
            f"{error}: another publication is at work, or was just now; run this again once it has ended"
        ) from None
    mains = [destination.remote for destination in destinations if destination.branch == "main"]
    if space:
        published.append(space)
        mains.append(RemoteRepository(space.repo, space.kind))
    collection = None
    if public:
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
        reason = "was made by other code than today's"
        if open_doubts[0] == "dirty":
            reason = "checkout had uncommitted changes"
        names = ", ".join(open_doubts)
        raise AtomError(f"{open_doubts[0]} {reason}; make it again, or acknowledge it by name: {names}")


def _verify_published(
    release: Path, subject: str, destinations: Sequence[Destination], staged: Sequence[Published], progress: Progress
) -> None:
    """Downloads every repository at its new commit, in the layout of the release, and verifies the copy.

    Raises CheckFailed if the copy differs from the uploaded release, which messages call `subject`.
    """
    with scratch.folder() as temporary:
        copy = temporary / release.name
        # The release itself comes first: its folder holds those of the others.
        pairs = zip(destinations, staged, strict=True)
        for destination, revision in sorted(pairs, key=lambda pair: pair[0].repository.folder):
            progress(f"pulling back {revision.repo}@{revision.revision}")
            pull(destination.remote, revision.commit, copy / destination.repository.folder)
        remove_client_files(copy)
        progress("verifying what was pulled back")
        # A signed release must be signed by the same key on the Hub.
        key = release / PUBLIC_KEY
        verdict = verify(copy, trust=Trust(str(key)) if key.exists() else ANYONE)
        verdict.subject = subject
        verdict.require()

        # No checksum covers signatures and keys.
        folders = [destination.repository.folder for destination in destinations]
        for name in (f"{folder}/{file}" for folder in folders for file in (SIGNATURE, PUBLIC_KEY)):
            if _read_if_file(copy / name) != _read_if_file(release / name):
                raise CheckFailed(f"{verdict.subject}: {name} differs from the uploaded file; publish again")
        # The copy may be valid and another release.
        if (copy / RELEASE).read_bytes() != (release / RELEASE).read_bytes():
            raise CheckFailed(f"{verdict.subject}: what was pulled back is another release; publish again")


def _read_if_file(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _make_public(mains: Sequence[RemoteRepository], journal: Journal, progress: Progress) -> None:
    """Makes repositories public in their order: data first, so that no model is ever public without its data."""
    for remote in mains:
        with translate_errors(f"making {remote.id} public"):
            # A second run finds some of them public already.
            if remote.is_private():
                api().update_repo_settings(remote.id, repo_type=remote.kind, private=False)
                journal.write("make_public", repo=remote.id, kind=remote.kind)
        progress(f"{remote.id} is public")


def _make_collection(mains: Sequence[RemoteRepository], title: str, namespace: str, journal: Journal) -> str:
    """Makes the collection of the repositories, or completes it. Returns its slug."""
    client = api()
    with translate_errors("making the collection"):
        # It may exist: a second run completes what an interrupted one began.
        collection = client.create_collection(title, namespace=namespace, private=False, exists_ok=True)
        slug = str(collection.slug)
        for remote in mains:
            client.add_collection_item(slug, remote.id, remote.kind, exists_ok=True)
    journal.write("collection", slug=slug)
    return slug
