"""How fast documents are filtered: our steps against the same blocks of stock datatrove, CPU seconds a MB.

    .venv/bin/python bench/filters.py            # about four minutes
    .venv/bin/python bench/filters.py --quick    # 100 documents, datatrove's blocks with our words instead of spaCy

Both run a chain of language, gopher_repetition, gopher_quality, c4, fineweb and pii at equal settings over the
documents of `bench/agreement.py` (or `--documents`), in turns, each in a process of its own that starts with empty
tables; imports and models are not counted. The kept texts must be the same, and the reasons for removals may differ for
at most 3 % of the documents; the table says for how many they do. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from agreement import DOCUMENTS, results, stock_python
from stock_filters import read_texts

TARGET = 6.0
MAX_DIFFERENT = 0.03


def measure(documents: Path, python: str, rounds: int, quick: bool) -> dict[str, Any]:
    texts = read_texts(documents)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    seconds: dict[str, list[float]] = {"ours": [], "datatrove": []}
    for _ in range(rounds):
        ours = results(sys.executable, documents, "--ours")
        stock = results(python, documents, *(["--our-words"] if quick else []))
        seconds["ours"].append(ours["seconds"] / megabytes)
        seconds["datatrove"].append(stock["seconds"] / megabytes)
    pairs = list(zip(ours["results"], stock["results"], strict=True))
    different = sum(isinstance(a, list) or isinstance(b, list) for a, b in pairs if a != b)
    assert different <= MAX_DIFFERENT * len(texts), f"{different} of {len(texts)} documents have another verdict"
    assert all(a == b for a, b in pairs if isinstance(a, str) and isinstance(b, str)), "a kept text differs"
    kept = sum(isinstance(result, str) for result in ours["results"])
    print(f"{len(texts)} documents, {megabytes:.1f} MB, {kept} kept, {different} with another verdict, {rounds} rounds")
    print(f"{'CPU s a MB':16}{'median':>9}{'lowest':>9}{'highest':>9}")
    for name, each in seconds.items():
        print(f"{name:16}{statistics.median(each):9.3f}{min(each):9.3f}{max(each):9.3f}")
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["datatrove"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "name": "filters", "ratio": round(ratio, 4), "low": round(low, 4), "high": round(high, 4), "target": TARGET,
        "unit": "CPU seconds of datatrove with spaCy by ours, one thread; low and high: quartiles over rounds",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=Path, default=DOCUMENTS, help="JSON lines with a `text`")
    parser.add_argument("--python", help="interpreter with stock datatrove and spaCy; default: build/stock-datatrove")
    parser.add_argument("--quick", action="store_true", help="to see that it works; its figures mean nothing")
    options = parser.parse_args()
    if not options.quick:
        print(json.dumps(measure(options.documents, stock_python(options.python), 5, quick=False)))
        return
    with tempfile.TemporaryDirectory() as place:
        sample = Path(place) / "documents.jsonl"
        texts = read_texts(options.documents)[::20]
        sample.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        print(json.dumps(measure(sample, sys.executable, 3, quick=True)))


if __name__ == "__main__":
    main()
