"""The Space of a release: its page as a static site on the Hub.

    README.md                      the card: a static Space, with its models and its data
    index.html, search/, …         the folder `site` of the release, byte for byte, except for
    replays/record.js              the record of replays by others: a row for each certificate
    replays/NAME.json              the certificates, from `RELEASE.replays/` beside the release

Unlike the release, of which a version is published once, the Space follows the folder at each `atom publish`: new
certificates appear on it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.hub.client import load
from pipeline.hub.remote import RemoteRepository
from release import scratch
from release.audit.replay.certificates import Certificate
from release.cards.render import license_fields
from release.hub.pull import pull, remove_client_files
from release.hub.upload import Destination, Journal, Progress, Published
from release.layout import PAGE, SITE
from release.repositories import Repository
from release.schema import CARD, ReleaseInfo
from release.web_page.script_parts import PartWriter
from release.web_page.site_files import RECORD, differences

DESCRIPTION = 60
"""The maximum number of characters of a Space's short description on the Hub."""


def space_of(info: ReleaseInfo) -> RemoteRepository:
    """The Space of a release, which need not exist."""
    return RemoteRepository(f"{info.repository}-page", "space")


def publish_space(
    release: Path, info: ReleaseInfo, certificates: list[Certificate], journal: Journal, progress: Progress
) -> Published | None:
    """Uploads the Space of a release, and compares it with what the Hub then serves; None if the release has no page.

    Raises AtomError if the Hub refuses it, CheckFailed if the Hub serves other bytes.
    """
    if not (release / PAGE).is_file():
        return None
    remote = space_of(info)
    with scratch.folder() as folder:
        content, copy = folder / "space", folder / "copy"
        write_space(release, info, certificates, content)
        destination = Destination(content, Repository("", "", "space"), remote, info.tag, journal)
        destination.refuse_beyond_limits()
        staged = destination.upload(progress)
        progress(f"pulling back {remote.id}@{staged.revision}")
        pull(remote, staged.commit, copy)
        remove_client_files(copy)
        if problem := next(differences(copy, content), None):
            raise CheckFailed(f"{remote.id}: {problem[0]} is not the file that was uploaded; publish again")
        published = destination.promote(staged)
        destination.clear_staging()
    return published


def write_space(release: Path, info: ReleaseInfo, certificates: list[Certificate], content: Path) -> None:
    """Writes the files of the Space into a new folder."""
    shutil.copytree(release / SITE, content)
    PartWriter(content).write(RECORD, [certificate.row() for certificate in certificates])
    for certificate in certificates:
        shutil.copyfile(certificate.path, content / f"replays/{certificate.name}.json")
    if (content / CARD).exists():
        raise AtomError(f"{release / SITE / CARD} is no part of the page; write it again by `atom site {release}`")
    (content / CARD).write_text(card(info), encoding="utf-8")


def card(info: ReleaseInfo) -> str:
    """The card of the Space, whose head tells the Hub what to serve."""
    hub = load()

    data = hub.CardData(
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
        f"Results, data, removed documents, search, training curves, outputs and origins of the release. The page is "
        f"`site/` of [{info.repository}-evidence](https://huggingface.co/datasets/{info.repository}-evidence), byte "
        "for byte, except for the record of replays by others in `replays/`.\n"
    )
