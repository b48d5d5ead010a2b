"""The conversations of chat sources as `messages`, which training libraries load unchanged.

The tables have one row for each kept document, by source and split.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from pipeline.core.parts import part_tables
from release import layout, references
from release.facts.published_tables import TEXT_BATCH, read_json, stream_batches
from release.layout import over_parts
from stages.formats import chat
from stages.formats.table import SPLITS

FOLDER = "messages"
COLUMNS = ["id", "license", "split", "text"]


def chat_sources(dataset: Path) -> dict[str, list[Path]]:
    """Returns {source of conversations: its tables of kept documents}, without those by reference."""
    by_reference = references.read(dataset)
    return {
        name: files
        for name, files in layout.kept_files(dataset).items()
        if name not in by_reference and _kind(dataset, name) == "chat"
    }


def _kind(dataset: Path, name: str) -> str | None:
    path = dataset / "sources" / f"{name}.json"
    return str(read_json(path).get("kind")) if path.is_file() else None


def table_of(dataset: Path, source: str, split: str, kept: Path) -> Path:
    """Returns the table of the conversations of a split in a table of kept documents."""
    return dataset / FOLDER / source / split / kept.name


def published(dataset: Path) -> dict[str, list[str]]:
    """Returns {source: splits} of the tables of a dataset folder."""
    folders = sorted((dataset / FOLDER).iterdir()) if (dataset / FOLDER).is_dir() else []
    return {path.name: [split for split in SPLITS if part_tables(path / split)] for path in folders}


def write_messages(dataset: Path) -> Iterator[Path]:
    """Writes the tables, and yields their paths.

    Raises CheckFailed if a text is no conversation. Memory holds some hundred rows of a part for each core.
    """
    for source, files in chat_sources(dataset).items():
        for paths in over_parts(partial(_write_part, dataset, source), files, files):
            yield from paths


def _write_part(dataset: Path, source: str, kept: Path) -> list[Path]:
    """Writes the tables of the conversations in a table of kept documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = chat.arrow_schema()
    paths = {split: table_of(dataset, source, split, kept) for split in SPLITS}
    # The writers of all splits are open at once, so the kept documents are read once.
    with ExitStack() as stack:
        writers = {}
        for split, path in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            writers[split] = stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd"))
        for batch in stream_batches(kept, COLUMNS, TEXT_BATCH):
            rows = batch.to_pylist()
            for split, writer in writers.items():
                of_split = [message_row(row) for row in rows if row["split"] == split]
                writer.write_table(pa.Table.from_pylist(of_split, schema=schema))
    return list(paths.values())


def message_row(document: dict[str, Any]) -> chat.MessagesRow:
    """Returns the row of a kept document. Raises CheckFailed."""
    try:
        messages, tools = chat.parse(document["text"])
    except (ValueError, KeyError) as error:
        raise CheckFailed(f"document {document['id']}: {error}") from None
    stated = json.dumps(tools, ensure_ascii=False) if tools else None
    return {"id": document["id"], "license": document["license"], "messages": messages, "tools": stated}


def problems(dataset: Path) -> Iterator[str]:
    """Yields the differences between the tables and the kept documents."""
    sources = chat_sources(dataset)
    if set(published(dataset)) != set(sources):
        yield f"{FOLDER} has {', '.join(published(dataset))}, and the sources of conversations are {', '.join(sources)}"
        return
    for source, files in sources.items():
        for texts in over_parts(partial(_part_problems, dataset, source), files, files):
            yield from texts


def _part_problems(dataset: Path, source: str, kept: Path) -> list[str]:
    """Lists the problems of the tables made from one part of a source, at most one for each table."""
    return [text for split in SPLITS if (text := _table_problem(dataset, source, split, kept))]


def _table_problem(dataset: Path, source: str, split: str, kept: Path) -> str:
    import pyarrow as pa

    # In the order of the kept documents, so both tables are streamed once.
    schema, path = chat.arrow_schema(), table_of(dataset, source, split, kept)
    name = path.relative_to(dataset).as_posix()
    if not path.is_file():
        return f"{name} is missing"
    rows = _rows_of(stream_batches(path, schema.names, TEXT_BATCH))
    for document in _rows_of(stream_batches(kept, COLUMNS, TEXT_BATCH)):
        if document["split"] != split:
            continue
        (expected,) = pa.Table.from_pylist([message_row(document)], schema=schema).to_pylist()
        if next(rows, None) != expected:
            return f"{name}: {document['id']} has other messages"
    return "" if next(rows, None) is None else f"{name} has more conversations than were kept"


def _rows_of(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()
