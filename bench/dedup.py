"""How fast near duplicates are removed: our search against datatrove's four stages of MinHash, CPU seconds a MB.

    .venv/bin/python bench/dedup.py            # about four minutes
    .venv/bin/python bench/dedup.py --quick    # a few seconds; its figures mean nothing

The documents are those of `bench/agreement.py` (or `--documents`), and for every fifth one a copy with a few other
words. Each side signs them, finds the clusters and takes the duplicates out, in turns, each in a process of its own on
one core; imports are not counted. Ours also reads and writes Parquet, removes exact duplicates, and measures the
similarity of each removed document; datatrove has its documents in memory. It runs with its own words for English
(spaCy's), which the ratio is of, and with ours, where it must find the same clusters; with its own, at most 3 % of the
documents that it removes may be others.

Beside it stand the CPU seconds for a billion tokens that Marin published, for 110.2 billion. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

TARGET = 10.0
MAX_DIFFERENT = 0.03
BYTES_PER_TOKEN = 4.3  # English prose, by the tokenizers of today's models
MARIN = {"exact": 56, "near": 790}

Clusters = list[list[int]]


def with_copies(texts: list[str]) -> list[str]:
    """The texts, with a copy of every fifth one in which one word of sixty is another one."""
    rng, copies = random.Random(0), []
    for text in texts[::5]:
        words = text.split(" ")
        for _ in range(1 + len(words) // 60):
            words[rng.randrange(len(words))] = rng.choice(words)
        copies.append(" ".join(words))
    return texts + copies


def remove_duplicates(documents: Path) -> dict[str, Any]:
    """Our search in this process: CPU seconds with and without near duplicates, and the clusters."""
    from stages.data.curate.minhash import band_hashes
    from stages.data.curate.settings import MinHash

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    band_hashes(["It starts here, with these words."], MinHash(), 0)
    texts = {str(n): json.loads(line)["text"] for n, line in enumerate(documents.read_text().splitlines())}
    exact, _ = _remove(texts, None)
    seconds, clusters = _remove(texts, MinHash())
    return {"seconds": seconds, "exact": exact, "clusters": clusters}


def _remove(texts: dict[str, str], minhash: Any) -> tuple[float, Clusters]:
    import pyarrow.parquet as pq

    from pipeline.core.store import Artifact
    from stages.formats.table import write_json
    from tests.fixtures.dedup_fixtures import deduplicate
    from tests.fixtures.filter_fixtures import write_hashes, write_part

    with tempfile.TemporaryDirectory() as place:
        filtered = Path(place, "filtered")
        write_part(filtered, "prose", 0, texts, None)
        write_json(filtered / "edits.json", {"prose": {}})
        source = {"name": "prose", "kind": "prose", "heldout_fraction": 0.05}
        start = time.process_time()
        write_hashes(filtered, "prose", 0, minhash)
        config = {"sources": [source], "minhash": minhash, "alarm_share": 1}
        kept = deduplicate(config, Artifact("filter", "", filtered, ()), Path(place))["dedup"]
        seconds = time.process_time() - start
        rows = pq.read_table(kept / "dispositions/prose", columns=["id", "duplicate_of"]).to_pylist()
    clusters: dict[str, list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        if row["duplicate_of"]:
            clusters[row["duplicate_of"]].append(n)
    return seconds, sorted(sorted([int(kept.removeprefix("prose/")), *others]) for kept, others in clusters.items())


def result_of(python: str, *arguments: str) -> dict[str, Any]:
    process = subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {process.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def different(ours: Clusters, theirs: Clusters) -> float:
    """The share of documents of clusters that are not in the same cluster on both sides."""
    all_documents, common = {n for cluster in theirs for n in cluster}, set(map(tuple, ours)) & set(map(tuple, theirs))
    return 1 - sum(map(len, common)) / len(all_documents)


def measure(texts: list[str], python: str | None, rounds: int) -> dict[str, Any]:
    """python: an interpreter with stock datatrove; None: only datatrove with our words."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    stock, ours = str(ROOT / "bench/stock_minhash.py"), str(ROOT / "bench/dedup.py")
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "documents.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        for _ in range(rounds):
            results = {"ours": result_of(sys.executable, ours, "--ours", str(file))}
            results["datatrove, our words"] = result_of(sys.executable, stock, str(file), "--our-words")
            if python:
                results["datatrove"] = result_of(python, stock, str(file))
            for name, result in results.items():
                seconds[name].append(result["seconds"] / megabytes)
            seconds["ours, exact only"].append(results["ours"]["exact"] / megabytes)
    clusters = {name: result["clusters"] for name, result in results.items()}
    assert clusters["ours"] == clusters["datatrove, our words"], "equal words give other clusters"
    peer = "datatrove" if python else "datatrove, our words"
    other = different(clusters["ours"], clusters[peer])
    assert other <= MAX_DIFFERENT, f"{other:.1%} of the documents in clusters are in others"
    removed = sum(map(len, clusters["ours"])) - len(clusters["ours"])
    print(
        f"{len(texts)} documents, {megabytes:.1f} MB, {removed} removed, {rounds} rounds; of the documents in clusters"
    )
    print(f"of {peer}, {other:.2%} are in others of ours. CPU seconds:")
    print(f"{'':24}{'a MB':>9}{'lowest':>9}{'highest':>9}{'a billion tokens':>20}")
    for name, each in seconds.items():
        tokens = statistics.median(each) * BYTES_PER_TOKEN * 1000
        print(f"{name:24}{statistics.median(each):9.4f}{min(each):9.4f}{max(each):9.4f}{tokens:20.0f}")
    print(f"{'Marin, MinHash':24}{MARIN['near']:47}\n{'Marin, exact':24}{MARIN['exact']:47}")
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[peer], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "name": "dedup", "ratio": round(ratio, 4), "low": round(low, 4), "high": round(high, 4), "target": TARGET,
        "unit": f"CPU seconds of {peer} by ours, one core; low and high: quartiles over rounds",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=Path, help="JSON lines with a `text`")
    parser.add_argument("--python", help="interpreter with stock datatrove and spaCy; default: build/stock-datatrove")
    parser.add_argument("--quick", action="store_true", help="to see that it works, against datatrove with our words")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(remove_duplicates(options.ours)))
        return
    from agreement import DOCUMENTS, stock_python
    from stock_filters import read_texts

    texts = read_texts(options.documents or DOCUMENTS)
    texts = with_copies(texts[::20] if options.quick else texts)
    python = None if options.quick else stock_python(options.python)
    print(json.dumps(measure(texts, python, 2 if options.quick else 5)))


if __name__ == "__main__":
    main()
