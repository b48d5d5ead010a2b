"""Near duplicates by MinHash (datatrove's stages), with the document that stays in place of each one removed."""

from __future__ import annotations

import contextlib
import io
import shutil
import struct
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig

from pipeline.core.errors import AtomError
from pipeline.core.store import once
from stages.data.filters.settings import MinHash
from stages.data.filters.words import WORDS
from stages.data.table import stream_rows

Signature = list[int]  # all hashes of a document, bucket after bucket; empty of a text shorter than one n-gram


@dataclass(frozen=True)
class Near:
    """Why a document is a near duplicate: the document that stays, and (similarity, threshold)."""

    id: str
    measured: tuple[float, float]


def sign(texts: list[str], settings: MinHash, seed: int) -> list[Signature]:
    """The MinHash signature of each text, which takes most of the time of finding near duplicates and needs no other
    text."""
    signer = MinhashDedupSignature("memory://", config=_config(settings, seed), language=WORDS)
    found = (signer.get_shingles(text) for text in texts)
    return [list(chain(*signer.get_signature(shingles))) if shingles.size else [] for shingles in found]


class _Signed(MinhashDedupSignature):  # type: ignore[misc]
    """datatrove's first stage with signatures that were made beforehand: a document's text is its signature."""

    def get_shingles(self, text: str) -> Any:
        return np.frombuffer(bytes.fromhex(text), np.uint64)

    def get_signature(self, shingles: Any) -> list[list[int]]:
        return [part.tolist() for part in np.split(shingles, self.config.num_buckets)]


def write_signatures(folder: Path, settings: MinHash, number: int, signatures: Iterable[Signature]) -> None:
    """Writes datatrove's files of signatures of one source, a file a bucket. number: of the source, from 0."""
    signer = _Signed(str(folder), config=_config(settings), language=WORDS)
    _exhaust(signer.run((Document(np.array(s, np.uint64).tobytes().hex(), "") for s in signatures), rank=number))


def find_pairs(signatures: Path, work: Path, settings: MinHash, bucket: int) -> bytes:
    """The pairs of documents that share a bucket, in datatrove's form, kept in `work`."""

    def make() -> str:
        with TemporaryDirectory(dir=work) as folder:
            finder = MinhashDedupBuckets(str(signatures), folder, config=_config(settings))
            _exhaust(finder.run(None, rank=bucket, world_size=settings.num_buckets))
            return b64encode((Path(folder) / _pairs(bucket)).read_bytes()).decode()

    return b64decode(once(work / f"pairs-{bucket:05d}-of-{settings.num_buckets:05d}.json", make))


def near(files: list[Path], pairs: Iterable[bytes], work: Path, settings: MinHash) -> dict[str, Near]:
    """The near duplicates to remove, by id: one document of each cluster stays.

    files: the documents of each source, in the order of the signatures' numbers; pairs: of each bucket in turn.
    Documents that share a bucket are joined transitively, so the similarity (Jaccard index of word n-grams) of a
    removed document with the kept one may lie below the threshold.
    """
    given, folder = work / "pairs", work / "clusters"
    for path in (given, folder):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    for bucket, found in enumerate(pairs):
        (given / _pairs(bucket)).write_bytes(found)
    cluster = MinhashDedupCluster(str(given), str(folder), config=_config(settings), save_cluster_id=True)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no option turns off
        _exhaust(cluster.run(None, 0, 1))

    stays: dict[int, tuple[str, str]] = {}
    removed: list[tuple[int, str, str]] = []
    for number, file in enumerate(files):
        goes = {row for (row,) in _read(folder / f"{number:06d}.remove", "<I")}
        clusters = {row: cluster for row, cluster in _read(folder / f"{number:06d}.clusters", "<2I")}
        for n, row in enumerate(stream_rows(file, ["id", "text"]) if clusters else ()):
            if n in goes:
                removed.append((clusters[n], row["id"], row["text"]))
            elif n in clusters:
                stays[clusters[n]] = row["id"], row["text"]
    plain = MinhashDedupSignature("memory://", config=_config(settings), language=WORDS)
    twins = {}
    for number, id, text in removed:
        if number not in stays:
            raise AtomError(f"MinHash removed {id} but kept nothing of its cluster; this is a fault of curation")
        twin, other = stays[number]
        similarity = _jaccard(plain.get_shingles(text).ravel(), plain.get_shingles(other).ravel())
        twins[id] = Near(twin, (similarity, settings.threshold))
    return twins


def _pairs(bucket: int) -> str:
    """The name that datatrove gives the file."""
    return f"{bucket:05d}_00.dups"


def _read(path: Path, form: str) -> Iterator[tuple[int, ...]]:
    """The tuples in a file of datatrove's; none if it was not written."""
    return struct.iter_unpack(form, path.read_bytes() if path.exists() else b"")


def _config(settings: MinHash, seed: int = 0) -> MinhashConfig:
    """seed: only signatures depend on it."""
    return MinhashConfig(
        n_grams=settings.n_grams,
        num_buckets=settings.num_buckets,
        hashes_per_bucket=settings.hashes_per_bucket,
        seed=seed % 2**32,
        hash_config=HashConfig(precision=64),
    )


def _jaccard(a: Iterator[int], b: Iterator[int]) -> float:
    left, right = set(a), set(b)
    return len(left & right) / len(left | right)


def _exhaust(result: object) -> None:
    """A block's `run` may be a generator (which must be drained) or a plain function (which has already run)."""
    if isinstance(result, Iterator):
        for _ in result:
            pass
