"""The Hub repository of each part of a release, and its files."""

from __future__ import annotations

import errno
import stat
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import CheckFailed
from pipeline.core.text import printable
from release.checksums import SUMS_LINES
from release.layout import MODEL, PARTS, PUBLIC_KEY, RELEASE, SIGNATURE, SUMS, VARIANT, when
from release.untrusted import ENTRIES, walk

MOST_ENTRIES = ENTRIES + 4 * SUMS_LINES
"""The maximum number of files and folders of a release."""


@dataclass(frozen=True)
class Repository:
    """One revision of one Hub repository.

    Attributes:
        folder: Its place in the release; "" is the release's root.
        suffix: The end of its name on the Hub, after the name of the release.
        kind: model, dataset or space; "" where it does not matter.
        branch: The branch.
    """

    folder: str
    suffix: str
    kind: str
    branch: str = "main"

    def id(self, namespace: str, name: str) -> str:
        return f"{namespace}/{name}{self.suffix}"


def model_folders(release: Path) -> list[str]:
    """Lists the folders of a release that hold models, the final one first, then in the order of training.

    Links to folders are not listed.
    """
    names = [path.name.removeprefix(f"{MODEL}-") for path in release.glob(f"{MODEL}-*") if _is_own_folder(path)]
    return [MODEL, *(f"{MODEL}-{name}" for name in sorted(names, key=when))]


def variant_folders(release: Path) -> list[str]:
    """Returns the folders of a release that hold variants of the final model; links to folders are none."""
    return sorted(path.name for path in release.glob(f"{VARIANT}-*") if _is_own_folder(path))


def repositories(release: Path) -> list[Repository]:
    """Lists the repositories of a release in the order in which they are made public.

    The order is data, evidence, checkpoints, models; the variants come before the final model. Links to folders are not
    listed.
    """
    places = [Repository("dataset", "-data", "dataset"), Repository("", "-evidence", "dataset")]
    steps = sorted(path.name for path in (release / "checkpoints").iterdir() if _is_own_folder(path))
    places.append(Repository("checkpoints", "-checkpoints", "model"))
    places += [Repository(f"checkpoints/{name}", "-checkpoints", "model", name) for name in steps]
    final, *others = model_folders(release)
    places += [Repository(folder, folder.removeprefix(MODEL), "model") for folder in others]
    places += [Repository(folder, folder.removeprefix(VARIANT), "model") for folder in variant_folders(release)]
    return [*places, Repository(final, "", "model")]


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def files_below(folder: Path) -> list[str]:
    """Lists every file below a folder that is published, as sorted POSIX paths.

    Signatures and keys in their places are left out, and so are the files that a Hub and its client add to a
    repository. Links are listed and not followed.

    Raises CheckFailed if there are more files than any release has.
    """
    paths = []
    for path, status in walk(folder, MOST_ENTRIES):
        if isinstance(status, OSError):
            if status.errno == errno.E2BIG:
                raise CheckFailed(f"{printable(folder.name)} {status.strerror}")
        elif stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
            paths.append(path)
    # Only a whole release has signatures of other repositories below its own.
    is_whole = (folder / RELEASE).is_file() and (folder / "checkpoints").is_dir()
    return published(paths, repositories(folder) if is_whole else [Repository("", "", "")])


def published(paths: Iterable[str], places: Iterable[Repository]) -> list[str]:
    """Returns the paths below a folder that are published, sorted: without signatures, keys, and files of a Hub.

    `places` are the repositories in the folder.
    """
    left_out = {".gitattributes"}
    for place in places:
        left_out.update(f"{place.folder}/{name}".lstrip("/") for name in (SIGNATURE, PUBLIC_KEY))
    return sorted(path for path in paths if path not in left_out and not path.startswith(".cache/"))


def files_of(release: Path, repository: Repository) -> list[str]:
    """Returns the files of a repository, relative to its folder, without its checksum file.

    Raises CheckFailed as `files_below` does.
    """
    files = files_below(release / repository.folder)
    # Only the root of a release has the folders of other repositories in its own.
    models = [*model_folders(release), *variant_folders(release)] if repository.folder == "" else []
    return _without_others(repository, files, models)


def files_within(paths: Sequence[str], repository: Repository, models: Iterable[str]) -> list[str]:
    """Returns the files of a repository as `files_of` does, from the sorted paths of all files below a release.

    `models` are the release's folders of models and variants.
    """
    below = list(paths)
    if repository.folder:
        # The paths of a folder lie together: U+10FFFF comes after every character of a name.
        prefix = f"{repository.folder}/"
        start, end = bisect_left(paths, prefix), bisect_left(paths, f"{prefix}\U0010ffff")
        below = [path.removeprefix(prefix) for path in paths[start:end]]
    return _without_others(repository, published(below, [Repository("", "", "")]), models)


def _without_others(repository: Repository, paths: Iterable[str], models: Iterable[str]) -> list[str]:
    """Returns the paths in the folder of a repository without its checksum file and the files of other repositories."""
    listed = [path for path in paths if path != SUMS]
    if repository.folder == "":
        others = {*PARTS, *models}
        return [path for path in listed if path.split("/")[0] not in others]
    if repository.folder == "checkpoints":
        return [path for path in listed if "/" not in path]
    return listed
