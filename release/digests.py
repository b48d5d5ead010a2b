"""SHA-256 of the files of a folder, by all cores, each file read once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.store import sha256_file


class Digests:
    """Called with a path, the digest of that file: known already, or found now and then known."""

    def __init__(self, folder: Path, paths: Iterable[str] = ()) -> None:
        """paths: relative to the folder; their digests are found at once, the largest file first."""
        present = [folder / path for path in paths]
        present.sort(key=lambda path: -path.stat().st_size)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run meanwhile
            self.known = dict(zip(present, pool.map(sha256_file, present), strict=True))

    def __call__(self, path: Path) -> str:
        if path not in self.known:
            self.known[path] = sha256_file(path)
        return self.known[path]
