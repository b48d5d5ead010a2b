"""How fast the bytes of a repository are checked: `atom verify` against sha256sum over the same files with all cores.

    .venv/bin/python bench/verify.py            # half a minute, 1 GB in the temporary folder
    .venv/bin/python bench/verify.py --quick

The folder is that of one pulled repository: weights in a few large files, and many small ones, as statements are. Both
read it from the page cache, in turns; `xargs -P` gives sha256sum a process for each core and 16 files at a time. Verify
also compares the lists both ways. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from release.audit.verify import verify
from release.layout import SUMS
from release.repositories import files_below, write_sums

TARGET = 0.7


def make(folder: Path, large: int, size: int, small: int) -> int:
    """A repository of so many large files of `size` bytes, and of small ones; returns its bytes."""
    rng = random.Random(0)
    for number in range(large):
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        header = json.dumps({"tensor": entry}).encode()
        weights = struct.pack("<Q", len(header)) + header + rng.randbytes(size)
        (folder / f"model-{number:05d}.safetensors").write_bytes(weights)
    (folder / "statements").mkdir()
    for number in range(small):
        text = json.dumps(rng.randbytes(rng.randrange(500, 20_000)).hex())
        (folder / f"statements/{number:05d}.json").write_text(text)
    (folder / "index.json").write_text("[]")
    paths = files_below(folder)
    write_sums(folder / SUMS, folder, paths)
    return sum((folder / path).stat().st_size for path in paths)


def measure(quick: bool) -> dict[str, Any]:
    rounds, shape = (3, (4, 4_000_000, 50)) if quick else (9, (15, 64_000_000, 500))
    timings: dict[str, list[float]] = {"atom verify": [], "sha256sum": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        total = make(folder, *shape)
        paths = "\0".join(files_below(folder)).encode()
        peer = ["xargs", "-0", "-n16", f"-P{os.cpu_count()}", "sha256sum"]
        for _ in range(rounds):
            start = time.perf_counter()
            verdict = verify(folder)
            timings["atom verify"].append(time.perf_counter() - start)
            (sums,) = (check for check in verdict.checks if check.name.startswith("checksums"))
            assert sums.ok and verdict.kind == "repository", verdict.to_json()
            start = time.perf_counter()
            subprocess.run(peer, input=paths, cwd=folder, stdout=subprocess.DEVNULL, check=True)
            timings["sha256sum"].append(time.perf_counter() - start)
    print(f"{total / 1e6:.0f} MB, {rounds} rounds{'MB/s, median':>28}{'lowest':>9}{'highest':>9}")
    for name, each in timings.items():
        speeds = [total / 1e6 / seconds for seconds in each]
        print(f"{name:24}{statistics.median(speeds):28.0f}{min(speeds):9.0f}{max(speeds):9.0f}")
    ratios = [theirs / ours for ours, theirs in zip(timings["atom verify"], timings["sha256sum"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "name": "verify", "ratio": round(ratio, 4), "low": round(low, 4), "high": round(high, 4), "target": TARGET,
        "unit": f"seconds of sha256sum by ours, {os.cpu_count()} cores; low and high: quartiles over rounds",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="16 MB")
    print(json.dumps(measure(parser.parse_args().quick)))
