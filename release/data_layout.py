"""The files of the tables of documents in a dataset folder: in parts by source.

    kept/<source>/part-*.parquet
    dispositions/<source>/part-*.parquet
    tokens/documents/<source>/part-*.parquet
    order/<phase>/part-*.parquet
    measures/<source>/part-*.parquet
    attribution/<source>/part-*.parquet
    notices/<source>/part-*.parquet
    generated/<source>/part-*.parquet

Part n of each table is about the documents of part n of the source; only sources whose steps measure have `measures`,
and only those with documents whose licenses ask for it `attribution`, those of packages `notices`, and those that a
model wrote `generated`. `over_parts` reads them with several processes.
`stages.formats.table.order_files` gives the files of an order. The folders of earlier runs, `earlier/<key>/`, have the
same files.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.core.parts import PART_NAME, part_file, part_tables
from stages.formats.table import MEASURES

KEPT_TABLE = re.compile(rf"(earlier/[^/]+/)?kept/[^/]+/{PART_NAME}")
"""The paths of tables of kept documents in a dataset folder."""
DISPOSITIONS, KEPT, TOKENS = "dispositions", "kept", "tokens/documents"
"""The folders of the tables that every source has."""
ATTRIBUTION = "attribution"
"""The folder of the tables of documents whose licenses ask for attribution."""
NOTICES = "notices"
"""The folder of the tables of the notices of packages that have such documents."""
GENERATED = "generated"
"""The folder of the tables of how each text of a model was made."""
Files = dict[str, list[Path]]
"""{source: the files of its table, in the order of their parts}, sorted by source."""


@dataclass(frozen=True)
class Part:
    """The tables of one part of the documents of a source. Each file may be missing.

    Attributes:
        source: The source.
        dispositions: The dispositions.
        kept: The kept documents.
        tokens: Their tokens.
    """

    source: str
    dispositions: Path
    kept: Path
    tokens: Path


def has_documents(dataset: Path) -> bool:
    """Returns True if a folder has dispositions, as every dataset folder does."""
    return (dataset / DISPOSITIONS).is_dir()


def kept_files(dataset: Path) -> Files:
    return _parts(dataset / KEPT)


def attribution_files(dataset: Path) -> Files:
    return _parts(dataset / ATTRIBUTION)


def disposition_files(dataset: Path) -> Files:
    return _parts(dataset / DISPOSITIONS)


def token_files(dataset: Path) -> Files:
    return _parts(dataset / TOKENS)


def all_files(files: Files) -> list[Path]:
    return [path for paths in files.values() for path in paths]


def kept_beside(dispositions: Path) -> Path:
    """Returns the table of the kept documents that a table of dispositions is about."""
    return dispositions.parents[2] / KEPT / dispositions.parent.name / dispositions.name


def notice_files(dataset: Path) -> Files:
    return _parts(dataset / NOTICES)


def generated_files(dataset: Path) -> Files:
    return _parts(dataset / GENERATED)


def measure_files(dataset: Path) -> Files:
    return _parts(dataset / MEASURES)


def document_parts(dataset: Path) -> Iterator[Part]:
    """Lists the parts of all documents, by source and number."""
    folders = [dataset / name for name in (DISPOSITIONS, KEPT, TOKENS)]
    tables = [_parts(folder) for folder in folders]
    for source in sorted(set().union(*tables)):
        names: set[str] = set()
        for files in tables:
            names.update(path.name for path in files.get(source, []))

        # A table may lack a part that another table has.
        for name in sorted(names):
            dispositions, kept, tokens = (folder / source / name for folder in folders)
            yield Part(source, dispositions, kept, tokens)


def orders(dataset: Path) -> list[Path]:
    """Lists the folders of the orders of all phases."""
    return sorted(path.parent for path in (dataset / "order").glob("*/meta.json"))


def problems(dataset: Path) -> Iterator[str]:
    """Yields a sentence for each table with missing parts."""
    for folder in (DISPOSITIONS, KEPT, TOKENS):
        for source, files in _parts(dataset / folder).items():
            if [path.name for path in files] != [part_file(number) for number in range(len(files))]:
                yield f"{folder}/{source} does not have the parts 0 to {len(files) - 1}"


def _parts(folder: Path) -> Files:
    """Lists the parts of a table, in a folder with a folder for each source; sources without parts are left out."""
    if not folder.is_dir():
        return {}
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    parts = {path.name: part_tables(path) for path in folders}
    return {source: files for source, files in parts.items() if files}


MOST_ALONE = 64 << 20
"""Bytes of parts that one process reads alone: to start a second one would take about as long."""
Piece = TypeVar("Piece")
Result = TypeVar("Result")


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def over_parts(work: Callable[[Piece], Result], parts: Sequence[Piece], files: Sequence[Path]) -> Iterator[Result]:
    """Yields the result of `work` for each part, in their order.

    Each process holds what one part needs, so memory grows with the cores and not with the parts. `work`, parts and
    results must be picklable. `files` are those that are read; their size decides whether processes are worth it.
    Raises the errors of `work`.
    """
    processes = min(cores(), len(parts))
    size = sum(path.stat().st_size for path in files if path.exists())
    if processes < 2 or size <= MOST_ALONE:
        yield from map(work, parts)
        return

    # A fork would copy the threads' locks of Arrow in an unknown state.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(work, parts)
    finally:
        # A caller that stops early does not wait for parts that have not begun.
        pool.shutdown(cancel_futures=True)
