"""The checksum files of a release, in the format of `sha256sum`, and the digests that they are compared with."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.core.errors import CheckFailed
from pipeline.core.store import sha256_file
from pipeline.core.text import printable
from release.untrusted import Tree, inode, is_foreign_link, open_regular, read

SUMS_BYTES, SUMS_LINES = 32 << 20, 300_000
"""The limit on all checksum files of a release together, which list each file twice."""
PATH_BYTES, NAME_BYTES = 1024, 255
"""The limits on a listed path and on each of its parts."""

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
