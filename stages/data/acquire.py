"""Acquire one source: read files, or generate from a seed, documents with their id, license and origin.

Seals `documents.parquet` and `source.json`. Document ids and order depend only on the source and the seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.core.bounds import Seed
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage
from stages.data import chat
from stages.data.recipe import (
    ChatProblems,
    Courtesies,
    Jsonl,
    Parquet,
    Passkeys,
    Problems,
    Source,
    StdlibDocstrings,
    StdlibSource,
    resolve_tree_digest,
    source_files,
)
from stages.data.seeds import seed_of
from stages.data.synthetic import courtesy_notes, passkeys
from stages.data.synthetic.problems import FORMS, draw, messages
from stages.data.table import DOCUMENTS, content_hash, write_json, write_rows

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
    files = source_files(source)
    rows: dict[str, dict[str, Any]] = {}
    skipped: list[str] = []
    for document in _read_documents(source, config.seed, files):
        if isinstance(document, str):
            skipped.append(document)
            continue
        name, text, location, prompt_chars, license = document
        key = f"{source.name}/{name}"
        if key in rows:
            raise AtomError(
                f"source {source.name}: two documents have the id {key}; choose an id_field of distinct values"
            )
        rows[key] = {
            "id": key,
            "text": text,
            "source": source.name,
            "license": license or source.license,
            "origin": f"{source.origin}#{location}" if location else source.origin,
            "content_hash": content_hash(text),
            "prompt_chars": prompt_chars,
        }
    for path in skipped:
        report.note(f"source {source.name}: {path} cannot be read and was skipped")
    selected = _subsample(rows, getattr(source.reader, "limit", None), source.name, config.seed)
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


def _read_documents(
    source: Source, seed: int, files: list[tuple[str, Path]]
) -> Iterator[tuple[str, str, str, int, str | None] | str]:
    """(name, text, location in the origin, prompt_chars, the document's own license or None), or the name of an
    unreadable file or conversation."""
    from stages.data.readers import python_stdlib, tables

    reader = source.reader
    documents: Iterator[tuple[str, str, str] | str]
    if isinstance(reader, Problems):
        rng = random.Random(seed_of(f"problems/{source.name}", seed))
        for i, problem in enumerate(draw(reader.tasks, reader.count, rng)):
            text, prompt_chars = FORMS[reader.form](problem)
            yield f"{problem.task}/{i:07d}", text, problem.task, prompt_chars, None
        return
    if isinstance(reader, ChatProblems):
        rng = random.Random(seed_of(f"problems/{source.name}", seed))
        for i, problem in enumerate(draw(reader.tasks, reader.count, rng)):
            ((text, prompt_chars),) = chat.turns(messages(problem, rng.random() < reader.thinking))
            yield f"{problem.task}/{i:07d}", text, problem.task, prompt_chars, None
        return
    if isinstance(reader, Courtesies):
        rng = random.Random(seed_of(f"courtesies/{source.name}", seed))
        for i in range(reader.count):
            request = courtesy_notes.draw_request(rng)
            ((text, prompt_chars),) = chat.turns(courtesy_notes.messages(request, rng))
            yield f"{request.act.name}/{i:07d}", text, request.act.name, prompt_chars, None
        return
    if isinstance(reader, (Jsonl, Parquet)):
        read_table = tables.read_jsonl if isinstance(reader, Jsonl) else tables.read_parquet
        field, kind = (reader.messages_field, list) if reader.messages_field else (reader.text_field, str)
        for name, text, location, license in read_table(files, field, reader.id_field, reader.license_field, kind):
            if kind is str:
                yield name, text, location, 0, license
                continue
            try:
                for number, (turn, prompt_chars) in enumerate(chat.turns(text)):
                    yield f"{name}#{number}", turn, location, prompt_chars, license
            except ValueError as error:
                yield f"{name} ({error})"
        return
    if isinstance(reader, Passkeys):
        texts = []
        for docstring in python_stdlib.read_docstrings(files):
            if isinstance(docstring, str):
                yield docstring
            else:
                texts.append(docstring[1:])
        rng = random.Random(seed_of(f"passkeys/{source.name}", seed))
        chars, texts = (reader.min_chars, reader.max_chars), passkeys.fillers(texts)
        for i, (text, prompt_chars, location) in enumerate(
            passkeys.draw(texts, reader.count, chars, reader.digits, rng)
        ):
            yield f"{i:07d}", text, location, prompt_chars, None
        return
    if isinstance(reader, StdlibDocstrings):
        documents = python_stdlib.read_docstrings(files)
    else:
        assert isinstance(reader, StdlibSource)
        documents = python_stdlib.read_modules(files) if reader.unit == "file" else python_stdlib.read_functions(files)
    for row in documents:
        yield row if isinstance(row, str) else (*row, 0, None)


def _subsample(rows: dict[str, dict[str, Any]], limit: int | None, name: str, seed: int) -> list[dict[str, Any]]:
    """The first `limit` documents by a seeded hash of their id, in their original order."""
    if limit is None or len(rows) <= limit:
        return list(rows.values())
    salt = f"{seed_of(f'limit/{name}', seed)}/"
    by_hash = sorted(rows, key=lambda key: hashlib.sha256((salt + key).encode()).digest())
    selected = set(by_hash[:limit])
    return [row for key, row in rows.items() if key in selected]


def estimate(config: AcquireConfig) -> Estimate:
    """Seconds of the sources that come with Python or from a seed; files may be of any size."""
    return Estimate(cpu_seconds=None if isinstance(config.source.reader, (Jsonl, Parquet)) else 5.0)


STAGE = Stage("acquire", VERSION, AcquireConfig, run, estimate=estimate)
