"""The conversations of chat sources as `messages`, which training libraries load unchanged: one row for each kept
document, by source and split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from pipeline.core.parts import part_tables
from release import data_layout, references
from release.assembly.published_tables import TEXT_BATCH, read_json, stream_batches
from stages.data import chat_messages
from stages.data.splits import SPLITS

FOLDER = "messages"
COLUMNS = ["id", "license", "split", "text"]


def chat_sources(dataset: Path) -> dict[str, list[Path]]:
    """{source of conversations: its tables of kept documents}, without those by reference."""
    by_reference = references.read(dataset)
    return {
        name: files
        for name, files in data_layout.kept_files(dataset).items()
        if name not in by_reference and _kind(dataset, name) == "chat"
    }


def _kind(dataset: Path, name: str) -> str | None:
    path = dataset / "sources" / f"{name}.json"
    return str(read_json(path).get("kind")) if path.is_file() else None


def table_of(dataset: Path, source: str, split: str, kept: Path) -> Path:
    """The table of the conversations of a split in a table of kept documents."""
    return dataset / FOLDER / source / split / kept.name


def published(dataset: Path) -> dict[str, list[str]]:
    """{source: splits} of the tables of a dataset folder."""
    folders = sorted((dataset / FOLDER).iterdir()) if (dataset / FOLDER).is_dir() else []
    return {path.name: [split for split in SPLITS if part_tables(path / split)] for path in folders}


def write_messages(dataset: Path) -> Iterator[Path]:
    """Writes the tables, and yields their paths. Raises CheckFailed if a text is no conversation. Memory holds some
    hundred rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = chat_messages.arrow_schema()
    for source, files in chat_sources(dataset).items():
        for kept in files:
            paths = {split: table_of(dataset, source, split, kept) for split in SPLITS}
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
            yield from paths.values()


def message_row(document: dict[str, Any]) -> chat_messages.MessagesRow:
    """The row of a kept document. Raises CheckFailed."""
    try:
        messages, tools = chat_messages.parse(document["text"])
    except (ValueError, KeyError) as error:
        raise CheckFailed(f"document {document['id']}: {error}") from None
    stated = json.dumps(tools, ensure_ascii=False) if tools else None
    return {"id": document["id"], "license": document["license"], "messages": messages, "tools": stated}


def problems(dataset: Path) -> Iterator[str]:
    """How the tables differ from the kept documents."""
    import pyarrow as pa

    schema, sources = chat_messages.arrow_schema(), chat_sources(dataset)
    if set(published(dataset)) != set(sources):
        yield f"{FOLDER} has {', '.join(published(dataset))}, and the sources of conversations are {', '.join(sources)}"
        return
    for source, files in sources.items():
        for kept in files:
            for split in SPLITS:
                path = table_of(dataset, source, split, kept)
                if not path.is_file():
                    yield f"{path.relative_to(dataset).as_posix()} is missing"
                    continue
                rows = _rows_of(stream_batches(path, schema.names, TEXT_BATCH))
                for document in _rows_of(stream_batches(kept, COLUMNS, TEXT_BATCH)):
                    if document["split"] != split:
                        continue
                    (expected,) = pa.Table.from_pylist([message_row(document)], schema=schema).to_pylist()
                    if next(rows, None) != expected:
                        yield f"{path.relative_to(dataset).as_posix()}: {document['id']} has other messages"
                        break
                else:
                    if next(rows, None) is not None:
                        yield f"{path.relative_to(dataset).as_posix()} has more conversations than were kept"


def _rows_of(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()
