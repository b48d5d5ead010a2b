"""How the data stages grow: memory, processor time and disk at growing corpora, fitted and held against limits.

    .venv/bin/python bench/data_scale.py               # 10,000 to 1,000,000 documents, some thirteen minutes
    .venv/bin/python bench/data_scale.py --quick       # 2,000 and 4,000 documents; its laws mean nothing
    .venv/bin/python bench/data_scale.py --full        # also 3,000,000, about half an hour

A corpus is short documents of pseudo-words in JSON Lines files of 10,000 documents, each file a part, once of 500; one
document in a hundred is a copy of an earlier one and one in fifty differs from one in three words. Each stage runs as
on a cluster: a process for the parts, another that joins them. Peak memory is that of the largest process of a stage.
Its slope is by least squares over the sizes that fill buffers, of memory without the pages of mapped files, which the
kernel takes back: from 300,000 documents on. The parts of `duplicates` are the exception: DuckDB has a buffer of 250
MB, which a partition fills only at some three million documents, and until then its growth is that of the buffer. So
one partition alone, of hashes drawn at random, is fitted from 3 to 10 million documents, and a slope of smaller corpora
is not judged there. Peak memory is judged at every size. Joining is serial work, parts are divided by tasks.
Extrapolated is `open.yaml`, with 1.2 and 6 billion documents of 4.3 kB in parts of 1.2 million on 200 tasks: the time
of parts grows with bytes of text, that of joins with documents and with parts, by least squares over both.

The last line is one JSON object. Its ratio is the smallest of limit / measured: 1 or more holds every limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.core.errors import AtomError
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from pipeline.launch.local import JOB_ENVIRONMENT

SIZES, QUICK, FULL = (10_000, 100_000, 300_000, 1_000_000), (2_000, 4_000), (3_000_000,)
PII = {
    "block": "datatrove.pipeline.formatters.PIIFormatter",
    "email_replacement": "email@example.com",
    "ip_replacement": "192.0.2.1",
}
FILE, SMALL_FILE = 10_000, 500
"""Documents of a file, which is a part; of the smaller ones, which tell the cost of a part from that of a document."""
FILLED = 300_000
"""Documents from which memory is fitted: smaller corpora do not fill the buffers that all larger ones do."""
PEAK, SLOPE, DISK, SERIAL_HOURS = 1.5e9, 16, 2.5, 4.0
"""Limits: bytes of a process, bytes a document, bytes on disk by those of the text, hours of serial work."""
REAL_BYTES, REAL_FILE, TASKS = 4300, 1_200_000, 200
"""Of `open.yaml`: bytes of a document, documents of a part; tasks of an array."""
SHORT, LONG = 45, 650
"""Words of a document: short ones for the growth with documents, those of `open.yaml` for the disk and for joins."""
LONG_DOCUMENTS = 100_000
TEXT_READ = 0.1
"""A join that reads a larger share of the bytes of further text grows with it. Documents and ids are far less."""
STAGES = (
    "acquire-web", "items", "filter", "duplicates", "representatives", "dedup", "tokenizer", "tokenize",
    "order-pretrain", "order-midtrain",
)  # fmt: skip
SEARCH, READER = "contamination", "a rank's reader"
PARTITION, COLUMNS = "a partition", ("hash_high", "band_00")
"""One partition of `duplicates`: of equal texts, or of a band of MinHash."""
PARTITION_SIZES, PARTITION_FILE = (3_000_000, 10_000_000), 20_000
"""Documents of a partition, from those on that fill the buffer of DuckDB; of each of its files."""


@dataclass(frozen=True)
class Measured:
    """One process. peak: its largest resident memory; private: without pages of mapped files; read: bytes that it read;
    work, out: bytes that it left on disk."""

    stage: str
    mode: str
    documents: int
    text: int
    parts: int
    seconds: float
    peak: int
    private: int
    read: int
    work: int
    out: int


# --- the corpus


def write_corpus(folder: Path, documents: int, words: int, file_size: int) -> int:
    """Files of `file_size` documents of some `words`; returns the bytes of their text. Equal arguments: equal bytes."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    vocabulary = np.array(["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(20_000)])
    frequency = 1 / np.arange(10, 20_010)
    frequency /= frequency.sum()
    total, earlier = 0, ""
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, documents, file_size)):
        count = min(file_size, documents - first)
        lengths = rng.integers(words * 2 // 3, words * 4 // 3, count)
        drawn = vocabulary[rng.choice(len(vocabulary), int(lengths.sum()), p=frequency)]
        with open(folder / f"{number:05d}.jsonl", "w") as file:
            for row, piece in enumerate(np.split(drawn, np.cumsum(lengths)[:-1])):
                text = " ".join(piece) + "."
                if row % 100 == 7:
                    text = earlier
                elif row % 50 == 9:
                    changed = earlier.split()
                    changed[3:6] = piece[:3]
                    text = " ".join(changed)
                elif row % 10 == 5:
                    earlier = text
                total += len(text)
                file.write(json.dumps({"text": text}) + "\n")
    return total


def write_recipe(folder: Path, documents: int, file_size: int) -> Path:
    """A recipe on the corpus: half of its tokens in pre-training, packed rows in mid-training."""
    source = {
        "name": "web", "kind": "prose", "license": "CC0-1.0", "license_evidence": "pseudo-words of this benchmark",
        "origin": "bench/data_scale.py", "reader": {"reader": "jsonl", "path": str(folder / "corpus")},
        "parts": -(-documents // file_size), "steps": [PII],
    }  # fmt: skip
    data = {"name": "scale", "description": "Pseudo-words.", "heldout_fraction": 0.01, "sources": [source]}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    body = yaml.safe_load((Path(__file__).parent.parent / "pipeline/recipes/atom-smoke.yaml").read_text())
    steps = max(2, documents * 60 // (128 * 128))
    for phase, pack in (("pretrain", False), ("midtrain", True)):
        batch = {"global_tokens": 128 * 128, "micro_tokens": 128 * 128}
        body[phase] |= {"mix": {"web": 1.0}, "sequence_length": 128, "batch": batch, "steps": steps, "pack": pack}
        body[phase] |= {"release_checkpoint_interval": steps, "checkpoint_interval": steps}
        body[phase]["validation"]["every"] = steps
        body[phase]["optimizer"]["warmup_steps"] = 1
    body["tokenizer"] |= {"vocab_size": 8192, "padded_vocab_size": 8192}
    for section in ("sft", "rlvr"):
        del body[section]
    del body["evaluation"]["chat"], body["evaluation"]["waived_gates"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(body | {"name": "scale", "data": "data.yaml"}))
    return folder / "recipe.yaml"


def write_hashes(folder: Path, documents: int) -> None:
    """Hashes as the stage `filter` writes them: one document in a hundred is a copy, one in fifty shares a band."""
    import pyarrow as pa

    from pipeline.core.parts import part_file
    from stages.formats.table import write_table

    rng = np.random.default_rng(0)
    (folder / "web").mkdir(parents=True)
    for number, first in enumerate(range(0, documents, PARTITION_FILE)):
        count = min(PARTITION_FILE, documents - first)
        high, low, band = rng.integers(0, 2**64, (3, count), np.uint64)
        for column in (high, low, band):
            column[7::100] = column[6::100][: len(column[7::100])]
        band[9::50] = band[8::50][: len(band[9::50])]
        write_table(folder / "web" / part_file(number), pa.table({"hash_high": high, "hash_low": low, "band_00": band}))


# --- one process


class Silent:
    """A report that nobody reads."""

    lease = None
    planned_tokens_per_s = 0.0

    def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None: ...
    def metric(self, step: int, **values: float) -> None: ...
    def note(self, text: str) -> None: ...
    def slow_rank(self, text: str | None) -> None: ...

    def seal_checkpoint(self, step: int, folder: Path) -> None: ...
    def abandon(self, text: str) -> NoReturn:
        raise AtomError(text)


def run_stage(store: Store, graph: dag.Graph, name: str, mode: str) -> None:
    """Makes the parts of a stage (mode `parts`), or joins them and seals the artifact."""
    node = graph.nodes[name]
    inputs = {role: store.open(graph.nodes[other].key) for role, other in node.inputs.items()}
    work, out = store.work(node.key) / "state", store.work(node.key) / "out"
    for path in (work, out):
        path.mkdir(parents=True, exist_ok=True)
    if mode == "join":
        node.stage.run(node.config, inputs, work, out, Silent())
        store.seal(out, node.key, lambda artifact: None)
    elif node.stage.run_shard is not None:
        for shard in range(node.stage.shards(node.config)):
            node.stage.run_shard(node.config, inputs, work, shard)


def search_items(store: Store, graph: dag.Graph, mode: str) -> None:
    """Searches the documents of both orders for the evaluation items, as the stage does; there are no scores."""
    from stages.evaluation import contamination

    roles = ("dedup", "items", "order-pretrain", "order-midtrain")
    inputs = {role: store.open(graph.nodes[role].key) for role in roles}
    parts = {source.name: source.parts for source in graph.nodes["dedup"].config.sources}
    config = contamination.ContaminationConfig(parts=parts)
    work, out = store.home / "work" / SEARCH, store.home / "work" / f"{SEARCH}-out"
    for path in (work, out):
        path.mkdir(parents=True, exist_ok=True)
    if mode == "join":
        contamination.run(config, inputs, work, out, Silent())
        return
    for shard in range(contamination.STAGE.shards(config)):
        contamination.run_shard(config, inputs, work, shard)


def read_as_a_rank(store: Store, graph: dag.Graph) -> None:
    """Opens the order and the token shards as a rank does, and reads the rows of twenty steps."""
    from stages.train.data import Order, Shards

    node = graph.nodes["pretrain"]
    phase = node.config.phase
    order = Order(store.open(graph.nodes["order-pretrain"].key), phase)
    shards = Shards(store.open(graph.nodes["tokenize"].key), "train")
    for step in np.linspace(1, phase.steps, 20, dtype=int):
        shards.batch(order.rows(int(step)), phase.sequence_length, False)


def search_partition(home: Path, column: str) -> None:
    """Finds the documents that share a value of a column of hashes, as a task of `duplicates` does."""
    from stages.data.curate import duplicates_stage
    from stages.data.curate.duplicate_groups import write_stars
    from stages.data.curate.settings import Partition, SourcePart
    from stages.formats.database import connect

    parts = [SourcePart(0, "web", number) for number in range(len(list((home / "web").iterdir())))]
    with tempfile.TemporaryDirectory(dir=home) as work, connect(Path(work), duplicates_stage.MEMORY) as database:
        write_stars(database, Path(work), home, parts, Partition(column, 0, 1))


def used() -> tuple[float, int]:
    """Processor seconds and bytes read by this process and its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    read = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
    return sum(usage.ru_utime + usage.ru_stime for usage in usages), read


def child(home: Path, recipe: Path, name: str, mode: str) -> None:
    """Does the work of one process and prints its processor seconds, the bytes that it read, and its peak memory."""
    private, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.02):
            resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
            private[0] = max(private[0], (int(resident) - int(shared)) * resource.getpagesize())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    if name != PARTITION:
        store = Store(home)
        graph = dag.compose(recipes.load(str(recipe)), store)
    before = used()  # planning hashes the source; the job of a stage gets its config from the plan
    if name == PARTITION:
        search_partition(home, mode)
    elif name == READER:
        read_as_a_rank(store, graph)
    elif name == SEARCH:
        search_items(store, graph, mode)
    else:
        run_stage(store, graph, name, mode)
    seconds, read = (after - start for after, start in zip(used(), before, strict=True))
    status = Path("/proc/self/status").read_text()  # ru_maxrss of this process counts the parent that started it
    ended.set()
    thread.join()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak = 1024 * max(int(re.search(r"VmHWM:\s+(\d+)", status)[1]), children)
    print(json.dumps({"seconds": seconds, "peak": peak, "private": private[0], "read": read}))


# --- all processes, and what follows from them


def bytes_below(folder: Path) -> int:
    """Bytes on disk; a file with two links counts once."""
    files = {(s := path.stat()).st_ino: s.st_size for path in folder.rglob("*") if path.is_file()}
    return sum(files.values())


def run_child(home: Path, recipe: Path, name: str, mode: str, documents: int) -> dict[str, Any]:
    """What a process of its own used; prints the beginning of its row."""
    command = [sys.executable, "-P", __file__, "--child", str(home), str(recipe), name, mode]
    environment = {**os.environ, **JOB_ENVIRONMENT}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if process.returncode:
        raise SystemExit(f"{name} of {documents} documents, {mode}:\n{process.stderr[-3000:]}")
    usage: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    figures = f"{usage['seconds']:9.1f} s {usage['peak'] / 1e6:7.0f} MB {usage['private'] / 1e6:7.0f} MB"
    print(f"{documents:>10,} {name:>16} {mode:>9}{figures}", end="", flush=True)
    return usage


def measure_partitions(sizes: Sequence[int], place: Path) -> list[Measured]:
    """One partition of `duplicates` of each size, by equal texts and by a band."""
    rows = []
    for documents in sizes:
        write_hashes(place, documents)
        for column in COLUMNS:
            usage = run_child(place, place, PARTITION, column, documents)
            print()
            parts = -(-documents // PARTITION_FILE)
            rows.append(Measured(PARTITION, column, documents, 0, parts, **usage, work=0, out=0))
        shutil.rmtree(place)
    return rows


def measure(documents: int, place: Path, words: int = SHORT, file_size: int = FILE) -> list[Measured]:
    """Each process of each stage on a corpus of that size."""
    place.mkdir()
    text, home = write_corpus(place / "corpus", documents, words, file_size), place / "home"
    recipe = write_recipe(place, documents, file_size)
    graph = dag.compose(recipes.load(str(recipe)), Store(home))
    rows: list[Measured] = []
    for name in (*STAGES, SEARCH, READER):
        in_parts = name == SEARCH or (name in STAGES and graph.nodes[name].stage.run_shard is not None)
        for mode in ("parts", "join") if in_parts else ("join",):
            usage = run_child(home, recipe, name, mode, documents)
            work = bytes_below(home / "work")
            out = bytes_below(home / "artifacts") if (home / "artifacts").exists() else 0
            parts = -(-documents // file_size)
            rows.append(Measured(name, mode, documents, text, parts, **usage, work=work, out=out))
            print(f"{work / text:6.2f}{out / text:6.2f}", flush=True)
        shutil.rmtree(home / "work", ignore_errors=True)
    shutil.rmtree(place)
    return rows


def fit(rows: list[Measured], x: str, y: str) -> tuple[float, float]:
    """Intercept and slope of y over x by least squares."""
    slope, intercept = np.polyfit([getattr(r, x) for r in rows], [getattr(r, y) for r in rows], 1)
    return float(intercept), float(slope)


def fit_join(rows: list[Measured]) -> tuple[float, float, float]:
    """Seconds of a join: at the start, a document, a part. None is negative."""
    from scipy.optimize import nnls

    scales = np.array([1.0, max(row.documents for row in rows), max(row.parts for row in rows)])
    terms = np.array([(1.0, row.documents, row.parts) for row in rows]) / scales
    start, by_document, by_part = nnls(terms, np.array([row.seconds for row in rows]))[0] / scales
    return float(start), float(by_document), float(by_part)


def filled(rows: list[Measured]) -> list[Measured]:
    """The rows of the corpora that fill buffers, in large parts; all if fewer than two do."""
    large = [row for row in rows if row.documents >= FILLED and row.documents >= FILE * row.parts]
    return large if len(large) > 1 else rows


def join_seconds(rows: list[Measured], long: list[Measured]) -> tuple[float, float]:
    """Seconds a document and a part of a join, on documents of the length of `open.yaml`'s. long: measured on fewer and
    on more of these."""
    _, by_document, by_part = fit_join(rows)
    small, large = long
    if large.read - small.read > TEXT_READ * (large.text - small.text):
        by_document = max(by_document, (large.seconds - small.seconds) / (large.documents - small.documents))
    return by_document, by_part


def summarize(rows: list[Measured], long: list[Measured]) -> dict[str, Any]:
    """Prints the laws and the extrapolation; returns the smallest ratio and what it is of. long: on long documents."""
    ratios: dict[str, float] = {}
    processes = sorted({(row.stage, row.mode) for row in rows}, key=[(r.stage, r.mode) for r in rows].index)
    print(f"\n{'process':>24}{'peak MB':>9}{'B/document':>12}{'s/MB':>9}{'µs/document':>13}{'ms/part':>9}")
    serial, parallel = {1.2e9: 0.0, 6e9: 0.0}, {1.2e9: 0.0, 6e9: 0.0}
    for stage, mode in processes:
        mine = [row for row in rows if (row.stage, row.mode) == (stage, mode)]
        peak, (_, slope) = max(row.peak for row in mine), fit(filled(mine), "documents", "private")
        ratios[f"peak memory of {stage}, {mode}"] = PEAK / peak
        line = f"{stage + ' ' + mode:>24}{peak / 1e6:9.0f}"
        if (stage, mode) == ("duplicates", "parts"):
            line += f"{'':12}"  # its partitions have the slope
        else:
            line += f"{slope:12.1f}"
            ratios[f"memory a document of {stage}, {mode}"] = SLOPE / max(slope, 1e-9)
        if stage == PARTITION:
            print(line)
            continue
        if mode == "parts":
            (_, by_text), by_document, by_part = fit(mine, "text", "seconds"), 0.0, 0.0
            print(f"{line}{by_text * 1e6:9.3f}")
        else:
            by_document, by_part = join_seconds(mine, [row for row in long if (row.stage, row.mode) == (stage, mode)])
            print(f"{line}{'':9}{by_document * 1e6:13.2f}{by_part * 1e3:9.2f}")
        for documents in serial:
            if stage == READER:
                continue  # part of training: each rank reads its own rows
            if mode == "parts":
                parallel[documents] += max(by_text, 0) * documents * REAL_BYTES / TASKS / 3600
            else:
                serial[documents] += (by_document * documents + by_part * documents / REAL_FILE) / 3600
    disk = max((row.work + row.out) / row.text for row in long if row.documents == long[-1].documents)
    size = long[-1].text // long[-1].documents
    print(f"work and artifacts: {disk:.2f} bytes a byte of text, in documents of {size} bytes")
    ratios["disk"] = DISK / disk
    for documents in serial:
        print(
            f"{documents / 1e9:.1f} billion documents on {TASKS} tasks: parts {parallel[documents]:.1f} h, "
            f"joins {serial[documents]:.1f} h"
        )
        ratios[f"serial work at {documents / 1e9:.1f} billion documents"] = SERIAL_HOURS / serial[documents]
    name = min(ratios, key=lambda key: ratios[key])
    return {
        "name": "data_scale", "ratio": round(ratios[name], 4), "low": round(ratios[name], 4),
        "high": round(ratios[name], 4), "target": 1.0, "unit": f"limit / measured, smallest: {name}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2,000 and 4,000 documents")
    parser.add_argument("--full", action="store_true", help="up to 3,000,000 documents: half an hour")
    parser.add_argument("--sizes", type=int, nargs="+", help="documents of each corpus, instead")
    parser.add_argument("--child", nargs=4, metavar=("HOME", "RECIPE", "NAME", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), Path(arguments.child[1]), *arguments.child[2:])
    else:
        sizes = arguments.sizes or (QUICK if arguments.quick else SIZES + FULL * arguments.full)
        with tempfile.TemporaryDirectory() as folder:
            measured = [row for size in sizes for row in measure(size, Path(folder) / str(size))]
            print(f"one partition of duplicates, in files of {PARTITION_FILE:,} documents")
            partitions = QUICK if arguments.quick else PARTITION_SIZES
            measured += measure_partitions(partitions, Path(folder) / "hashes")
            print(f"parts of {SMALL_FILE} documents")
            small = min(LONG_DOCUMENTS, *sizes[-2:])
            measured += measure(small, Path(folder) / "small", file_size=SMALL_FILE)
            print("documents of the length of open.yaml's")
            long = [row for size in (small // 10, small) for row in measure(size, Path(folder) / f"long-{size}", LONG)]
        print(json.dumps(summarize(measured, long)))
