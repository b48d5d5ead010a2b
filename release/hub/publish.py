"""`atom publish`: uploads a release to the Hub in stages, so that no partial upload is ever public.

1. Private repositories are filled in commits of at most 50 files (more in a large upload), the checksum file of each
   last. The missing files of a public repository go to a staging branch (see `upload`).
2. Everything is pulled back into a temporary folder and verified, moved from the staging branches, and tagged. The page
   is published as a Space.
3. Only then, and only with `--public`, the repositories become public, in the order data, checkpoints, models, Space.

Each changing call is recorded in `<release>.publish.jsonl` beside the release. No other state is kept: a second run
uploads only the differences to the Hub, so it finishes an interrupted publication.

The Space of a release is its page as a static site:

    README.md                      the card: a static Space, with its models and its data
    index.html                     the page of the release, with links to the Hub and the list of replays
    replays/NAME.json              the certificates of replays by others, from `RELEASE.replays/` beside the release

Unlike the release, of which a version is published once, the Space follows the folder at each `atom publish`: new
certificates appear on it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.hub.client import PUBLIC_HUB, Changed, RemoteRepository, api, endpoint, load, translate_errors
from release import schema, scratch
from release.audit.replay.report import Certificate, read_certificates
from release.audit.verify import verify
from release.cards.render import license_fields
from release.cards.tables import count
from release.hub.upload import Destination, Journal, Progress, Published
from release.layout import MODEL, PAGE, PUBLIC_KEY, RELEASE, SIGNATURE, VARIANT
from release.repositories import Repository, repositories
from release.schema import CARD, ReleaseInfo
from release.scratch import pull, remove_client_files
from release.signing import ANYONE, Trust
from release.web_page.markdown_html import table
from release.web_page.page import NO_REPLAYS, differences

# The maximum number of characters of a Space's short description on the Hub.
DESCRIPTION = 60
# A link of the page to a file of the release; its path has the escapes of a URI.
LINK = re.compile(r'href="\.\./([^"]*)"')
# The end of the path of a file; NOTICE and LICENSE are files as well.
FILE = re.compile(r"(\.[A-Za-z0-9]+|(^|/)[A-Z][A-Za-z0-9]+)$")


@dataclass(frozen=True)
class PublishReport:
    """A finished publication.

    Attributes:
        endpoint: The address of the Hub.
        namespace: The owner of the repositories.
        tag: The tag of the version.
        public: True if everybody may read them.
        repositories: In the order of `repositories`, then the Space if the release has a page.
        collection: The slug of their collection, if the release is public.
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
    checked = verify(release)
    checked.require()
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
        _verify_published(release, checked.digest, f"{endpoint()}/{namespace}", destinations, staged, progress)
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
    release: Path,
    checked: str,
    subject: str,
    destinations: Sequence[Destination],
    staged: Sequence[Published],
    progress: Progress,
) -> None:
    """Downloads every repository at its new commit, in the layout of the release, and verifies the copy.

    `checked` is the digest of the release, whose content was checked before it was sent.

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
        verdict = verify(copy, trust=Trust(str(key)) if key.exists() else ANYONE, checked=checked)
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


def space_of(info: ReleaseInfo) -> RemoteRepository:
    """Returns the Space of a release, which need not exist."""
    return RemoteRepository(f"{info.repository}-page", "space")


def publish_space(
    release: Path, info: ReleaseInfo, certificates: list[Certificate], journal: Journal, progress: Progress
) -> Published | None:
    """Uploads the Space of a release, and compares it with the files that the Hub then serves.

    Returns:
        The revision of the Space; None if the release has no page.

    Raises:
        AtomError: If the Hub refuses it.
        CheckFailed: If the Hub serves other bytes.
    """
    if not (release / PAGE).is_file():
        return None
    remote = space_of(info)
    with scratch.folder() as folder:
        content, copy = folder / "space", folder / "copy"
        write_space(release, info, certificates, content)
        # Unlike a release, the Space is no version that is published once: it has no tag.
        destination = Destination(content, Repository("", "", "space"), remote, info.tag, journal)
        destination.refuse_beyond_limits()
        staged = destination.upload(progress)
        progress(f"pulling back {remote.id}@{staged.revision}")
        pull(remote, staged.commit, copy)
        remove_client_files(copy)
        if problem := next(differences(copy, content), None):
            raise CheckFailed(f"{remote.id} serves other files than were uploaded ({problem}); publish again")
        published = destination.promote(staged)
        destination.clear_staging()
    return published


def write_space(release: Path, info: ReleaseInfo, certificates: Sequence[Certificate], content: Path) -> None:
    """Writes the files of the Space into a new folder."""
    # Certificates are files of their own, so that anybody can verify them.
    (content / "replays").mkdir(parents=True)
    for certificate in certificates:
        shutil.copyfile(certificate.path, content / f"replays/{certificate.name}.json")
    text = (release / PAGE).read_text(encoding="utf-8").replace(NO_REPLAYS, _replays(certificates))
    # The page links to files next to it; on the Hub these are in other repositories.
    text = LINK.sub(lambda link: f'href="{escape(hub_address(info, link[1]))}" target="_blank" rel="noopener"', text)
    (content / "index.html").write_text(text, encoding="utf-8")
    (content / CARD).write_text(space_card(info), encoding="utf-8")


def _replays(certificates: Sequence[Certificate]) -> Markup:
    """Returns the table of replays by others."""
    if not certificates:
        return Markup("<p>No certificate was sent so far.</p>")
    rows = [["from", "result", "steps", "in words", "tensors with equal bits", "environment"]]
    for each in certificates:
        name, result, phase, first, last, verdict, tensors, different, environment = each.row()
        link = Markup('<a href="replays/{}.json">{}</a>').format(name, name)
        steps = f"{phase}, {count(first)} to {count(last)}"
        equal = f"{count(tensors - different)} of {count(tensors)}"
        rows.append([link, result.lower(), escape(steps), escape(verdict), equal, escape(environment[:19])])
    return table(rows)


def hub_address(info: ReleaseInfo, path: str) -> str:
    """Returns the address on the Hub of a file or folder of a release, at the tag of this version.

    Args:
        info: The release.
        path: In its folder; special characters have the escapes of a URI.
    """
    top, _, rest = path.partition("/")
    kind, suffix, revision = "datasets/", "-evidence", info.tag
    if top == "dataset":
        suffix = "-data"
    elif top == "checkpoints":
        kind, suffix = "", "-checkpoints"
        # Each checkpoint is a branch of one repository, which has no tag of the version.
        branch, _, below = rest.partition("/")
        # Other files below checkpoints/ are on the main branch.
        if re.search(r"-step-[0-9]+$", branch):
            revision, rest = branch, below
    elif top.partition("-")[0] in (MODEL, VARIANT):
        kind, suffix = "", top.removeprefix(MODEL).removeprefix(VARIANT)
    else:
        rest = path
    view = "blob" if FILE.search(path) else "tree"
    return f"{PUBLIC_HUB}/{kind}{info.repository}{suffix}/{view}/{revision}/{rest}"


def space_card(info: ReleaseInfo) -> str:
    """Returns the card of the Space, whose head tells the Hub what to serve."""
    data = load().CardData(
        title=f"{info.title} {info.version}",
        emoji="🔎",
        colorFrom="blue",
        colorTo="gray",
        sdk="static",
        app_file="index.html",
        pinned=False,
        short_description=f"What went into {info.name} {info.version}, and what came out"[:DESCRIPTION],
        models=[info.repository],
        datasets=[f"{info.repository}-data"],
        **license_fields(info.license.data_compilation),
    )
    return (
        f"---\n{data}\n---\n\n# {info.title} {info.version}: the page\n\n"
        f"Results, data, removed documents, training curves, outputs and origins of the release. The page is that of "
        f"[{info.repository}-evidence](https://huggingface.co/datasets/{info.repository}-evidence), with links to the "
        "Hub and the replays by others.\n"
    )
