"""Tokenizing against Hugging Face `tokenizers` on the same text, in CPU seconds a megabyte.

    .venv/bin/python bench/encode.py            # about five minutes
    .venv/bin/python bench/encode.py --quick    # a megabyte and a small vocabulary; its figures mean nothing
    .venv/bin/python bench/encode.py DIRECTORY …    # other text: its .txt, .md, .rst and .py files

The text is what this machine has: descriptions of the installed Python packages, documentation of the installed
programs, and the source of the standard library. A tokenizer is trained on it first. Ours is the stage as a task runs
it: one part of Parquet is read, encoded with tiktoken, and written as a shard with its table. The peers only encode the
texts, which are in memory. All run in turn on one thread, and the shard must hold the ids of the peer. A round's ratio
is the seconds of `encode_batch` by those of ours. The last line is one JSON object.
"""

from __future__ import annotations

import os

os.environ["RAYON_NUM_THREADS"] = "1"

import argparse
import gzip
import json
import platform
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from pipeline.core.parts import part_file
from pipeline.core.store import Artifact
from stages.data.order import tokenize_stage
from stages.data.order.tokenize_stage import Encoder
from stages.formats.table import KEPT, content_hash, write_rows
from stages.formats.tokenizer import END, bpe_trainer, save, untrained

TARGET = 5.0
MARIN = 1_525
"""CPU seconds that Marin reports for tokenizing a billion tokens."""
LONGEST = 200_000  # characters of a document


@dataclass(frozen=True)
class Size:
    megabytes: float
    vocab: int
    rounds: int


FULL, QUICK = Size(16, 65_536, 7), Size(0.5, 2_000, 3)


def files() -> Iterator[Path]:
    """Prose and code of this machine."""
    packages, library = (Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib"))
    yield from packages.glob("*.dist-info/METADATA")
    for pattern in ("README*", "NEWS*", "changelog*", "*.txt*", "*.md", "*.html", "FAQ*"):
        yield from Path("/usr/share/doc").rglob(pattern)
    yield from library.glob("*.py")
    yield from library.glob("[a-z]*/*.py")


def read(paths: list[Path], size: float) -> list[str]:
    """Distinct texts of `size` megabytes in random order, the long ones cut."""
    random.Random(0).shuffle(paths)
    texts: dict[str, None] = {}
    total = 0
    for path in paths:
        if total >= size * 1e6:
            break
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = data.decode()[:LONGEST]
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) > 200 and text not in texts:
            texts[text] = None
            total += len(text.encode())
    return list(texts)


def make_inputs(folder: Path, texts: list[str], vocab: int) -> dict[str, Artifact]:
    """The texts as one part of kept documents, and a tokenizer that is trained on them."""
    rows = [
        {"id": f"text/{n}", "text": text, "source": "text", "license": "", "origin": "", "split": "train",
         "content_hash": content_hash(text), "prompt_chars": 0}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    write_rows(folder / "dedup/kept/text" / part_file(0), KEPT, rows)
    tokenizer = untrained()
    tokenizer.train_from_iterator(texts, bpe_trainer(vocab))
    (folder / "tokenizer").mkdir()
    save(tokenizer, folder / "tokenizer")
    return {role: Artifact(role, "", folder / role, ()) for role in ("dedup", "tokenizer")}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(size: Size, folders: list[Path]) -> dict[str, Any]:
    given = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".txt", ".md", ".rst", ".py")]
    texts = read(sorted({path for path in (given or files()) if path.is_file()}), size.megabytes)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    seconds: dict[str, list[float]] = {
        name: [] for name in ("ours", "tiktoken alone", "encode_batch", "encode_batch_fast")
    }
    with tempfile.TemporaryDirectory() as place:
        inputs = make_inputs(Path(place), texts, size.vocab)
        encoder = Encoder(inputs["tokenizer"] / "tokenizer.json")
        assert encoder.fast
        tokenizer, end = encoder.tokenizer, encoder.tokenizer.token_to_id(END)
        config = tokenize_stage.TokenizeConfig(parts={"text": 1})
        for number in range(size.rounds):
            work = Path(place, f"work-{number}")
            taken, _ = timed(lambda work=work: tokenize_stage.run_shard(config, inputs, work, 0))
            seconds["ours"].append(taken)
            seconds["tiktoken alone"].append(timed(lambda: encoder.encode(texts))[0])
            taken, encodings = timed(lambda: tokenizer.encode_batch(texts, add_special_tokens=False))
            seconds["encode_batch"].append(taken)
            expected = np.array([i for encoding in encodings for i in [*encoding.ids, end]])
            del encodings
            taken, _ = timed(lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False))
            seconds["encode_batch_fast"].append(taken)
            shard = np.fromfile(work / "text-00000/train/text/part-00000.bin", "<u2")
            assert (shard == expected).all(), "the ids differ"
    print(f"{megabytes:.1f} MB, {len(texts)} documents, {len(expected)} tokens of {size.vocab}; {size.rounds} rounds")
    print(f"{'CPU s a MB':24}{'median':>9}{'lowest':>9}{'highest':>9}")
    for name, each in seconds.items():
        rates = [taken / megabytes for taken in each]
        print(f"{name:24}{statistics.median(rates):9.4f}{min(rates):9.4f}{max(rates):9.4f}")
    per_billion = statistics.median(seconds["ours"]) * 1e9 / len(expected)
    print(f"CPU seconds a billion tokens: ours {per_billion:.0f}, Marin's published {MARIN}")
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["encode_batch"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "name": "encode", "ratio": round(ratio, 4), "low": round(low, 4), "high": round(high, 4), "target": TARGET,
        "unit": "CPU seconds of encode_batch by those of the whole stage; low and high: quartiles over rounds",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIRECTORY", help="other text")
    parser.add_argument("--quick", action="store_true", help="half a megabyte")
    arguments = parser.parse_args()
    print(json.dumps(measure(QUICK if arguments.quick else FULL, arguments.folders)))
