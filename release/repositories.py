"""The Hub repository of each part of a release, its files, and the checksum files in the format of `sha256sum`."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import CheckFailed
from pipeline.core.store import sha256_file
from pipeline.core.text import printable
from release.layout import MODEL, PARTS, PUBLIC_KEY, RELEASE, SIGNATURE, SUMS, VARIANT, when
from release.untrusted import ENTRIES, Tree, inode, is_foreign_link, open_regular, read, walk

SUMS_BYTES, SUMS_LINES = 32 << 20, 300_000
"""The limit on all checksum files of a release together, which list each file twice."""
PATH_BYTES, NAME_BYTES = 1024, 255
"""The limits on a listed path and on each of its parts."""

MOST_ENTRIES = ENTRIES + 4 * SUMS_LINES
"""The maximum number of files and folders of a release."""
LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def write_sums(target: Path, folder: Path, paths: list[str]) -> None:
    """Writes the format of `sha256sum`, for `sha256sum -c SHA256SUMS`."""
    target.write_text("".join(f"{sha256_file(folder / path)}  {path}\n" for path in sorted(paths)))


def read_sums(path: Path, name: str) -> dict[str, str]:
    """Returns {path: sha256} of a checksum file, which messages call `name`.

    Raises CheckFailed with the line that is damaged, duplicate or out of order, or whose path no release can have.
    """
    if not os.path.lexists(path):
        raise CheckFailed(f"{name} is missing")
    try:
        # The folder of the release, in which `name` is the path; that of the file itself for an absolute one.
        depth = 0 if os.path.isabs(name) else name.count("/")
        root = path.parents[depth]
        # A pulled repository in the Hub's cache is made of links, and no other link is followed.
        follow = not is_foreign_link(root, path.relative_to(root).as_posix())
        data = read(path, SUMS_BYTES, follow=follow)
    except CheckFailed as error:
        raise CheckFailed(str(error).replace(path.name, name, 1)) from None

    rows: dict[str, str] = {}
    last, line = "", b"\n"
    # Splits at line feeds only; `splitlines` also splits at characters that a name may contain.
    for number, line in enumerate(io.BytesIO(data), 1):
        if number > SUMS_LINES:
            raise CheckFailed(f"{name} has more than {SUMS_LINES} lines")
        try:
            match = LINE.fullmatch(line.decode().removesuffix("\n"))
        except UnicodeDecodeError:
            raise CheckFailed(f"{name} is altered: it is not UTF-8 text") from None
        # Sorted and without duplicates, so that a path has one digest only.
        if match is None or match[2] <= last:
            raise CheckFailed(f"{name} is altered: line {number} is not a checksum line in its place")
        last = match[2]
        if not is_plain_path(last):
            raise CheckFailed(f"{name} is altered: line {number} names {printable(last)}, which leads elsewhere")
        rows[last] = match[1]
    if not line.endswith(b"\n"):
        raise CheckFailed(f"{name} is altered: its last line is cut")
    return rows


def is_plain_path(path: str) -> bool:
    """Returns True if a relative path stays within its folder, and can be printed and opened."""
    parts = path.split("/")
    longest = max(len(part.encode(errors="replace")) for part in parts)
    return (
        path.isprintable()
        and not {"", ".", ".."} & set(parts)
        and longest <= NAME_BYTES
        and len(path.encode(errors="replace")) <= PATH_BYTES
    )


def compare(
    sums: dict[str, str],
    folder: Path,
    present: list[str],
    name: str,
    digest: Callable[[Path], str] = sha256_file,
) -> list[str]:
    """Returns the differences between a checksum file and a folder: every missing, extra and altered file, by name.

    `present` lists the regular files in the folder.
    """
    differences = [f"{path} is missing (listed in {name})" for path in sorted(set(sums) - set(present))]
    differences += [f"{path} is not listed in {name}" for path in sorted(set(present) - set(sums))]
    differences += [
        f"{path} is altered: it is not the file that {name} lists"
        for path in sorted(set(sums) & set(present))
        if digest(folder / path) != sums[path]
    ]
    return differences


class Digests:
    """A callable from a path to the digest of that file, which is cached or computed.

    It reads only the files of the tree, and no more bytes than they had in the listing.
    """

    def __init__(self, folder: Path, tree: Tree, paths: Set[str] = frozenset()) -> None:
        """Computes the digests of `paths` at once, the largest file first.

        `paths` are relative to the folder. Digests of other files are computed when they are asked for.
        """
        self.folder, self.tree = folder, tree
        # Largest first, so that no core ends with the longest file alone.
        present = sorted(paths & tree.files.keys(), key=lambda path: -tree.files[path].st_size)
        path_of_inode = {self._inode(path): path for path in present}  # a file of several names is hashed once
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
            digests = dict(zip(path_of_inode, pool.map(self._digest, path_of_inode.values()), strict=True))
        self.digests = {folder / path: digests[self._inode(path)] for path in present}

    def _inode(self, path: str) -> object:
        return inode(self.tree.files[path])

    def __call__(self, path: Path) -> str:
        if path not in self.digests:
            self.digests[path] = self._digest(path.relative_to(self.folder).as_posix())
        return self.digests[path]

    def _digest(self, path: str) -> str:
        """Returns the digest; "" for a file that may not be read, or that changes meanwhile."""
        status = self.tree.files.get(path)
        if status is None:
            return ""

        digest, remaining = hashlib.sha256(), status.st_size
        try:
            with open_regular(self.folder / path, follow=True) as file:
                while chunk := file.read(min(1 << 20, remaining + 1)):
                    digest.update(chunk)
                    remaining -= len(chunk)
                    # The file grew since it was listed, and its size then set the limits.
                    if remaining < 0:
                        return ""
        except (OSError, CheckFailed):
            return ""
        return digest.hexdigest()


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
