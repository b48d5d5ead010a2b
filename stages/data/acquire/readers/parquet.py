"""Reader `parquet`: Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pipeline.core.errors import AtomError
from stages.data.acquire.readers.base import Failed, Files
from stages.data.acquire.readers.rows import Row, RowReader


class Parquet(RowReader):
    """Parquet files; `path` is a file or a folder of *.parquet."""

    suffixes: ClassVar = (".parquet",)

    reader: Literal["parquet"]
    """selects this reader"""

    def rows(self, files: Files, columns: Sequence[str] | None = None) -> Iterator[Row | Failed]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for relative, path in files:
            number = 0
            try:
                parquet = pq.ParquetFile(path)
                names = self.columns if columns is None else columns
                places = {name: _column_to_read(parquet.schema_arrow, name) for name in names}
                missing = sorted(name for name, place in places.items() if place is None)
                if missing:
                    available = ", ".join(parquet.schema_arrow.names)
                    raise AtomError(
                        f"{path} has no column {missing[0]!r} (columns: {available}); set reader.text_field, id_field, "
                        "license_field, url_field, title_field or author_field"
                    )
                for batch in parquet.iter_batches(batch_size=1000, columns=list(places.values())):
                    for fields in _rows_of(batch):
                        number += 1
                        name = f"{relative}:{number}"
                        yield Failed(name, fields) if isinstance(fields, str) else Row(fields, relative, name)
            except (pa.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())
                message = f"{path} cannot be read after row {number} ({reason}); it is cut short or not Parquet"
                raise AtomError(message) from None


def _column_to_read(schema: Any, path: str) -> str | None:
    """Returns the column that has the field of a path, alone where it is nested in columns without lists.

    None if there is none.
    """
    import pyarrow.types as types

    if path in schema.names:
        return path
    top, *names = path.split(".")
    if top not in schema.names:
        return None
    kind, has_list = schema.field(top).type, False
    for name in names:
        # Arrow reads a nested column by its path, but not through lists: then the top column is read as a whole.
        while types.is_list(kind) or types.is_large_list(kind):
            kind, has_list = kind.value_type, True
        position = kind.get_field_index(name) if types.is_struct(kind) else -1
        if position < 0:
            return None
        kind = kind.field(position).type
    return top if has_list else path


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yields the fields of each row, or the reason why a row has none."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # before the first row: find the row, and keep the others
        for n in range(batch.num_rows):
            try:
                yield from batch.slice(n, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield f"a field is not UTF-8: {error}"
