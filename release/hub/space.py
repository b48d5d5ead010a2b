"""The Space of a release: its page as a static site on the Hub.

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
from pathlib import Path

from markupsafe import Markup, escape

from pipeline.core.errors import CheckFailed
from pipeline.hub.client import PUBLIC_HUB, RemoteRepository, load
from release import scratch
from release.audit.replay.report import Certificate
from release.cards.render import license_fields
from release.cards.tables import count
from release.hub.upload import Destination, Journal, Progress, Published
from release.layout import MODEL, PAGE, VARIANT
from release.pull import pull, remove_client_files
from release.repositories import Repository
from release.schema import CARD, ReleaseInfo
from release.web_page.markdown_html import table
from release.web_page.page import NO_REPLAYS, differences

# The maximum number of characters of a Space's short description on the Hub.
DESCRIPTION = 60
# A link of the page to a file of the release; its path has the escapes of a URI.
LINK = re.compile(r'href="\.\./([^"]*)"')
# The end of the path of a file; NOTICE and LICENSE are files as well.
FILE = re.compile(r"(\.[A-Za-z0-9]+|(^|/)[A-Z][A-Za-z0-9]+)$")


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
    (content / CARD).write_text(card(info), encoding="utf-8")


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


def card(info: ReleaseInfo) -> str:
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
