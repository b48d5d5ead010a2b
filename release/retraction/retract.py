"""`atom retract`: documents leave a release folder, and then its repositories on the Hub.

1. The folder is copied by links; every file that holds a text is written again without it; each changed repository gets
   a tombstone, a notice on its card, new checksums and, if the release is signed, a new signature. Then the copy takes
   the place of the folder, and the old one is deleted.
2. Each changed branch on the Hub gets the new files, its history is squashed, the tag of the version is moved, and LFS
   objects that no branch or tag has any more are deleted.

Both parts go on where they were interrupted: the first is not repeated once the folder has the tombstone, and the
second looks at what the Hub has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError
from pipeline.core.store import sha256_file
from release import schema
from release.assembly.build_release import write_checksums
from release.facts.published_tables import to_json
from release.facts.tombstones import (
    MOST_LISTED,
    ChangedFile,
    ChangedRepository,
    RetractedDocument,
    Tombstone,
    read_tombstones,
    tombstones_json,
)
from release.layout import MODEL, PUBLIC_KEY, RETRACTED, SIGNATURE, SITE, SUMS, folders_of
from release.repositories import Repository, files_below, files_of, repositories, variant_folders
from release.retraction import rewrite
from release.retraction.rewrite import Reached, find_reached
from release.schema import CARD, ReleaseInfo
from release.signing import SigningKey, sign
from release.tracing.release_data import ReleaseData
from stages.data.curate.deny_list import DenyList

# The files that stay of a model that is taken back as a whole.
KEPT_OF_REMOVED = (CARD, "LICENSE", RETRACTED)
# Documents that a report lists.
SHOWN = 20
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Retraction:
    """The result of a retraction.

    Attributes:
        tombstone: The documents, repositories and models that are taken back.
        dry_run: True if nothing was changed.
        on_hub: A sentence for each branch that changed on the Hub, or would.
    """

    tombstone: Tombstone
    dry_run: bool
    on_hub: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def retract(
    release: Path,
    deny_list: DenyList,
    remove_models: bool = False,
    key: SigningKey | None = None,
    dry_run: bool = False,
    publish: bool = True,
    progress: Progress = lambda text: None,
) -> Retraction:
    """Takes the documents of a deny-list back, from the folder and from the Hub at HF_ENDPOINT.

    Args:
        release: The release folder.
        deny_list: The documents.
        remove_models: Takes back the models and checkpoints that were trained on them as well.
        key: The key of a signed release.
        dry_run: Changes nothing.
        publish: Changes the Hub too.
        progress: Gets a sentence for each step.

    Raises:
        AtomError: If no document is in the release, if it is signed and there is no key, or if the Hub refuses.
    """
    from release.retraction import hub

    release = release.resolve()
    info, earlier = schema.read_release(release), read_tombstones(release)
    reached = find_reached(release, deny_list)
    if not reached.kinds:
        if not (earlier and _answers(earlier[-1], deny_list)):
            raise AtomError(f"{release} holds none of these documents; atom trace finds documents by id and by text")
        # An earlier attempt was interrupted on the Hub.
        progress("the folder has its tombstone already")
        tombstone = earlier[-1]
        if dry_run:
            return Retraction(tombstone, True)
    else:
        _require_key(release, key)
        tombstone = _rewrite_folder(release, info, reached, deny_list, remove_models, key, dry_run, progress)
        if dry_run:
            return Retraction(tombstone, True, tuple(hub.preview(release, info, tombstone)) if publish else ())
    return Retraction(tombstone, False, tuple(hub.update(release, info, tombstone, progress)) if publish else ())


def settle(release: Path) -> None:
    """Ends the replacement of a folder by a command that was killed in its middle."""
    # Without a new folder the old one comes back; beside a new one, it is deleted with the texts in it.
    draft, old = _draft(release), _old(release)
    if old.is_dir() and not release.exists():
        os.rename(old, release)
    for path in (draft, old):
        shutil.rmtree(path, ignore_errors=True)


def _draft(release: Path) -> Path:
    """Returns the place of the folder without the documents, before it replaces the release."""
    return release.with_name(f".{release.name}.retracting")


def _old(release: Path) -> Path:
    """Returns the place of the old release while it is replaced."""
    return release.with_name(f".{release.name}.retracted")


def _answers(tombstone: Tombstone, deny_list: DenyList) -> bool:
    """Returns True if all requests of a tombstone are in a deny-list."""
    # The keys of the dates are the requests.
    return set(tombstone.dates) <= set(deny_list.dates)


def _require_key(release: Path, key: SigningKey | None) -> None:
    if (release / SIGNATURE).exists() and key is None:
        raise AtomError(f"{release} is signed, and so must be its tombstone; give --key PEM")


def _rewrite_folder(
    release: Path,
    info: ReleaseInfo,
    reached: Reached,
    deny_list: DenyList,
    remove_models: bool,
    key: SigningKey | None,
    dry_run: bool,
    progress: Progress,
) -> Tombstone:
    """Makes the folder without the documents, and puts it in place unless it is a dry run."""
    draft = _draft(release)
    # Hard links cost no space, whatever the size of the weights. A file that changes is replaced, never written in
    # place.
    progress(f"writing {release.name} without {len(reached.kinds)} documents")
    shutil.copytree(release, draft, copy_function=_link)
    try:
        places = {place.folder: place for place in repositories(release)}
        before = {path: sha256_file(release / path) for path in files_below(release)}
        checksums = {folder: sha256_file(release / folder / SUMS) for folder in places}
        rewrite.rewrite(draft, reached)

        trained = _trained_folders(release, reached)
        if remove_models:
            for folder in trained:
                _empty(draft / folder)
        # Notices change cards, so they come before files are compared.
        noticed = _add_notices(draft, reached, info, trained, remove_models)
        trained_places = [places[folder] for folder in trained]
        tombstone = _tombstone(info, reached, deny_list, trained_places, remove_models)

        repositories_changed = []
        for folder, place in places.items():
            files = _changed_files(draft, place, before)
            # The release itself and noticed repositories get a tombstone even if no table changed.
            if not files and folder not in ("", *noticed):
                continue
            name = place.id(info.namespace, info.name)
            repositories_changed.append(ChangedRepository(name, place.branch, folder, checksums[folder], tuple(files)))
        tombstone = replace(tombstone, repositories=tuple(repositories_changed))

        # Earlier tombstones stay: a release may be retracted in part more than once.
        content = to_json(tombstones_json([*read_tombstones(release), tombstone]))
        for changed in repositories_changed:
            atomic_files.write(draft / changed.folder / RETRACTED, content)
        _seal(draft, release, {changed.folder for changed in repositories_changed}, key, progress)
        if not dry_run:
            _swap(draft, release)
    finally:
        # After the replacement there is no draft any more.
        shutil.rmtree(draft, ignore_errors=True)
    return tombstone


def _link(source: str, target: str) -> None:
    """Makes a hard link to a file, or a copy where there are no links."""
    try:
        os.link(source, target)
    except OSError:  # no links on this file system
        shutil.copy2(source, target)


def _trained_folders(release: Path, reached: Reached) -> list[str]:
    """Returns the folders of the models, variants and checkpoints that were trained on a document."""
    folder_of = folders_of(ReleaseData.locate(release).models())
    folders = [folder for model, folder in folder_of.items() if model in reached.models]
    # The variants are made of the final model.
    folders += variant_folders(release) if MODEL in folders else []
    return folders + [f"checkpoints/{name}" for name in sorted(reached.checkpoints)]


def _empty(folder: Path) -> None:
    """Removes all files of a model or checkpoint but its card, its license and its tombstone."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in KEPT_OF_REMOVED:
            path.unlink()


def _add_notices(
    draft: Path, reached: Reached, info: ReleaseInfo, trained: list[str], remove_models: bool
) -> list[str]:
    """Puts a notice on the cards of the data, of the evidence, and of the models and checkpoints in `trained`.

    Returns their folders.
    """
    count = len(reached.kinds)
    documents = f"{count} {'document was' if count == 1 else 'documents were'} taken back on request"
    data_notice = f"**Retracted in part.** {documents}; `{RETRACTED}` names them by id, and the requests by hash."
    if remove_models:
        model_notice = (
            f"**Retracted.** This was trained on data of which {documents}, and is taken back with it; see "
            f"`{RETRACTED}`."
        )
    else:
        model_notice = (
            f"**Trained on retracted data.** After the training, {documents} from the data; see `{RETRACTED}`."
        )

    notices = {"dataset": data_notice, "": data_notice}
    if any(folder.startswith("checkpoints/") for folder in trained):
        notices["checkpoints"] = model_notice
    for folder in trained:
        if not folder.startswith("checkpoints/"):
            notices[folder] = model_notice
        elif remove_models:
            # A checkpoint has no card that says why it is empty.
            atomic_files.write(draft / folder / CARD, f"# {info.name}: {folder.partition('/')[2]}\n".encode())
            notices[folder] = model_notice
    for folder, notice in notices.items():
        rewrite.add_notice(draft / folder / CARD, notice)
    return list(notices)


def _tombstone(
    info: ReleaseInfo, reached: Reached, deny_list: DenyList, trained: list[Repository], remove_models: bool
) -> Tombstone:
    """Returns the tombstone of a retraction, without the changes of the repositories."""
    names = []
    for place in trained:
        branch = "" if place.branch == "main" else f"@{place.branch}"
        names.append(place.id(info.namespace, info.name) + branch)

    documents, requests = [], set[str]()
    for document_id, kind in sorted(reached.kinds.items()):
        documents.append(RetractedDocument(document_id, kind, tuple(sorted(reached.requests[document_id]))))
        requests |= reached.requests[document_id]
    return Tombstone(
        release=f"{info.name} {info.version}",
        dates={request: deny_list.dates[request] for request in sorted(requests)},
        count=len(documents),
        documents=tuple(documents[:MOST_LISTED]),
        repositories=(),
        trained=tuple(names),
        removed=tuple(names) if remove_models else (),
    )


def _changed_files(draft: Path, place: Repository, before: dict[str, str]) -> list[ChangedFile]:
    """Returns the files of a repository that changed, were removed or are new, without checksum files.

    `before` is {path in the release: SHA-256}.
    """
    prefix = f"{place.folder}/" if place.folder else ""
    after = {f"{prefix}{path}": sha256_file(draft / prefix / path) for path in files_of(draft, place)}
    paths = {path for path in before if _is_in(path, place)} | after.keys()
    changed = []
    for path in sorted(paths):
        if not path.endswith(SUMS) and before.get(path) != after.get(path):
            changed.append(ChangedFile(path, before.get(path, ""), after.get(path)))
    return changed


def _is_in(path: str, place: Repository) -> bool:
    """Returns True if a path of a release is a file of a repository."""
    top, _, rest = path.partition("/")
    if place.folder == "":
        return top in ("code", "evidence", SITE) or not rest
    if place.folder == "checkpoints":
        return top == "checkpoints" and "/" not in rest
    return path.startswith(f"{place.folder}/")


def _seal(draft: Path, release: Path, changed: set[str], key: SigningKey | None, progress: Progress) -> None:
    """Writes checksums, and signs the changed repositories; the others keep their signatures.

    `changed` are the folders of the changed repositories.
    """
    _break_links(draft, SUMS)
    write_checksums(draft)
    if key is None:
        return

    for name in (SIGNATURE, PUBLIC_KEY):
        _break_links(draft, name)
    # Signing replaces all signatures; unchanged repositories get theirs back below.
    sign(draft, key, progress)
    for place in repositories(draft):
        for name in (SIGNATURE, PUBLIC_KEY):
            original = release / place.folder / name
            if place.folder not in changed and original.exists():
                shutil.copyfile(original, draft / place.folder / name)


def _break_links(draft: Path, name: str) -> None:
    """Replaces all files of a name by copies, so that writing them leaves the release as it is."""
    for path in [*draft.rglob(name)]:
        atomic_files.write(path, path.read_bytes())


def _swap(draft: Path, release: Path) -> None:
    """Puts the draft in the place of the release, which is deleted."""
    # Between the two renames there is no release; `settle` then brings the old one back.
    os.rename(release, _old(release))
    os.rename(draft, release)
    settle(release)


def text(retraction: Retraction) -> str:
    """Returns the report of a retraction for a terminal."""
    tombstone = retraction.tombstone
    would = "would be " if retraction.dry_run else ""
    documents = "document" if tombstone.count == 1 else "documents"
    lines = [f"{tombstone.count} {documents} of {tombstone.release} {would}retracted:"]
    lines += [f"  {document.id} ({document.found})" for document in tombstone.documents[:SHOWN]]
    if (others := tombstone.count - SHOWN) > 0:
        lines.append(f"  and {others} more")
    for changed in tombstone.repositories:
        lines.append(f"{changed.repository}@{changed.branch}: {len(changed.files)} files {would}changed or removed")
    remaining = [name for name in tombstone.trained if name not in tombstone.removed]
    lines += [f"{name}: trained on them, {would}removed" for name in tombstone.removed]
    lines += [f"{name}: trained on them, and stays; --models takes it back" for name in remaining]
    return "\n".join([*lines, *retraction.on_hub])
