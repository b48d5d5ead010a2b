"""The split of a document: training or held out."""

from __future__ import annotations

from typing import Annotated

from pipeline.core.bounds import Range

SPLITS = ("train", "heldout")
HeldoutFraction = Annotated[float, Range(0, 1, below=True)]
"""Share of documents that are held out from training."""


def split_of(content_hash: str, heldout_fraction: float) -> str:
    """The split of a document, by the hash of its text only."""
    return "heldout" if int(content_hash[:16], 16) < heldout_fraction * 2**64 else "train"
