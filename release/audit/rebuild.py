"""`atom rebuild-data`: reads the documents that a release has by reference at their source again.

The files of each source are pulled from the Hub, or read from a given folder, and compared with their digests. The
published settings read them, the steps that edited texts run again, and every text is compared with its published hash.
The tables are those of the stage `dedup`, byte for byte where this pyarrow writes as the one did that made them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import sha256_file
from pipeline.core.text import printable
from release import references, scratch
from release.facts.published_tables import Manifest, read_json
from release.references import Reference
from release.tracing.release_data import ReleaseData
from stages.data.acquire.readers.base import Document, Files
from stages.data.acquire.sources import Source
from stages.data.curate.filters.base import FilterFunction
from stages.formats.table import content_hash

Progress = Callable[[str], None]
SUFFIX = ".data"
"""The end of the name of the folder beside a release that has its rebuilt tables."""


@dataclass(frozen=True)
class RebuiltSource:
    """A source whose documents are here with their texts.

    Attributes:
        source: Its name.
        origin: The place that its files come from.
        documents: The number of its documents.
        bytes: The bytes of their texts.
        files: The number of its tables.
        equal: The number of those with the bytes that the stage made; None if the release's evidence is not here.
        present: The number of those that an earlier run had rebuilt.
    """

    source: str
    origin: str
    documents: int
    bytes: int
    files: int
    equal: int | None
    present: int


@dataclass(frozen=True)
class Rebuilt:
    folder: str
    sources: list[RebuiltSource]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def folder_of(release: Path) -> Path:
    """Returns the folder of the rebuilt tables of a release, unless another one is given."""
    release = release.absolute()
    return release.with_name(f"{release.name}{SUFFIX}")


def rebuild(
    release: Path, target: Path, folders: Mapping[str, Path], progress: Progress = lambda text: None
) -> Rebuilt:
    """Writes `kept/<source>/part-*.parquet` with texts to `target`.

    A part that is there already is compared, not made again; pulled files stay in $ATOM_HOME/hub. Memory holds a row
    group.

    Args:
        release: A release or its data repository.
        target: The folder to write to.
        folders: The folders of files that no Hub has, by source.
        progress: Is told each step.

    Raises:
        AtomError: Files are missing or have other digests.
        CheckFailed: A document is not there or has another text.
    """
    dataset = ReleaseData.locate(release).data
    by_name = references.read(dataset)
    if not by_name:
        raise AtomError(f"{release} has the texts of all its documents; there is nothing to rebuild")
    if unknown := sorted(folders.keys() - by_name.keys()):
        raise AtomError(f"--source names {unknown[0]}, but by reference are {', '.join(by_name)}; name one of these")
    published, sources = _published(dataset), []
    with scratch.folder() as temporary:
        for name, reference in by_name.items():
            source = reference.restored(folders.get(name), temporary)
            _require_files(source, reference)
            sources.append(_rebuild_source(dataset, target, source, reference, published, progress))
    return Rebuilt(str(target), sources)


def _rebuild_source(
    dataset: Path, target: Path, source: Source, reference: Reference, published: Mapping[str, str], progress: Progress
) -> RebuiltSource:
    name, documents, size, present, equal = source.name, 0, 0, 0, 0
    tables = list(references.kept_tables(dataset, name, reference.parts))
    for number, listed in tables:
        path = target / listed.relative_to(dataset)
        if path.is_file():
            present += 1
        else:
            progress(f"source {name}: reading part {number + 1} of {len(tables)} of {reference.origin}")
            # A run that is cut off leaves no half table, which the next run would take for a finished one.
            with atomic_files.replacing(path) as draft:
                _write_part(listed, draft, source, reference, number)
        rows, length = _compare(listed, path)
        documents, size = documents + rows, size + length
        # Another version of the library may write other bytes for equal rows, so this is counted and no problem.
        equal += sha256_file(path) == published.get(f"kept/{name}/{path.name}")
    return RebuiltSource(name, reference.origin, documents, size, len(tables), equal if published else None, present)


def _write_part(listed: Path, target: Path, source: Source, reference: Reference, number: int) -> None:
    """Writes a table with the texts of the rows of `listed`."""
    import pyarrow as pa

    files = source.files_of(number)
    source.reader.pull(source.name, files)
    _require_digests(source, reference, files)
    texts = _Texts(source, reference, files)
    with references.group_writer(target) as writer:
        for rows in references.row_groups(listed):
            column = [
                texts.find(*row) for row in zip(rows["id"].to_pylist(), rows["content_hash"].to_pylist(), strict=True)
            ]
            place = rows.schema.get_field_index("text")
            references.write_group(writer, rows.set_column(place, "text", pa.array(column, pa.string())))


class _Texts:
    """The texts of the documents of a part, in their order, which is that of the kept ones."""

    def __init__(self, source: Source, reference: Reference, files: Files) -> None:
        self.source, self.reference = source, reference
        documents = source.reader.documents(source.name, reference.seed, files)
        self.documents: Iterator[Document] = (each for each in documents if isinstance(each, Document))

    def find(self, id: str, digest: str) -> str:
        """Returns the text of the next kept document. Raises CheckFailed if it is not there or has another hash."""
        name = id.removeprefix(f"{self.source.name}/")
        document = next((each for each in self.documents if each.name == name), None)
        if document is None:
            raise CheckFailed(
                f"document {printable(id)} is not in the files of {self.reference.origin}, or not in its place; "
                "read them with the version of atom that made the release"
            )
        # Most documents were kept as they were read, so the steps run only for the others.
        for text in (document.text, *self._edited(id, document)):
            if content_hash(text) == digest:
                return text
        raise CheckFailed(
            f"document {printable(id)} has another text in {self.reference.origin} than its published hash says, "
            "though the file is the same; read it with the version of atom that made the release"
        )

    def _edited(self, id: str, acquired: Document) -> Iterator[str]:
        """Yields the text after the steps that edited texts; nothing if one removes it."""
        from stages.data.acquire.acquire_stage import document_row
        from stages.data.curate.source_filter import to_document

        document = to_document(document_row(self.source, id, acquired))
        for function in self._functions:
            result = function(document)
            if not isinstance(result, str):
                return
            document.text = result
        yield document.text

    @cached_property
    def _functions(self) -> list[FilterFunction]:
        return [step.function() for step in self.reference.steps]


def _compare(listed: Path, path: Path) -> tuple[int, int]:
    """Returns (documents, bytes of their texts) of a rebuilt table.

    Raises CheckFailed unless it has the rows of the published one and every text its hash.
    """
    documents = size = 0
    rebuilt = references.row_groups(path)
    for rows in references.row_groups(listed):
        other = next(rebuilt, None)
        if other is None or not rows.drop(["text"]).equals(other.drop(["text"])):
            raise CheckFailed(f"{path} is not the table of this release; remove it, and rebuild it")
        for id, text, digest in zip(*(other[name].to_pylist() for name in ("id", "text", "content_hash")), strict=True):
            data = (text or "").encode()
            if hashlib.sha256(data).hexdigest() != digest:
                raise CheckFailed(f"{path}: the text of {printable(id)} is not what its hash says; remove the file")
            documents, size = documents + 1, size + len(data)
    if next(rebuilt, None) is not None:
        raise CheckFailed(f"{path} has more documents than the table of this release; remove it, and rebuild it")
    return documents, size


def _require_files(source: Source, reference: Reference) -> None:
    """Raises AtomError if the files are missing or others than those of the release."""
    if missing := source.reader.missing(source.name):
        raise AtomError(f"{missing}; get the files of {reference.origin}")
    names, expected = {name for name, _ in source.files()}, reference.files.keys()
    if different := sorted(names ^ expected):
        verb = "lacks" if different[0] in expected else "has"
        raise AtomError(
            f"the folder of source {source.name} {verb} {printable(different[0])}; get those of the release"
        )


def _require_digests(source: Source, reference: Reference, files: Files) -> None:
    digests = source.reader.digests(source.name, files)
    for (name, path), digest in zip(files, digests, strict=True):
        if digest != reference.files[name]:
            raise AtomError(
                f"{path} has the digest {digest}, and the release was made from {reference.files[name]}; get that file"
            )


def _published(dataset: Path) -> Mapping[str, str]:
    """Returns {path: SHA-256} of the tables that the stage `dedup` made; empty without the release's evidence."""
    manifest = dataset.parent / "evidence/manifests/dedup.json"
    return Manifest.parse("dedup", read_json(manifest)).digests if manifest.is_file() else {}


def text(rebuilt: Rebuilt) -> str:
    lines = []
    for row in rebuilt.sources:
        bytes_equal = (
            "its evidence is not here to compare the files"
            if row.equal is None
            else f"{row.equal} of {row.files} files as the stage made them, byte for byte"
        )
        earlier = f", {row.present} of them there before" if row.present else ""
        lines.append(
            f"source {row.source}: {row.documents} documents of {row.bytes} bytes from {row.origin}, every text has "
            f"its published hash; {bytes_equal}{earlier}"
        )
    return "\n".join([*lines, f"rebuilt: {rebuilt.folder}"])
