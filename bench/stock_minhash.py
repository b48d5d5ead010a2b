"""Runs datatrove's four stages of MinHash over documents, and prints processor seconds and clusters as JSON.

    python bench/stock_minhash.py documents.jsonl               # with its own words for English: needs spaCy
    python bench/stock_minhash.py documents.jsonl --our-words

Run by bench/dedup.py, in an environment where only datatrove is installed. Documents come from memory and end there;
imports and the tokenizer's start are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import struct
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from loguru import logger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", type=Path, help="JSON lines with a `text`")
    parser.add_argument("--our-words", action="store_true", help="our tokenizer in the place of spaCy")
    options = parser.parse_args()
    logger.remove()
    words = "eng"
    if options.our_words:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from stages.data.curate.words import WORDS as words
    texts = [json.loads(line)["text"] for line in options.documents.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        seconds, kept = run(texts, words, Path(place))
        clusters = defaultdict(list)
        for row, cluster in struct.iter_unpack("<2I", (Path(place) / "clusters/000000.clusters").read_bytes()):
            clusters[cluster].append(row)
    print(json.dumps({"seconds": seconds, "kept": kept, "clusters": sorted(map(sorted, clusters.values()))}))


def run(texts: list[str], words: object, folder: Path) -> tuple[float, int]:
    """Processor seconds, and the number of documents that stay. Leaves the clusters in `folder`."""
    config = MinhashConfig(seed=0, hash_config=HashConfig(precision=64))
    signatures, pairs, clusters = (str(folder / name) for name in ("signatures", "pairs", "clusters"))
    signer = MinhashDedupSignature(signatures, config=config, language=words)
    signer.get_shingles("It starts here, with these words.")
    start = time.process_time()
    documents = [Document(text, str(n)) for n, text in enumerate(texts)]
    signer.run(documents)
    for bucket in range(config.num_buckets):
        MinhashDedupBuckets(signatures, pairs, config=config).run(None, bucket, config.num_buckets)
    MinhashDedupCluster(pairs, clusters, config=config, save_cluster_id=True).run(None, 0, 1)
    kept = sum(1 for _ in MinhashDedupFilter(clusters).run(documents))
    return time.process_time() - start, kept


if __name__ == "__main__":
    main()
