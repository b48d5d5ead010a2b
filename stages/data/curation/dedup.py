"""Exact and near duplicates over all sources, with the document that stays in place of each one removed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig

from pipeline.errors import AtomError
from stages.data.curation.dispositions import Dispositions
from stages.data.curation.settings import MinHash
from stages.data.curation.words import WORDS
from stages.data.table import content_hash

Documents = dict[str, list[Document]]  # by source, in the order of the recipe
Signature = list[int]  # all hashes of a document, bucket after bucket; empty of a text shorter than one n-gram


def exact(documents: Documents, dispositions: Dispositions) -> Documents:
    """Keeps the first document of each SHA-256 of the text, over all sources in their order.

    datatrove's exact block hashes to 64 bits and does not name the kept document.
    """
    first: dict[str, str] = {}
    kept: Documents = {}
    for source, docs in documents.items():
        kept[source] = []
        for doc in docs:
            digest = content_hash(doc.text)
            if digest in first:
                dispositions.remove(doc.id, "exact_duplicate", 1.0, 1.0, duplicate_of=first[digest])
            else:
                first[digest] = doc.id
                kept[source].append(doc)
    return kept


class _Removed:
    """Stands where datatrove writes excluded documents."""

    def __init__(self) -> None:
        self.documents: list[Document] = []

    def __enter__(self) -> _Removed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def write(self, document: Document, rank: int = 0) -> None:
        self.documents.append(document)


def sign(texts: list[str], settings: MinHash, seed: int) -> list[Signature]:
    """The MinHash signature of each text, which takes most of the time of finding near duplicates and needs no other
    text."""
    signer = MinhashDedupSignature("memory://", config=_config(settings, seed), language=WORDS)
    found = (signer.get_shingles(text) for text in texts)
    return [list(chain(*signer.get_signature(shingles))) if shingles.size else [] for shingles in found]


class _Signed(MinhashDedupSignature):  # type: ignore[misc]
    """datatrove's first stage with signatures that were made beforehand: the shingles of a text are its signature."""

    def __init__(self, folder: str, config: MinhashConfig, signatures: Mapping[str, Signature]) -> None:
        super().__init__(folder, config=config, language=WORDS)
        self.signatures = signatures

    def get_shingles(self, text: str) -> Any:
        return np.array(self.signatures.get(text, []), dtype=np.uint64)

    def get_signature(self, shingles: Any) -> list[list[int]]:
        return [part.tolist() for part in np.split(shingles, self.config.num_buckets)]


def near(
    documents: Documents,
    signatures: Mapping[str, Signature],
    settings: MinHash,
    seed: int,
    folder: Path,
    dispositions: Dispositions,
) -> Documents:
    """Keeps one document of each MinHash cluster (datatrove's four stages, one shard a source).

    signatures: what `sign` gave for each text. Pairs that share a bucket are joined transitively, so the measured
    similarity (Jaccard index of word n-grams, the `value`) of a removed document with the kept one may lie below the
    threshold. `folder` must be empty.
    """
    config = _config(settings, seed)
    signed, pairs, clusters = (str(folder / name) for name in ("signatures", "pairs", "clusters"))
    signer = _Signed(signed, config, signatures)
    for rank, docs in enumerate(documents.values()):
        _exhaust(signer.run(iter(docs), rank=rank, world_size=len(documents)))
    for bucket in range(settings.num_buckets):
        finder = MinhashDedupBuckets(signed, pairs, config=config)
        _exhaust(finder.run(None, rank=bucket, world_size=settings.num_buckets))
    cluster = MinhashDedupCluster(pairs, clusters, config=config, save_cluster_id=True)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no option turns off
        _exhaust(cluster.run(None, 0, 1))

    kept: Documents = {}
    removed: list[Document] = []
    for rank, (source, docs) in enumerate(documents.items()):
        excluded = _Removed()
        has_clusters = Path(clusters, f"{rank:06d}.clusters").exists()
        block = MinhashDedupFilter(clusters, exclusion_writer=excluded, load_cluster_ids=has_clusters)
        kept[source] = list(block.run(iter(docs), rank=rank, world_size=len(documents)))
        removed.extend(excluded.documents)
    stays = {d.metadata.get("minhash_cluster_id", -1): d for docs in kept.values() for d in docs}
    stays.pop(-1, None)
    plain = MinhashDedupSignature(signed, config=config, language=WORDS)
    for doc in removed:
        twin = stays.get(doc.metadata["minhash_cluster_id"])
        if twin is None:
            raise AtomError(f"MinHash removed {doc.id} but kept nothing of its cluster; this is a fault of curation")
        similarity = _jaccard(plain.get_shingles(doc.text).ravel(), plain.get_shingles(twin.text).ravel())
        dispositions.remove(doc.id, "near_duplicate", similarity, settings.threshold, duplicate_of=twin.id)
    return kept


def _config(settings: MinHash, seed: int) -> MinhashConfig:
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
