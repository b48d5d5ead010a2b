"""JSON Lines and Parquet files as documents, with errors that name the file and the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.bounds import spdx
from pipeline.core.errors import AtomError

Document = tuple[str, Any, str, str | None]
"""(name, text or messages, file, the document's own license or None)."""


def read_jsonl(
    files: list[tuple[str, Path]], text_field: str, id_field: str | None, license_field: str | None = None,
    kind: type[Any] = str,
) -> Iterator[Document]:  # fmt: skip
    """Without an id field the name is file and line number. kind: what the text field holds; `list` for the messages
    of a conversation."""
    for relative, path in files:
        for number, line in _read_lines(path):
            location = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise AtomError(f"{location}: not a JSON object ({error}); the file is cut short or corrupt") from None
            if not isinstance(row, dict):
                raise AtomError(f"{location}: a JSON object is expected, not {type(row).__name__}")
            yield _document(row, text_field, id_field, license_field, location, f"{relative}:{number}", relative, kind)


def read_parquet(
    files: list[tuple[str, Path]], text_field: str, id_field: str | None, license_field: str | None = None,
    kind: type[Any] = str,
) -> Iterator[Document]:  # fmt: skip
    """Without an id field the name is file and row number. kind: as for read_jsonl."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [text_field, *(field for field in (id_field, license_field) if field)]
    for relative, path in files:
        number = 0
        try:
            parquet = pq.ParquetFile(path)
            missing = sorted(set(columns) - set(parquet.schema_arrow.names))
            if missing:
                available = ", ".join(parquet.schema_arrow.names)
                raise AtomError(
                    f"{path} has no column {missing[0]!r} (columns: {available}); set reader.text_field, id_field or "
                    "license_field"
                )
            for batch in parquet.iter_batches(batch_size=1000, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    location = f"{path}, row {number}"
                    yield _document(
                        row, text_field, id_field, license_field, location, f"{relative}:{number}", relative, kind
                    )
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            message = f"{path} cannot be read after row {number} ({reason}); it is cut short or not Parquet"
            raise AtomError(message) from None


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AtomError(f"{path} cannot be read at line {number} ({error}); it is not UTF-8, or corrupt") from None
    except (EOFError, OSError, zlib.error) as error:
        raise AtomError(f"{path} cannot be read at line {number + 1} ({error}); it is cut short or corrupt") from None


def _document(
    row: dict[str, Any],
    text_field: str,
    id_field: str | None,
    license_field: str | None,
    location: str,
    name: str,
    relative: str,
    kind: type[Any],
) -> Document:
    text = row.get(text_field)
    if not isinstance(text, kind):
        available = ", ".join(sorted(map(str, row)))
        content, field = ("text", "text_field") if kind is str else ("list of messages", "messages_field")
        raise AtomError(f"{location}: no {content} in field {text_field!r} (fields: {available}); set reader.{field}")
    serialized: str = text if kind is str else json.dumps(text, ensure_ascii=False)
    if any("\ud800" <= c <= "\udfff" for c in serialized):
        raise AtomError(f"{location}: field {text_field!r} holds a lone surrogate, which is not Unicode; fix the line")
    if id_field is not None:
        if row.get(id_field) in (None, ""):
            raise AtomError(
                f"{location}: no id in field {id_field!r}; set reader.id_field to a field that every row has"
            )
        name = str(row[id_field])
    return name, text, relative, _license(row, license_field, location) if license_field else None


def _license(row: dict[str, Any], license_field: str, location: str) -> str:
    """The SPDX expression of a row's licenses; several hold together. Raises AtomError if there is none, or no SPDX."""
    value = row.get(license_field)
    names = value if isinstance(value, list) else [value]
    try:
        return spdx(" AND ".join(f"({name})" if " " in name else name for name in sorted(names, key=str.lower)))
    except (ValueError, TypeError):
        raise AtomError(
            f"{location}: field {license_field!r} holds {value!r}, which is no SPDX license or list of them "
            "(spdx.org/licenses); leave the row out, or fix the field"
        ) from None
