"""Estimates the memory of Parquet files from their footers, before reading them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROW_BYTES, VALUE_BYTES = 300, 100
"""Bytes of a row as Python objects, and of each value in it: measured on tables of text and numbers."""
GROWTH = 1000
"""The maximum growth factor of a table. Orders, the densest published tables, grow by 200 to 300."""
SMALL = 32 << 20
"""A table may grow to this size in any case."""


def sizes(folder: Path, paths: Iterable[str]) -> dict[str, Any]:
    """{wrong: sentences, tables: {path: (rows, bytes that reading it takes)}}."""
    import pyarrow.parquet as pq

    problems, tables = [], {}
    for path in paths:
        size = (folder / path).stat().st_size
        try:
            footer = pq.read_metadata(folder / path)
            groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
            columns = [group.column(number) for group in groups for number in range(group.num_columns)]
            values = sum(column.num_values for column in columns)
            unpacked = sum(max(0, column.total_uncompressed_size) for column in columns)
        except MemoryError:
            raise
        except BaseException as error:  # any error of the library for bytes that are not a table
            problems.append(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}")
            continue
        memory = ROW_BYTES * footer.num_rows + VALUE_BYTES * values + 3 * unpacked
        if not 0 <= memory <= SMALL + GROWTH * size or footer.num_rows < 0 or values < 0:
            problems.append(f"{path} says that its {size} bytes hold {footer.num_rows} rows in {unpacked} bytes")
            continue
        tables[path] = footer.num_rows, memory
    return {"wrong": problems, "tables": tables}
