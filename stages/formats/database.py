"""DuckDB for reductions over tables of any size.

Memory is bounded, temporary files are in the work folder, and each error is one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipeline.core.errors import AtomError, MachineError

if TYPE_CHECKING:
    import duckdb


@contextmanager
def connect(work: Path, memory: str = "1GB", threads: int = 1) -> Iterator[duckdb.DuckDBPyConnection]:
    """Opens a context with an empty database, which is removed at the end.

    Data that exceed `memory` are written below `work`.

    The order of rows is that of ORDER BY alone. Errors of DuckDB inside the context become MachineError for a lack of
    space, and otherwise AtomError, in one sentence.
    """
    import duckdb

    work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=work, prefix=".duckdb-", ignore_cleanup_errors=True) as folder:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": memory,
            "temp_directory": folder,
            "threads": threads,
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
        }
        with duckdb.connect(config=settings) as connection:
            try:
                yield connection
            except duckdb.Error as error:
                raise _translated(error, work, memory) from None


def _translated(error: duckdb.Error, work: Path, memory: str) -> AtomError:
    import duckdb

    reason = " ".join(str(error).split())
    if isinstance(error, duckdb.OutOfMemoryException) or "No space left" in reason or "Disk quota" in reason:
        return MachineError(
            f"a reduction needs more than {memory} of memory and than the free space for its temporary files; free "
            f"space at {work} and run again"
        )
    return AtomError(f"a reduction at {work} failed ({reason[:300]}); remove that folder and run again")
