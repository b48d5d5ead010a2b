"""Pieces of an evaluation: results that are computed apart, in any order and by any number of tasks of a job array.

A stage fixes its pieces by its config and inputs, so the artifact has the same bytes however they are dealt out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.core.store import once

M = TypeVar("M")


@dataclass(frozen=True)
class Piece(Generic[M]):
    """name: of its file in the work folder; make(model): its result, as plain JSON; size: its items."""

    name: str
    make: Callable[[M], Any]
    size: int = 1


def compute(pieces: Sequence[Piece[M]], work: Path, load: Callable[[], M]) -> Iterator[Any]:
    """The results of the pieces in order; those that `work` keeps are not computed again. load: gives the model, which
    is loaded for the first piece that is missing."""
    model = cache(load)

    def make(piece: Piece[M]) -> Any:
        return piece.make(model())

    for piece in pieces:
        yield once(work / f"{piece.name}.json", partial(make, piece))


def compute_shard(pieces: Sequence[Piece[M]], work: Path, load: Callable[[], M], shard: int, shards: int) -> None:
    """Leaves the results of one shard's pieces in `work`: every `shards`-th."""
    for _ in compute(pieces[shard::shards], work, load):
        pass


def count(items: int, size: int) -> int:
    """The number of pieces of `size` items."""
    return -(-items // size)
