"""The digest of the files of a source. Cheap to import: settings of other stages use it too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pipeline.core.bounds import Words
from pipeline.core.store import canonical, sha256_bytes

TreeDigest = Annotated[str, Words(71, "digest: write auto, or sha256:<64 hex digits>", r"auto|sha256:[0-9a-f]{64}")]


def tree_digest(files: Iterable[tuple[str, str]]) -> str:
    """`sha256:` over the (relative path, digest) of the files, in their order."""
    return f"sha256:{sha256_bytes(canonical([list(row) for row in files]))}"
