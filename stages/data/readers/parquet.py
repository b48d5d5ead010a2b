"""Reader `parquet`: Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from pipeline.core.errors import AtomError
from stages.data.readers.base import Files
from stages.data.readers.rows import Row, RowReader


class Parquet(RowReader):
    """Parquet files; `path` is a file or a folder of *.parquet."""

    suffixes: ClassVar = (".parquet",)

    reader: Literal["parquet"] = Field(description="selects this reader")

    def rows(self, files: Files) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        content_field = self.messages_field or self.text_field
        columns = [content_field, *(field for field in (self.id_field, self.license_field) if field)]
        for relative, path in files:
            number = 0
            try:
                parquet = pq.ParquetFile(path)
                missing = sorted(set(columns) - set(parquet.schema_arrow.names))
                if missing:
                    available = ", ".join(parquet.schema_arrow.names)
                    raise AtomError(
                        f"{path} has no column {missing[0]!r} (columns: {available}); set reader.text_field, id_field "
                        "or license_field"
                    )
                for batch in parquet.iter_batches(batch_size=1000, columns=columns):
                    for fields in batch.to_pylist():
                        number += 1
                        yield Row(fields, f"{path}, row {number}", relative, f"{relative}:{number}")
            except (pa.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())
                message = f"{path} cannot be read after row {number} ({reason}); it is cut short or not Parquet"
                raise AtomError(message) from None


READER = Parquet
