"""Duplicates over all sources: groups of documents with equal hashes, found by partition, and what is removed.

The address of a document is 64 bits: its source, part and row, so that addresses are in the order of the sources, parts
and rows. A group is a star: each document of it with the first one. Memory does not grow with the corpus, nor with the
documents that share one hash, but for 16 bytes for each document that shares a band with another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.data.curate.minhash import Ints, components
from stages.data.curate.settings import PART_BITS, ROW_BITS, Partition, SourcePart
from stages.formats.database import connect
from stages.formats.table import row_count

if TYPE_CHECKING:
    import duckdb

# Above the addresses of the documents of 1,000 sources; denied texts have higher ones (`opt_out`).
MOST_ADDRESS = 1000 << (PART_BITS + ROW_BITS)
# Rows that are read, joined or written at a time.
BATCH = 2**17
STARS = "stars.parquet"
_EXACT_STARS = """
    SELECT address, first FROM partition
    JOIN (SELECT key, high, low, min(address) AS first FROM partition GROUP BY key, high, low HAVING count(*) > 1)
    USING (key, high, low) WHERE address != first
"""
# Of documents with equal texts only the first stands for them in a band, or a page that occurs a million times would
# give a million edges.
_BAND_STARS = """
    WITH texts AS MATERIALIZED (SELECT key, min(address) AS address FROM partition GROUP BY key, high, low)
    SELECT address, first FROM texts
    JOIN (SELECT key, min(address) AS first FROM texts GROUP BY key HAVING count(*) > 1)
    USING (key) WHERE address != first
"""
_FILES = ("address", "first", "firsts")


def write_stars(
    database: duckdb.DuckDBPyConnection, folder: Path, hashes: Path, parts: Sequence[SourcePart], partition: Partition
) -> int:
    """Writes the stars of the documents that share a hash, of one partition; returns the number of their rows.

    Of a band, documents with equal texts are one document: the first.

    Args:
        database: Groups the rows; what exceeds its memory is on disk.
        folder: The folder to write to.
        hashes: The folder of the hashes of each part.
        parts: The parts that are searched.
        partition: The column of hashes, and the range of its values.
    """
    for part in parts:
        row_count(part.file(hashes))  # names a damaged file, which DuckDB would not
    smallest, largest = partition.bounds()
    # The optimizer would put the larger table on the right side, which is held in memory.
    database.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
    create_view(database, "hashes", [(part.file(hashes), part.first) for part in parts])
    database.execute(f"""
        CREATE OR REPLACE VIEW partition AS
        SELECT {partition.column} AS key, hash_high AS high, hash_low AS low, address FROM hashes
        WHERE {partition.column} BETWEEN {smallest}::UBIGINT AND {largest}::UBIGINT""")
    stars = database.sql(_EXACT_STARS if partition.column == "hash_high" else _BAND_STARS)
    stars.write_parquet(str(folder / STARS), compression="zstd")
    return row_count(folder / STARS)


def create_view(database: duckdb.DuckDBPyConnection, name: str, tables: Sequence[tuple[Path, int]]) -> None:
    """Creates a view of the rows of tables, each (file, address of its first row), with the column `address`."""
    files, begins = [str(file) for file, _ in tables], [first for _, first in tables]
    database.register(f"{name}_files", pa.table({"filename": files, "begin": begins}))
    # Parts of sources that are not searched for near duplicates have no bands.
    rows = database.from_parquet(files, file_row_number=True, filename=True, union_by_name=True)
    rows.create_view(f"{name}_rows")
    database.execute(f"""
        CREATE OR REPLACE VIEW {name} AS
        SELECT *, begin + file_row_number AS address FROM {name}_rows JOIN {name}_files USING (filename)""")


class Removed:
    """Removed documents and the one that each duplicates, in flat files that any process maps.

    Attributes:
        address: The addresses of the removed documents, ascending.
        first: The address of the other document of each.
        firsts: The values of `first` without repetitions, ascending.
    """

    def __init__(self, folder: Path) -> None:
        self.address, self.first, self.firsts = (mapped(folder / f"{name}.i64") for name in _FILES)

    def of(self, part: SourcePart) -> tuple[Ints, Ints]:
        """Returns the removed rows of a part, and the address of the document that each duplicates."""
        start, stop = np.searchsorted(self.address, [part.first, part.end])
        return self.address[start:stop] - part.first, np.array(self.first[start:stop])

    def firsts_of(self, part: SourcePart) -> Ints:
        """Returns the rows of a part that removed documents duplicate."""
        start, stop = np.searchsorted(self.firsts, [part.first, part.end])
        return self.firsts[start:stop] - part.first


def removed_folder(folder: Path, kind: str) -> Path:
    """Returns the folder of the files of `Removed`, in the folder of an artifact or a part.

    `kind` is a kind of duplicates, such as `exact` or `near`.
    """
    return folder / "removed" / kind


def write_exact(folder: Path, work: Path, stars: Sequence[Path]) -> int:
    """Writes the exact duplicates (`Removed`) from the stars of all partitions; returns their number."""
    stars_of_documents = (
        f"FROM stars WHERE address < {MOST_ADDRESS}"  # above it are denied texts, which are no documents
    )
    queries = (
        f"address {stars_of_documents} ORDER BY address",
        f"first {stars_of_documents} ORDER BY address",
        f"DISTINCT first {stars_of_documents} ORDER BY first",
    )
    with connect(work) as database:
        _open_stars(database, stars)
        # `firsts` has at most as many values as the other two, which have one for each removed document.
        return max(
            write_array(folder / f"{name}.i64", _integers(database, query))
            for name, query in zip(_FILES, queries, strict=True)
        )


def write_near(
    folder: Path, work: Path, stars: Sequence[Path], exact: Removed, searched: Sequence[int], opted_out: Ints
) -> int:
    """Writes the near duplicates (`Removed`) from the stars of all bands and partitions; returns their number.

    Documents that share a band are joined transitively, as in datatrove; the first of each component is kept. Exact
    duplicates take no part: the stars have left out those of searched sources, and here those go whose first document
    is in another source. Nor do documents that are removed on request.

    Args:
        folder: The folder to write to.
        work: The folder of temporary files.
        stars: The folders of the stars.
        exact: The exact duplicates.
        searched: The numbers of the sources that are searched for near duplicates.
        opted_out: The addresses of documents that are removed on request, ascending.
    """
    # A document that is removed by another rule must not be the representative of a group.
    gone = np.union1d(opted_out, np.concatenate([np.empty(0, np.int64), *_exact_copies(exact, searched)]))
    with connect(work) as database:
        _open_stars(database, stars)
        query = "address FROM stars UNION SELECT DISTINCT first FROM stars ORDER BY address"
        nodes = np.concatenate([np.empty(0, np.int64), *_integers(database, query)])
    parent = components(nodes, (edges for path in stars for edges in _edges(path, gone)))
    removed = np.flatnonzero(parent != np.arange(len(nodes)))
    first = parent[removed]
    for name, places in (("address", removed), ("first", first), ("firsts", np.unique(first))):
        write_array(folder / f"{name}.i64", [nodes[places]])
    return len(removed)


def _exact_copies(exact: Removed, searched: Sequence[int]) -> Iterator[Ints]:
    """Yields the exact duplicates in searched sources of documents in other sources, ascending."""
    for start in range(0, len(exact.address), BATCH):
        address, first = exact.address[start : start + BATCH], exact.first[start : start + BATCH]
        is_searched, first_is_searched = (
            np.isin(each >> (PART_BITS + ROW_BITS), searched) for each in (address, first)
        )
        yield address[is_searched & ~first_is_searched]


def _edges(stars: Path, gone: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yields the edges of stars without the documents that are gone.

    If the first of a star is gone, the next one takes its place. The addresses in `gone` ascend.
    """
    # Kept through the file, since a star may go on in the next batch.
    substitutes: dict[int, int] = {}
    with pq.ParquetFile(stars / STARS) as file:
        for batch in file.iter_batches(batch_size=BATCH):
            address, first = batch.column("address").to_numpy(), batch.column("first").to_numpy()
            left = (address < MOST_ADDRESS) & ~_contains(gone, address)
            address, first = address[left], first[left]
            for place in np.flatnonzero(_contains(gone, first)).tolist():
                # The first document of a star is gone, so the next one becomes its center.
                first[place] = substitutes.setdefault(int(first[place]), int(address[place]))
            yield address, first


def _contains(values: Ints, sought: Ints) -> NDArray[np.bool_]:
    """Returns True for each of the sought that is among ascending values."""
    if not len(values):
        return np.zeros(len(sought), np.bool_)
    return np.equal(values[np.minimum(np.searchsorted(values, sought), len(values) - 1)], sought)


def _open_stars(database: duckdb.DuckDBPyConnection, stars: Sequence[Path]) -> None:
    if stars:
        database.from_parquet([str(path / STARS) for path in stars]).create_view("stars")
    else:
        # A view needs at least one file.
        database.execute("CREATE TABLE stars (address BIGINT, first BIGINT)")


def _integers(database: duckdb.DuckDBPyConnection, query: str) -> Iterator[Ints]:
    for batch in database.sql(f"SELECT {query}").to_arrow_reader(BATCH):
        yield batch.column(0).to_numpy()


def write_array(path: Path, pieces: Iterable[Ints]) -> int:
    """Writes 64-bit integers one after the other; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for piece in pieces:
            # A fixed byte order, since another machine may map the file.
            piece.astype("<i8", copy=False).tofile(file)
        return file.tell() // 8


def mapped(path: Path) -> Ints:
    """Returns the integers of a file, read where they are used."""
    # numpy cannot map an empty file.
    return np.memmap(path, "<i8", "r") if path.stat().st_size else np.empty(0, np.int64)
