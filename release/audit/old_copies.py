"""Recognizes copies of what was retracted: by the tombstone in them, or by that of the release on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import sha256_file
from release import schema, scratch
from release.checks.verdict import CheckResult, Verdict, answer
from release.checksums import read_sums
from release.facts.tombstones import ChangedRepository, Tombstone, read_tombstones
from release.layout import PUBLIC_KEY, RELEASE, RETRACTED, SUMS
from release.signing import Trust, TrustPolicy

NAME = "retraction"


def sentence(folder: Path) -> str:
    """Returns a sentence on what was taken back from a folder with a tombstone."""
    return "; ".join(tombstone.sentence for tombstone in read_tombstones(folder))


def check_tombstone(folder: Path, kind: str) -> CheckResult:
    """Checks that the files are those that the last tombstone states."""
    try:
        tombstones = read_tombstones(folder)
        if not tombstones:
            return answer("tombstone", [f"{RETRACTED} names no retraction"])
        return answer("tombstone", _problems(folder, kind, tombstones[-1]), tombstones[-1].sentence)
    except CheckFailed as error:
        return answer("tombstone", [str(error)])


def _problems(folder: Path, kind: str, tombstone: Tombstone) -> list[str]:
    rows = tombstone.repositories
    if kind == "release":
        return [text for row in rows for text in _differences(folder / row.folder, row)]
    if any(not _differences(folder, row) for row in rows):
        return []
    return ["the files are of no repository that the tombstone names"]


def _differences(folder: Path, row: ChangedRepository) -> list[str]:
    sums = read_sums(folder / SUMS, SUMS)
    prefix = f"{row.folder}/" if row.folder else ""
    return [
        f"{file.path} is not what {RETRACTED} says"
        for file in row.files
        if sums.get(file.path.removeprefix(prefix)) != file.after
    ]


def recognize(
    verdict: Verdict,
    folder: Path,
    policy: TrustPolicy,
    retracted: str | None,
    ask_hub: bool,
    verify_folder: Callable[..., Verdict],
) -> Verdict:
    """Returns the verdict with what was taken back from an intact copy since it was made.

    `retracted` names a repository with a tombstone. Raises AtomError if it has none, or does not verify. Without it,
    `ask_hub` makes this ask the evidence of the release on the Hub, if HF_ENDPOINT is set. It is no error if the Hub
    cannot be reached.
    """
    # An altered copy is refused anyway, and one with a tombstone says of itself what was taken back.
    if not verdict.ok or verdict.retracted:
        return verdict
    if retracted is not None:
        with scratch.folder() as temporary:
            _compare(verdict, folder, _located(retracted, temporary), policy, verify_folder)
        return verdict
    name = _evidence_of(folder, verdict.kind) if ask_hub and os.environ.get("HF_ENDPOINT") else None
    if name is None:
        return verdict
    try:
        with scratch.folder() as temporary:
            if _has_tombstone(name):
                _compare(verdict, folder, _located(name, temporary), policy, verify_folder)
    except AtomError as error:
        verdict.checks.append(CheckResult(NAME, None, f"not checked: {error}"))
    return verdict


def missing_revision(subject: str, deep: bool) -> Verdict | None:
    """Returns the verdict on a revision that is gone because its repository was retracted.

    None if the repository was not retracted, or if no revision was asked for.
    """
    name, _, revision = subject.partition("@")
    try:
        if not revision or not _has_tombstone(name):
            return None
    except AtomError:
        return None
    verdict = Verdict(subject, "repository", deep)
    text = f"revision {revision} is gone: documents of {name} were taken back, as its {RETRACTED} says"
    verdict.checks.append(CheckResult(NAME, None, text))
    verdict.retracted = text
    return verdict


def _located(name: str, temporary: Path) -> Path:
    from release.pull import pull_named

    return Path(name) if Path(name).is_dir() else pull_named(name, temporary / "retracted")


def _compare(
    verdict: Verdict, folder: Path, retracted: Path, policy: TrustPolicy, verify_folder: Callable[..., Verdict]
) -> None:
    """Adds the retraction to the verdict, if the copy is one of what was rewritten."""
    if policy == TrustPolicy() and (folder / PUBLIC_KEY).is_file():
        policy = Trust(str(folder / PUBLIC_KEY)).policy()  # nobody else may take it back
    other = verify_folder(retracted, str(retracted), False, lambda text: None, policy)
    try:
        other.require()
    except CheckFailed as error:
        raise AtomError(f"the tombstone does not count: {error}") from None
    if not other.retracted:
        raise AtomError(f"{retracted} has no tombstone of a retraction")
    for tombstone in read_tombstones(retracted):
        for row in tombstone.repositories:
            sums = folder / (row.folder if verdict.kind == "release" else "") / SUMS
            if sums.is_file() and sha256_file(sums) == row.checksums:
                verdict.retracted = tombstone.sentence
                verdict.checks.append(CheckResult(NAME, None, f"retracted: {tombstone.sentence}"))
                return


def _has_tombstone(name: str) -> bool:
    from pipeline.hub.client import RemoteRepository, translate_errors

    for kind in ("model", "dataset"):
        remote = RemoteRepository(name, kind)
        with translate_errors(f"looking for a tombstone of {name}"):
            if remote.exists():
                return RETRACTED in remote.files("main")
    return False


def _evidence_of(folder: Path, kind: str) -> str | None:
    """Returns the evidence repository of a release, its evidence or its data, as they name it."""
    if (folder / RELEASE).is_file():
        return f"{schema.read_release(folder).repository}-evidence"
    if kind != "dataset" or not (folder / schema.CARD).is_file():
        return None
    names: Any = schema.DATA_REPOSITORY.search((folder / schema.CARD).read_text("utf-8", "replace"))
    return f"{names[1]}-evidence" if names else None
