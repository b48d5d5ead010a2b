"""Acquire one source: read files, or generate from a seed, documents with their id, license and origin.

Seals `documents.parquet` and `source.json`. Document ids and order depend only on the source and the seed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field

from pipeline.core.bounds import Seed
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage
from stages.data.readers.base import FileReader, SampledReader, Unreadable
from stages.data.seeds import seed_of
from stages.data.sources import Source, resolve_tree_digest
from stages.data.table import DOCUMENTS, DocumentRow, content_hash, write_json, write_rows

VERSION = 1


class AcquireConfig(Config):
    """One source with its tree digest resolved, and the recipe's seed."""

    source: Source = Field(description="settings of the source, with its tree digest resolved")
    seed: Seed = Field(description="seed of the recipe")


def run(config: AcquireConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Read one source into `documents.parquet`; `source.json` declares license, evidence, tree digest and counts.

    Raises AtomError if a file is corrupt, if the tree digest differs from the config's, or if two documents have the
    same id.
    """
    source = config.source
    if resolve_tree_digest(source) != source.tree_digest:
        raise AtomError(f"source {source.name}: tree_digest is not resolved; run through the recipe's resolved() form")
    files = source.reader.files(source.name)
    rows: dict[str, DocumentRow] = {}
    skipped: list[str] = []
    for document in source.reader.documents(source.name, config.seed, files):
        if isinstance(document, Unreadable):
            skipped.append(document.name)
            continue
        id = f"{source.name}/{document.name}"
        if id in rows:
            raise AtomError(
                f"source {source.name}: two documents have the id {id}; choose an id_field of distinct values"
            )
        rows[id] = {
            "id": id,
            "text": document.text,
            "source": source.name,
            "license": document.license or source.license,
            "origin": f"{source.origin}#{document.location}" if document.location else source.origin,
            "content_hash": content_hash(document.text),
            "prompt_chars": document.prompt_chars,
        }
    for name in skipped:
        report.note(f"source {source.name}: {name} cannot be read and was skipped")
    limit = source.reader.limit if isinstance(source.reader, SampledReader) else None
    selected = _subsample(rows, limit, source.name, config.seed)
    if not selected:
        raise AtomError(f"source {source.name} gave no documents; check its reader")
    write_rows(out / "documents.parquet", DOCUMENTS, selected)
    declaration = source.model_dump(include={"name", "kind", "license", "license_evidence", "origin", "tree_digest"})
    size = sum(len(row["text"].encode()) for row in selected)
    counts = {
        "documents": len(selected),
        "documents_found": len(rows),
        "bytes": size,
        "files": len(files),
        "files_skipped": skipped,
    }
    write_json(out / "source.json", {**declaration, "reader": source.reader.reader, **counts})
    report.note(
        f"source {source.name}: {len(selected)} of {len(rows)} documents, {size / 1e6:.2f} MB, {source.license}"
    )


def _subsample(rows: dict[str, DocumentRow], limit: int | None, name: str, seed: int) -> list[DocumentRow]:
    """The first `limit` documents by a seeded hash of their id, in their original order."""
    if limit is None or len(rows) <= limit:
        return list(rows.values())
    salt = f"{seed_of(f'limit/{name}', seed)}/"
    by_hash = sorted(rows, key=lambda id: hashlib.sha256((salt + id).encode()).digest())
    selected = set(by_hash[:limit])
    return [row for id, row in rows.items() if id in selected]


def estimate(config: AcquireConfig) -> Estimate:
    """Seconds for a source from Python's library or from a seed; no estimate for files, which may have any size."""
    return Estimate(cpu_seconds=None if isinstance(config.source.reader, FileReader) else 5.0)


STAGE = Stage("acquire", VERSION, AcquireConfig, run, estimate=estimate)
