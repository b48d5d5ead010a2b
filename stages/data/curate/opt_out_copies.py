"""Copies, near duplicates and rewrites of the documents that filtering removed on request.

Removed with the denied documents, over all sources and before any split is drawn:

- every exact copy of one of their texts;
- every document that shares a band of MinHash with such a text. That is one step: what is near a near duplicate stays,
  or one request could empty a whole component of boilerplate;
- every document that states, in its source, that it was made from one of these or of the denied documents. It then
  counts as a denied one itself, so its copies and near duplicates go too.

A rewrite whose source does not state what it was made from is found only where it is still near the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.parts import part_file
from stages.data.curate.denied import DENIED, PARENTS
from stages.data.curate.deny_list import match_text
from stages.data.curate.duplicate_groups import MOST_ADDRESS, STARS, create_view
from stages.data.curate.minhash import Ints
from stages.data.curate.settings import ROW_BITS, SourcePart
from stages.formats.database import connect
from stages.formats.table import read_table, row_count, stream_batches

if TYPE_CHECKING:
    import duckdb

TABLE = "opt_out.parquet"
# The columns of a document that is removed on request. `bands` is the number of bands of MinHash that it shares with
# the other text; null for a document that was found in another way.
REMOVED = ("address", "duplicate_of", "requests", "found", "bands")
# All requests of a group.
_JOINED = "array_to_string(list_sort(list_distinct(flatten(list(string_split(requests, ' '))))), ' ')"


class DeniedPart(SourcePart):
    """The denied texts of a part; `number` counts the parts of all sources."""

    @property
    def first(self) -> int:
        # Above the addresses of all documents, so that a comparison tells a denied text from a document.
        return MOST_ADDRESS + (self.number << ROW_BITS)

    def file(self, folder: Path) -> Path:
        return folder.parent / DENIED / self.source / part_file(self.part)


def denied_parts(filtered: Path, parts: Sequence[SourcePart]) -> list[DeniedPart]:
    """Returns the denied texts of each part; none for a recipe without a deny-list."""
    if not (filtered / DENIED).is_dir():
        return []
    return [DeniedPart(number, part.source, part.part) for number, part in enumerate(parts)]


def write_opt_outs(
    folder: Path, work: Path, filtered: Path, parts: Sequence[SourcePart], exact: Sequence[Path], near: Sequence[Path]
) -> int:
    """Writes the documents that requests reach beside the denied ones (REMOVED), by address; returns their number.

    `exact` and `near` are the folders of the stars of all partitions. Memory holds one batch; the reduction spills to
    disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with connect(work) as database:
        _Search(database, filtered, parts, exact, near).run()
        query = f"SELECT {', '.join(REMOVED)} FROM removed ORDER BY address"
        path = str(folder / TABLE).replace("'", "''")  # a parameter cannot stand in COPY
        database.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, ROW_GROUP_SIZE 122880)")
    return row_count(folder / TABLE)


@dataclass(frozen=True)
class _Search:
    """The search in a database: `roots` holds the texts whose copies are to be found in this round."""

    database: duckdb.DuckDBPyConnection
    filtered: Path
    parts: Sequence[SourcePart]
    exact: Sequence[Path]
    near: Sequence[Path]

    def run(self) -> None:
        run, denied = self.database.execute, denied_parts(self.filtered, self.parts)
        run("CREATE TABLE removed (address BIGINT, duplicate_of TEXT, requests TEXT, found TEXT, bands BIGINT)")
        kept = self.filtered / "kept"
        create_view(self.database, "documents", [(part.file(kept), part.first) for part in self.parts])
        create_view(self.database, "denied", [(part.file(kept), part.first) for part in denied])
        stated = [(part.file(self.filtered / PARENTS), part.first) for part in self.parts]
        if stated := [(file, first) for file, first in stated if file.exists()]:
            create_view(self.database, "stated", stated)
            run('CREATE TABLE parents AS SELECT begin + "row" AS address, parent FROM stated')
        else:
            run("CREATE TABLE parents (address BIGINT, parent VARCHAR)")
        self._create_groups()
        run("CREATE TABLE roots AS SELECT address, id, requests FROM denied")
        while run("SELECT count(*) FROM roots").fetchall()[0][0]:
            run("CREATE OR REPLACE TABLE reached AS SELECT * FROM roots")
            # Exact copies first: a copy is recorded as one, even if it shares bands as well.
            self._add_members("exact", "copy")
            run(
                "CREATE OR REPLACE TABLE reached AS SELECT * FROM roots "
                "UNION ALL SELECT address, duplicate_of, requests FROM removed WHERE found = 'copy'"
            )
            self._add_members("near", "near_duplicate", "count(DISTINCT band)")
            run("CREATE OR REPLACE TABLE reached AS SELECT address, duplicate_of AS id, requests FROM removed")
            self._add_members("exact", "near_duplicate")
            # Documents made from the ones that were reached begin the next round.
            self._next_roots()

    def _create_groups(self) -> None:
        """Creates the tables `exact` and `near` of the members of groups with equal texts, or with an equal band.

        A group is named by `band`, its partition of the hashes, and by `first`, the address of its first member.
        """
        for name, folders in (("exact", self.exact), ("near", self.near)):
            files = [str(folder / STARS) for folder in folders]
            if not files:
                self.database.execute(f"CREATE TABLE {name} (band VARCHAR, first BIGINT, address BIGINT)")
                continue
            # The folder of a file of stars has the name of its partition.
            band = "parse_filename(parse_dirpath(filename))"
            stars = f"SELECT {band} AS band, first, address FROM read_parquet({files!r}, filename = true)"
            # The first of a star is a member as well, and has no row of its own.
            members = (
                f"{stars} UNION SELECT DISTINCT {band}, first, first FROM read_parquet({files!r}, filename = true)"
            )
            self.database.execute(f"CREATE TABLE {name} AS {members}")

    def _add_members(self, groups: str, kind: str, bands: str = "NULL") -> None:
        """Adds the documents whose text equals that of a reached one, or that share a band with one."""
        self.database.execute(f"""
            INSERT INTO removed SELECT address, min(id), {_JOINED}, '{kind}', {bands} FROM (
                SELECT other.address, reached.id, reached.requests, other.band FROM reached
                JOIN {groups} AS member ON member.address = reached.address
                JOIN {groups} AS other ON other.first = member.first AND other.band = member.band
            )
            WHERE address < {MOST_ADDRESS} AND address NOT IN (SELECT address FROM roots)
            AND address NOT IN (SELECT address FROM removed)
            GROUP BY address""")

    def _next_roots(self) -> None:
        """Makes the documents roots that state a parent which was reached, and records them as removed."""
        run = self.database.execute
        if not run("SELECT count(*) FROM parents").fetchall()[0][0]:
            run("DELETE FROM roots")
            return
        # A parent may be named by its id, by its URL if it is denied, or by the document that it is a part of.
        run("""
            CREATE OR REPLACE TABLE known AS
            WITH named AS (
                SELECT id, requests FROM denied
                UNION SELECT documents.id, requests FROM documents JOIN removed USING (address)
            )
            SELECT id, requests FROM named UNION SELECT url, requests FROM denied
            UNION SELECT regexp_replace(id, '#[^#]*$', ''), requests FROM named""")
        run(f"""
            CREATE OR REPLACE TABLE children AS
            SELECT address, min(parent) AS parent, {_JOINED} AS requests FROM parents
            JOIN known ON known.id = parents.parent WHERE address NOT IN (SELECT address FROM removed)
            GROUP BY address""")
        run("INSERT INTO removed SELECT address, parent, requests, 'derived', NULL FROM children")
        # The ids of the new roots are recorded with the copies that the next round finds.
        run(
            "CREATE OR REPLACE TABLE roots AS "
            "SELECT address, documents.id, requests FROM documents JOIN children USING (address)"
        )


class OptOuts:
    """The documents that requests reach, as `write_opt_outs` wrote them; none without a deny-list."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / TABLE
        self.exists = self.file.exists()

    @cached_property
    def addresses(self) -> Ints:
        """Their addresses, ascending: 8 bytes a document."""
        batches = stream_batches(self.file, ["address"]) if self.exists else ()
        columns = [batch.column(0).to_numpy() for batch in batches]
        return np.concatenate([np.empty(0, np.int64), *columns])

    def of(self, part: SourcePart) -> dict[int, tuple[str, str, float, float]]:
        """Returns {row: the columns duplicate_of, match, value, threshold of its disposition} of a part."""
        if not self.exists:
            return {}
        filters = [("address", ">=", part.first), ("address", "<", part.end)]
        rows = read_table(self.file, list(REMOVED), filters).to_pylist()
        return {row["address"] - part.first: _decision(row) for row in rows}


def _decision(row: dict[str, Any]) -> tuple[str, str, float, float]:
    """Returns the columns of a disposition: duplicate_of, match, value and threshold.

    The value is the number of bands that a near duplicate shares with the other text, of which one suffices; 1 for
    others.
    """
    value = 1.0 if row["bands"] is None else float(row["bands"])
    return row["duplicate_of"], match_text(row["found"], row["requests"]), value, 1.0
