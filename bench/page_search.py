"""The search of a release's page: time, memory and size of its index, by the number of documents.

    python bench/page_search.py --documents 10000

Writes documents of random words with Zipf's distribution, 150 on average, in parts of 5,000, and indexes them in a
process of its own, whose largest memory counts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PART, WORDS, VOCABULARY = 5_000, 150, 200_000
INDEX = """
import sys, time
from pathlib import Path
from release.web_page import search_index
from release.web_page.script_parts import PartWriter

def highest():  # getrusage counts what the parent had before exec
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

import pyarrow.parquet, numpy
before = highest()
start = time.process_time()
search_index.write(Path(sys.argv[1]), PartWriter(Path(sys.argv[1]) / "site"))
print(time.process_time() - start, highest(), before)
"""


def write_documents(release: Path, count: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.core.store import sha256_bytes

    draw = np.random.default_rng(1)
    for part in range(-(-count // PART)):
        rows: list[dict[str, Any]] = []
        for number in range(part * PART, min(count, (part + 1) * PART)):
            words = np.minimum(draw.zipf(1.3, draw.integers(20, 2 * WORDS - 20)), VOCABULARY)
            text = " ".join(f"w{word}" for word in words.tolist())
            row = {"id": f"random/{number}", "text": text, "source": "random", "license": "CC0-1.0", "origin": "here"}
            rows.append(row | {"content_hash": sha256_bytes(text.encode()), "split": "train"})
        for folder in ("kept", "dispositions", "tokens/documents"):
            path = release / "dataset" / folder / "random" / f"part-{part:05}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows if folder == "kept" else [{"id": ""}]), path, compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000)
    count = parser.parse_args().documents
    with tempfile.TemporaryDirectory() as folder:
        release = Path(folder)
        write_documents(release, count)
        command = [sys.executable, "-P", "-c", INDEX, folder]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, memory, before = map(float, process.stdout.split())
        sizes = [path.stat().st_size for path in (release / "site").rglob("*.js")]
    print(f"{count} documents: {seconds:.1f} s of the processor, {memory:.0f} MiB (before: {before:.0f} MiB)")
    print(f"{len(sizes)} parts, {sum(sizes) / 1e6:.1f} MB, the largest {max(sizes) / 1e3:.0f} kB")
    figures = {"documents": count, "seconds": seconds, "memory_mib": memory, "bytes": sum(sizes), "parts": len(sizes)}
    print(json.dumps({"name": "page_search", **figures}))


if __name__ == "__main__":
    main()
