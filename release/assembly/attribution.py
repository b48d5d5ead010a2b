"""The attribution tables of the dataset.

They list the kept documents whose licenses ask to name authors or to keep notices, and the notices of the packages that
these documents are from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import AtomError
from pipeline.core.parts import part_number
from release import data_layout
from release.data_layout import ATTRIBUTION
from stages.data.acquire.licenses.allow import asks_for_attribution
from stages.data.curate.secret_patterns import find_secret
from stages.formats.table import CREDITS, NOTICES, row_writer, stream_batches, stream_rows, table_writer

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = {name: "string" for name in ("id", "source", "license", "title", "author", "origin")}


def write_attribution(dataset: Path, acquired: Mapping[str, Path]) -> Iterator[Path]:
    """Writes the tables for each part of a source with such documents, and yields their paths.

    acquired: the artifact of acquire of each source. Raises AtomError if its credits are not those of the documents.
    Memory holds some thousand rows, the names of a part's packages, and the digests of all notices.
    """
    written = set[str]()
    for source, files in data_layout.kept_files(dataset).items():
        # A source without such licenses has no table at all.
        if not any(_asking(batch) for path in files for batch in stream_batches(path, ["license"])):
            continue
        for path in files:
            table, packages = dataset / ATTRIBUTION / path.relative_to(dataset / "kept"), set[str]()
            with table_writer(table, COLUMNS) as write:
                for rows in _attributed(path, _stream(acquired.get(source), "credits", path, CREDITS)):
                    packages.update(id.partition("/")[2].partition("/")[0] for id in rows["id"].to_pylist())
                    write(rows)
            yield table
            if (notices := _stream(acquired.get(source), "notices", path, NOTICES)) is not None:
                table = dataset / data_layout.NOTICES / source / path.name
                with row_writer(table, NOTICES) as write_row:
                    for row in notices:
                        if row["package"] in packages:
                            # Thousands of packages share a few texts of licenses: each is written once.
                            write_row({**row, "text": "" if row["sha256"] in written else row["text"]})
                            written.add(row["sha256"])
                yield table


def _asking(batch: pa.RecordBatch) -> list[str]:
    """Returns the licenses of documents that ask for attribution."""
    return [license for license in batch["license"].unique().to_pylist() if asks_for_attribution(license)]


def _attributed(path: Path, credits: Iterator[Any] | None) -> Iterator[pa.Table]:
    """Yields the rows of a table of kept documents. credits: of the documents of the part, in their order."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for batch in stream_batches(path, ["id", "source", "license", "origin"]):
        asking = pa.array(_asking(batch), batch["license"].type)
        rows = pa.Table.from_batches([batch.filter(pc.is_in(batch["license"], value_set=asking))])
        stated = [_credit(credits, id, path) if credits else {} for id in rows["id"].to_pylist()]
        for name in ("title", "author"):
            values = [None if find_secret(credit.get(name)) else credit.get(name) for credit in stated]
            rows = rows.append_column(name, pa.array(values, pa.string()))
        yield rows


def _stream(acquired: Path | None, name: str, path: Path, columns: Mapping[str, str]) -> Iterator[Any] | None:
    """Returns the rows of a table of acquire that belong to one part of a table of kept documents.

    None if the source has no such table.
    """
    if acquired is None or part_number(path) is None:
        return None
    table = acquired / name / path.name
    return stream_rows(table, list(columns)) if table.exists() else None


def _credit(credits: Iterator[Any], id: str, path: Path) -> Any:
    credit = next((row for row in credits if row["id"] == id), None)
    if credit is None:
        raise AtomError(f"no credits of document {id} are among those of {path.name}; run acquire of its source again")
    return credit
