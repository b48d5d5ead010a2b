"""SHA-256 of the files of a folder, on all cores; each file is read once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.core.errors import CheckFailed
from release.tree import Tree, inode
from release.untrusted import open_regular


class Digests:
    """A callable from a path to the digest of that file, which is cached or computed.

    It reads only the files of the tree, and no more bytes than they had in the listing.
    """

    def __init__(self, folder: Path, tree: Tree, paths: Set[str] = frozenset()) -> None:
        """paths: relative to the folder; their digests are computed at once, the largest file first."""
        self.folder, self.tree = folder, tree
        present = sorted(paths & tree.files.keys(), key=lambda path: -tree.files[path].st_size)
        path_of_inode = {self._file(path): path for path in present}  # a file of several names is hashed once
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
            digests = dict(zip(path_of_inode, pool.map(self._digest, path_of_inode.values()), strict=True))
        self.digests = {folder / path: digests[self._file(path)] for path in present}

    def _file(self, path: str) -> object:
        return inode(self.tree.files[path])

    def __call__(self, path: Path) -> str:
        if path not in self.digests:
            self.digests[path] = self._digest(path.relative_to(self.folder).as_posix())
        return self.digests[path]

    def _digest(self, path: str) -> str:
        """The digest; "" for a file that may not be read, or that changes meanwhile."""
        status = self.tree.files.get(path)
        if status is None:
            return ""
        digest, remaining = hashlib.sha256(), status.st_size
        try:
            with open_regular(self.folder / path, follow=True) as file:
                while chunk := file.read(min(1 << 20, remaining + 1)):
                    digest.update(chunk)
                    remaining -= len(chunk)
                    if remaining < 0:
                        return ""
        except (OSError, CheckFailed):
            return ""
        return digest.hexdigest()
