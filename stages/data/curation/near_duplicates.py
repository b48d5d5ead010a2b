"""Near duplicates by MinHash (datatrove's stages), with the kept document for each removed one."""

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
from stages.data.curation.settings import MinHash
from stages.data.curation.words import WORDS
from stages.data.table import stream_rows

Signature = list[int]  # all hashes of a document, bucket after bucket; empty for a text shorter than one n-gram


@dataclass(frozen=True)
class NearDuplicate:
    """The kept document of a near duplicate, and (similarity, threshold)."""

    id: str
    measured: tuple[float, float]


def sign(texts: list[str], settings: MinHash, seed: int) -> list[Signature]:
    """The MinHash signature of each text. This is the longest part of near-duplicate search, and independent for each
    text."""
    signer = MinhashDedupSignature("memory://", config=_config(settings, seed), language=WORDS)
    shingle_sets = (signer.get_shingles(text) for text in texts)
    return [list(chain(*signer.get_signature(shingles))) if shingles.size else [] for shingles in shingle_sets]


class _PrecomputedSignatures(MinhashDedupSignature):  # type: ignore[misc]
    """datatrove's first stage with precomputed signatures: a document's text is its signature."""

    def get_shingles(self, text: str) -> Any:
        return np.frombuffer(bytes.fromhex(text), np.uint64)

    def get_signature(self, shingles: Any) -> list[list[int]]:
        return [part.tolist() for part in np.split(shingles, self.config.num_buckets)]


def write_signatures(folder: Path, settings: MinHash, number: int, signatures: Iterable[Signature]) -> None:
    """Writes datatrove's files of signatures of one source, one file for each bucket. number: of the source, from 0."""
    signer = _PrecomputedSignatures(str(folder), config=_config(settings), language=WORDS)
    _exhaust(signer.run((Document(np.array(s, np.uint64).tobytes().hex(), "") for s in signatures), rank=number))


def find_pairs(signatures: Path, work: Path, settings: MinHash, bucket: int) -> bytes:
    """The pairs of documents that share a bucket, in datatrove's format, cached in `work`."""

    def make() -> str:
        with TemporaryDirectory(dir=work) as folder:
            finder = MinhashDedupBuckets(str(signatures), folder, config=_config(settings))
            _exhaust(finder.run(None, rank=bucket, world_size=settings.num_buckets))
            return b64encode((Path(folder) / _pairs_file(bucket)).read_bytes()).decode()

    return b64decode(once(work / f"pairs-{bucket:05d}-of-{settings.num_buckets:05d}.json", make))


def find_near_duplicates(
    files: list[Path], pairs: Iterable[bytes], work: Path, settings: MinHash
) -> dict[str, NearDuplicate]:
    """The near duplicates to remove, by id: one document of each cluster is kept.

    files: the documents of each source, in the order of the signatures' numbers; pairs: of each bucket in turn.
    Documents that share a bucket are joined transitively, so the similarity (Jaccard index of word n-grams) of a
    removed document with the kept one may be below the threshold.
    """
    pair_folder, folder = work / "pairs", work / "clusters"
    for path in (pair_folder, folder):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    for bucket, bucket_pairs in enumerate(pairs):
        (pair_folder / _pairs_file(bucket)).write_bytes(bucket_pairs)
    cluster = MinhashDedupCluster(str(pair_folder), str(folder), config=_config(settings), save_cluster_id=True)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no option turns off
        _exhaust(cluster.run(None, 0, 1))

    kept: dict[int, tuple[str, str]] = {}
    removed: list[tuple[int, str, str]] = []
    for number, file in enumerate(files):
        removed_rows = {row for (row,) in _read(folder / f"{number:06d}.remove", "<I")}
        clusters = {row: cluster for row, cluster in _read(folder / f"{number:06d}.clusters", "<2I")}
        for n, row in enumerate(stream_rows(file, ["id", "text"]) if clusters else ()):
            if n in removed_rows:
                removed.append((clusters[n], row["id"], row["text"]))
            elif n in clusters:
                kept[clusters[n]] = row["id"], row["text"]
    shingler = MinhashDedupSignature("memory://", config=_config(settings), language=WORDS)
    duplicates = {}
    for number, id, text in removed:
        if number not in kept:
            raise AtomError(f"MinHash removed {id} but kept nothing of its cluster; this is a fault of curation")
        kept_id, kept_text = kept[number]
        similarity = _jaccard(shingler.get_shingles(text).ravel(), shingler.get_shingles(kept_text).ravel())
        duplicates[id] = NearDuplicate(kept_id, (similarity, settings.threshold))
    return duplicates


def _pairs_file(bucket: int) -> str:
    """The name that datatrove gives the file."""
    return f"{bucket:05d}_00.dups"


def _read(path: Path, form: str) -> Iterator[tuple[int, ...]]:
    """The tuples in a file of datatrove; none if it was not written."""
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
    first, second = set(a), set(b)
    return len(first & second) / len(first | second)


def _exhaust(result: object) -> None:
    """A block's `run` may be a generator (which must be drained) or a plain function (which has already run)."""
    if isinstance(result, Iterator):
        for _ in result:
            pass
