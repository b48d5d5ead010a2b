"""The files of the tables of documents in a dataset folder: in parts by source, or one file as before format 4.

    kept/<source>/part-*.parquet               kept/<source>.parquet
    dispositions/<source>/part-*.parquet       dispositions.parquet
    tokens/documents/<source>/part-*.parquet   tokens/documents.parquet
    order/<phase>/part-*.parquet               order/<phase>/order.parquet
    measures/<source>/part-*.parquet           none
    attribution/<source>/part-*.parquet        attribution/<source>.parquet
    notices/<source>/part-*.parquet            none
    generated/<source>/part-*.parquet          none

Part n of each table is about the documents of part n of the source; only sources whose steps measure have `measures`,
and only those with documents whose licenses ask for it `attribution`, those of packages `notices`, and those that a
model wrote `generated`.
`stages.data.table.order_files` gives the files of an order. The folders of earlier runs, `earlier/<key>/`, have the
same files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.parts import PART_NAME, part_file, part_number, part_tables
from stages.data.table import MEASURES

KEPT_TABLE = re.compile(rf"(earlier/[^/]+/)?kept/([^/]+/{PART_NAME}|[^/]+\.parquet)")
"""The paths of tables of kept documents in a dataset folder."""
ATTRIBUTION = "attribution"
"""The folder of the tables of documents whose licenses ask for attribution."""
NOTICES = "notices"
"""The folder of the tables of the notices of packages that have such documents."""
GENERATED = "generated"
"""The folder of the tables of how each text of a model was made."""
ALL = ""
"""Stands for the source of a table of all sources."""
Files = dict[str, list[Path]]
"""{source: the files of its table, by part}, by source."""


@dataclass(frozen=True)
class Part:
    """The tables of a part of the documents: of one source, or of all in releases before format 4.

    dispositions, tokens: a file, which may be missing. kept: {source: a file, which may be missing}.
    """

    dispositions: Path
    kept: Mapping[str, Path]
    tokens: Path


def in_parts(dataset: Path) -> bool:
    return (dataset / "dispositions").is_dir()


def has_documents(dataset: Path) -> bool:
    """Whether a folder has dispositions, as every dataset folder does."""
    return in_parts(dataset) or (dataset / "dispositions.parquet").exists()


def kept_files(dataset: Path) -> Files:
    return _files(dataset / "kept")


def attribution_files(dataset: Path) -> Files:
    return _files(dataset / ATTRIBUTION)


def disposition_files(dataset: Path) -> Files:
    """One file of `ALL` in releases before format 4; it may be missing."""
    return _parts(dataset / "dispositions") or {ALL: [dataset / "dispositions.parquet"]}


def token_files(dataset: Path) -> Files:
    """One file of `ALL` in releases before format 4; it may be missing."""
    return _parts(dataset / "tokens/documents") or {ALL: [dataset / "tokens/documents.parquet"]}


def all_files(files: Files) -> list[Path]:
    return [path for paths in files.values() for path in paths]


def kept_beside(dispositions: Path, source: str) -> Path:
    """The table of the kept documents of a source that a table of dispositions is about."""
    if part_number(dispositions) is not None:
        return dispositions.parents[2] / "kept" / source / dispositions.name
    return dispositions.parent / "kept" / f"{source}.parquet"


def notice_files(dataset: Path) -> Files:
    return _parts(dataset / NOTICES)


def generated_files(dataset: Path) -> Files:
    return _parts(dataset / GENERATED)


def measure_files(dataset: Path) -> Files:
    return _parts(dataset / MEASURES)


def document_parts(dataset: Path) -> Iterator[Part]:
    """The parts of all documents, by source and number."""
    if not in_parts(dataset):
        kept = {source: files[0] for source, files in kept_files(dataset).items()}
        yield Part(dataset / "dispositions.parquet", kept, dataset / "tokens/documents.parquet")
        return
    folders = [dataset / "dispositions", dataset / "kept", dataset / "tokens/documents"]
    parts = [_parts(folder) for folder in folders]
    for source in sorted(set().union(*parts)):
        for name in sorted({path.name for files in parts for path in files.get(source, [])}):
            dispositions, kept_table, tokens = (folder / source / name for folder in folders)
            yield Part(dispositions, {source: kept_table}, tokens)


def orders(dataset: Path) -> list[Path]:
    """The folders of the orders of all phases."""
    return sorted(path.parent for path in (dataset / "order").glob("*/meta.json"))


def problems(dataset: Path) -> Iterator[str]:
    """Missing parts, and tables in both layouts, of which a reader would see one."""
    for folder in ("dispositions", "kept", "tokens/documents"):
        parts = _parts(dataset / folder)
        singles = [dataset / f"{folder}.parquet"]
        if folder == "kept":
            singles = [*(dataset / folder).glob("*.parquet")] if parts else []
        yield from (
            f"{single.relative_to(dataset).as_posix()} stands beside parts of the same table"
            for single in singles
            if parts and single.exists()
        )
        for source, files in parts.items():
            if [path.name for path in files] != [part_file(number) for number in range(len(files))]:
                yield f"{folder}/{source} does not have the parts 0 to {len(files) - 1}"


def _files(folder: Path) -> Files:
    """{source: its table, as one file or in parts} of a folder."""
    single_files = {path.stem: [path] for path in folder.glob("*.parquet")}
    return dict(sorted((single_files | _parts(folder)).items()))


def _parts(folder: Path) -> Files:
    """{source: its parts} of a folder with a folder for each source."""
    if not folder.is_dir():
        return {}
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    parts = {path.name: part_tables(path) for path in folders}
    return {source: files for source, files in parts.items() if files}
