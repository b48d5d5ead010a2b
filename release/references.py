"""Sources that a release publishes by reference.

Of each document, the release has its id, license, origin and the hash of its text. The text itself is left out, because
its license or its size does not allow it.

`references.json` of the dataset repository states how to read the texts again: the settings of the reader, the digest
of every file, and the steps that edit texts. `atom rebuild-data` does it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, field_validator

from pipeline.core.bounds import Line
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.parts import PartCount, part_file
from pipeline.core.stage import Config
from pipeline.core.text import escaped
from release import scratch, untrusted
from release.layout import REFERENCES
from stages.data.acquire import hub_files
from stages.data.acquire.readers.hub import Hub
from stages.data.acquire.readers.packages import Packages
from stages.data.acquire.sources import Source
from stages.data.blocks import Block
from stages.data.curate.filters.base import Filter
from stages.data.curate.filters.own import RepeatedLines
from stages.data.curate.steps import MAX_STEPS, AnyFilter
from stages.formats.table import KEPT, ROWS_PER_GROUP, arrow_schema, read_errors

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

REFERENCE_BYTES = 200_000_000
"""The maximum bytes that are read of references.json: a source has at most 100,000 files."""
PLACES = ("path", "lock", "folder", "extension")
"""Settings of a reader that name files of the machine."""


class Reference(Config):
    """The instructions to read the documents of a source again."""

    source: dict[str, Any]
    """settings of the source, without paths of a machine"""
    seed: int
    """seed of the recipe"""
    parts: PartCount
    """parts of the source, which are those of its tables"""
    lock: str | None = None
    """content of the lock file of the readers `hub` and `packages`; null for others"""
    files: dict[str, str]
    """digest of each file by path, whose tree digest is that of `sources/<source>.json`"""
    steps: tuple[AnyFilter, ...] = Field((), max_length=MAX_STEPS)
    """settings of the steps that edited texts, in order"""

    @classmethod
    def of(cls, source: Source, seed: int, steps: Sequence[AnyFilter]) -> Reference:
        """Describes a source as a release publishes it.

        Raises AtomError if the documents of the source are not in files, or if code of an extension makes them.
        """
        files = source.files()
        if not files:
            raise AtomError(
                f"release.by_reference names {source.name}, whose documents are drawn and in no file; leave it out"
            )
        for maker in (source.reader, *steps):
            how = f"{maker.block} of an extension makes" if isinstance(maker, Block) and maker.extension else ""
            if isinstance(maker, RepeatedLines):
                how = "depend on the documents beside them (step repeated_lines)"
            if how:
                raise AtomError(
                    f"release.by_reference names {source.name}, whose texts {how}; others cannot make them again, so "
                    "leave the source out"
                )
        # The expected size is for `atom plan`, and tells nobody how to read the documents.
        settings = source.model_dump(mode="json", exclude={"expected"})
        settings["reader"] = {name: value for name, value in settings["reader"].items() if name not in PLACES}
        if isinstance(source.reader, Hub):
            settings["reader"]["revision"] = hub_files.read(Path(source.reader.lock))[source.name].revision
        paths = [path for path, _ in files]
        digests = source.reader.digests(source.name, files)
        return cls(
            source=settings,
            seed=seed,
            parts=source.parts,
            lock=_lock_of(source),
            files=dict(zip(paths, digests, strict=True)),
            steps=tuple(map(_portable, steps)),
        )

    @field_validator("steps")
    @classmethod
    def _leave_out_places(cls, steps: tuple[Filter, ...]) -> tuple[Filter, ...]:
        """Leaves folders of this machine out of the steps.

        A release names none of them, since code would be imported from there.
        """
        return tuple(map(_portable, steps))

    @property
    def origin(self) -> str:
        """Where the files come from, for messages: a repository at a revision, or the origin that the source states."""
        reader = self._reader_settings()
        if "repo" in reader:
            return escaped(f"{reader['repo']}@{reader.get('revision')}", 200)
        return escaped(str(self.source.get("origin")), 200)

    def _reader_settings(self) -> dict[str, Any]:
        """Returns the settings of the reader; none if a release states no such settings."""
        settings = self.source.get("reader")
        return settings if isinstance(settings, dict) else {}

    def restored(self, folder: Path | None, temporary: Path) -> Source:
        """Returns the source with its places on this machine.

        Args:
            folder: The folder of its files; None if its reader needs none.
            temporary: A folder that gets its lock file.

        Raises:
            CheckFailed: The settings are malformed.
            AtomError: The source needs a folder.
        """
        name = escaped(str(self.source.get("name")), 80)
        reader = {key: value for key, value in self._reader_settings().items() if key not in PLACES}
        if folder is not None:
            reader["path"] = str(folder.resolve())
        if self.lock is not None:
            # Numbered, since the name of a source comes from the release, and may be no name of a file.
            lock = temporary / f"{len(os.listdir(temporary))}.lock.yaml"
            lock.write_text(self.lock, "utf-8")
            reader["lock"] = str(lock)
        try:
            source = Source.model_validate({**self.source, "reader": reader})
        except ValidationError as error:
            first = error.errors()[0]
            # The path is the setting that was left out on purpose, so its absence has a remedy.
            if first["type"] == "missing" and first["loc"][-1] == "path":
                raise AtomError(
                    f"the files of source {name} ({self.origin}) are not on a Hub; get them, and give their folder: "
                    f"--source {name}=FOLDER"
                ) from None
            reason = escaped(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 200)
            raise CheckFailed(f"{REFERENCES}: source {name} has settings that no source has ({reason})") from None
        return source.model_copy(update={"reader": source.reader.absolute(Path.cwd())})


def _portable(step: Filter) -> Filter:
    """Returns a step without places on this machine."""
    return step.portable() if isinstance(step, Block) else step


def _lock_of(source: Source) -> str | None:
    """Returns the content of a lock file for the source alone; None for a reader without one."""
    reader = source.reader
    if isinstance(reader, Packages):
        return Path(reader.lock).read_text("utf-8")
    if not isinstance(reader, Hub):
        return None
    with scratch.folder() as temporary:
        # The maker's lock may name other sources, which are not published here.
        hub_files.write(temporary / "lock.yaml", {source.name: hub_files.read(Path(reader.lock))[source.name]})
        return (temporary / "lock.yaml").read_text("utf-8")


class References(Config):
    """The content of references.json."""

    sources: dict[str, Reference]
    """sources by reference, by name"""
    generated: dict[str, Line] = Field({})
    """why texts that a model wrote from these sources are published"""


def read(dataset: Path) -> Mapping[str, Reference]:
    """Returns the sources by reference of a dataset folder, by name; none without the file.

    Raises CheckFailed if it is malformed.
    """
    return dict(sorted(_read(dataset).sources.items()))


def published_reasons(dataset: Path) -> Mapping[str, str]:
    """Returns {source that a model wrote from one by reference: why its texts are published}.

    Raises CheckFailed as `read` does.
    """
    return dict(sorted(_read(dataset).generated.items()))


def _read(dataset: Path) -> References:
    """Returns the content of references.json; an empty one without the file."""
    if not (dataset / REFERENCES).exists():
        return References(sources={}, generated={})
    body = untrusted.read_json(dataset / REFERENCES, REFERENCE_BYTES, follow=True)
    try:
        return References.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckFailed(
            f"{REFERENCES}: {escaped('.'.join(map(str, first['loc'])), 200)}: {escaped(first['msg'], 200)}"
        ) from None


def kept_tables(dataset: Path, name: str, parts: int) -> Iterator[tuple[int, Path]]:
    """Yields (number, path) of the tables of the kept documents of a source by reference."""
    for number in range(parts):
        yield number, dataset / "kept" / name / part_file(number)


def write_without_text(source: Path, target: Path) -> None:
    """Writes a table of kept documents without their texts, and with the same row groups.

    Since the row groups are the same, the table with texts can be written again byte for byte. Memory holds one of
    them.
    """
    import pyarrow as pa

    with group_writer(target) as writer:
        for group in row_groups(source):
            column = group.schema.get_field_index("text")
            write_group(writer, group.set_column(column, "text", pa.nulls(len(group), pa.string())))


def row_groups(path: Path) -> Iterator[pa.Table]:
    """Yields the row groups of a table of kept documents. Raises AtomError if it cannot be read."""
    import pyarrow.parquet as pq

    with read_errors(path), pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=list(KEPT))


def group_writer(path: Path) -> pq.ParquetWriter:
    """Returns a writer with the settings of `stages.formats.table.table_writer`, by which `dedup` wrote the table."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    return pq.ParquetWriter(path, arrow_schema(KEPT), compression="zstd")


def write_group(writer: pq.ParquetWriter, rows: pa.Table) -> None:
    writer.write_table(rows.cast(arrow_schema(KEPT)).combine_chunks(), row_group_size=ROWS_PER_GROUP)
