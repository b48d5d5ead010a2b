"""Stage `acquire`: reads or generates the documents of one source, with their id, license and origin.

A document that is not used, because its license is unknown or it opts out, is a row of `failed` with the reason.

Seals `documents/part-NNNNN.parquet`, `failed/part-NNNNN.parquet` and `source.json`, and `derived/part-NNNNN.parquet`
where the reader states which documents others were made from, and `credits/part-NNNNN.parquet` where it states titles
or authors, and `notices/part-NNNNN.parquet` where its documents are files of packages. Each part reads its own files
alone. Document ids and order depend only on the source and the seed.
"""

from __future__ import annotations

import hashlib
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core.bounds import Seed
from pipeline.core.errors import AtomError
from pipeline.core.parts import Part, link_parts, part_file, seal_part
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage
from stages.data import estimates
from stages.data.acquire.licenses.expressions import UNKNOWN_WEB, UNMAPPED
from stages.data.acquire.readers.base import (
    COUNTS,
    Document,
    Failed,
    Failures,
    FileReader,
    Files,
    LicenseFound,
    LicenseTally,
    Refused,
    SampledReader,
    Unmapped,
    Unreadable,
    is_unicode,
    kind_of,
    refused_row,
    report_refusals,
)
from stages.data.acquire.sources import Source, require_tree
from stages.formats import chat
from stages.formats.database import connect
from stages.formats.file_digests import tree_digest
from stages.formats.seeds import seed_of
from stages.formats.table import (
    CREDITS,
    DERIVED,
    DOCUMENTS,
    FAILED,
    NOTICES,
    DocumentRow,
    content_hash,
    part_files,
    row_writer,
    write_json,
)

VERSION = 9
# If more of a part's documents are skipped as unreadable, and more than ten, its reader or its settings are wrong.
MOST_SKIPPED_SHARE = 0.5
# The names of skipped documents in source.json.
SKIPPED_NAMES = 20


class AcquireConfig(Config):
    """One source with its tree digest resolved, and the recipe's seed."""

    source: Source
    """settings of the source, with its tree digest resolved"""
    seed: Seed
    """seed of the recipe"""


def run(config: AcquireConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Reads one source into `documents`, and the rows that are no documents into `failed`.

    `source.json` declares license, evidence, tree digest and counts.

    Resumes after the last sealed part. Raises AtomError if a file is corrupt, if the tree digest differs from the
    config's, if two documents have the same id, or if many documents cannot be read.
    """
    source, parts = config.source, []
    for number in range(source.parts):
        parts.append(_seal_part(config, work, number))
        report.progress(number + 1, source.parts, "parts")
    # The digests are those of the bytes that were read, so a file that changed in between is noticed here.
    files = [(name, sha256) for part in parts for name, sha256 in part.facts["files"]]
    _require_tree(source, parts, files)
    join(config, parts, len(files), work, out, report)


def join(config: AcquireConfig, parts: Sequence[Part], files: int, work: Path, out: Path, report: Report) -> None:
    """Joins the parts into `out` and writes `source.json`.

    `files` is the number of files that were read. Raises AtomError if there is no document, or if two have the same id.
    """
    source = config.source
    counts = {name: sum(part.facts[name] for part in parts) for name in ("documents", "documents_found", "bytes")}
    failures = Failures.joined(part.facts["failures"] for part in parts)
    skipped = Failures.joined((part.facts["skipped"] for part in parts), SKIPPED_NAMES)
    if skipped.count:
        report.note(f"source {source.name}: skipped, because they cannot be read: {skipped}")
    if failures.count:
        report.note(f"source {source.name}: cannot be read, and will be removed by curation: {failures}")
    refusals = Counter[str]()
    for part in parts:
        refusals.update(part.facts["refused"])
    licenses = LicenseTally.joined(part.facts["licenses"] for part in parts).facts()
    report_refusals(source.name, refusals, licenses, report)
    if not counts["documents"] and not refusals:
        raise AtomError(f"source {source.name} gave no documents; check its reader")
    # Files are linked, not copied: a large source needs its space once.
    link_parts(parts, out)
    if not source.reader.names_files:
        _require_distinct_ids(source, out, work)
    # A failed or refused document was acquired as well: curation gives each a disposition.
    documents = counts["documents"]
    counts |= {"documents": documents + failures.count + refusals.total(), "documents_failed": failures.count}
    counts |= {COUNTS[kind]: count for kind, count in sorted(refusals.items())}
    if left_out := sum(part.facts["left_out"] for part in parts):
        counts["rows_left_out"] = left_out
    declaration = source.model_dump(include={"name", "kind", "license", "license_evidence", "origin", "tree_digest"})
    if source.document_license is not None:
        declaration["document_license"] = source.document_license
    sizes = {"files": files, "files_skipped": [name for name, _ in skipped.first], "parts": source.parts}
    if skipped.count > SKIPPED_NAMES:
        sizes["files_skipped_count"] = skipped.count
    declaration |= {"reader": source.reader.reader, **source.reader.declared}
    if source.reader.conversations:
        declaration["conversations"] = {
            name: sum(part.facts["features"][name] for part in parts) for name in chat.FEATURES
        }
    write_json(out / "source.json", {**declaration, **counts, **sizes, **licenses})
    report.note(
        f"source {source.name}: {documents} of {counts['documents_found']} documents, {counts['bytes'] / 1e6:.2f} MB, "
        f"{source.license}"
    )


def run_shard(config: AcquireConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Seals one part in `work`."""
    _seal_part(config, work, shard)


def _seal_part(config: AcquireConfig, work: Path, number: int) -> Part:
    def make(folder: Path) -> dict[str, Any]:
        return read_part(config, number, config.source.files_of(number), folder)

    return seal_part(work, f"{config.source.name}-{number:05d}", make)


def read_part(config: AcquireConfig, number: int, files: Files, folder: Path) -> dict[str, Any]:
    """Writes the documents of a part, and returns its counts and the digests of its files."""
    source = config.source
    source.reader.pull(source.name, files)
    digests = list(zip((name for name, _ in files), source.reader.digests(source.name, files), strict=True))
    selection = _Selection(config, files)
    subject, problem = f"source {source.name}", "cannot be read; check the settings of its reader"
    failures = Failures(subject, problem)
    skipped = Failures(subject, problem, MOST_SKIPPED_SHARE, SKIPPED_NAMES)
    licenses, refused, size = LicenseTally(), Counter[str](), 0
    features = Counter(dict.fromkeys(chat.FEATURES, 0)) if source.reader.conversations else None
    left_out = Counter[str]()
    with (
        row_writer(folder / "documents" / part_file(number), DOCUMENTS) as write,
        row_writer(folder / "failed" / part_file(number), FAILED) as write_failed,
        _writer(source.reader.states_parents, folder / "derived" / part_file(number), DERIVED) as write_parent,
        _writer(source.reader.has_notices, folder / "notices" / part_file(number), NOTICES) as write_notice,
        _writer(source.reader.states_credits, folder / "credits" / part_file(number), CREDITS) as write_credit,
    ):
        for notice in source.reader.notices(files):
            digest, row = content_hash(notice.text), asdict(notice)
            write_notice({"sha256": digest, "source": source.name, **row})
        for document in documents_of(source, config.seed, files, left_out):
            if isinstance(document, Unreadable):
                skipped.add(document.name)
                continue
            # Every document is offered to the selection, the failed ones too, so the choice does not depend on which
            # can be read.
            id = f"{source.name}/{document.name}"
            if not selection.takes(id):
                continue
            if isinstance(document, Failed):
                failures.add(id, document.reason)
                declared = UNMAPPED if source.reader.gives_licenses else source.license
                license = source.document_license or declared
                write_failed({"id": id, "source": source.name, "license": license, "reason": document.reason})
            # Refusals are no errors of the settings: no number of them stops the stage.
            elif isinstance(document, Unmapped | Refused):
                refused[kind_of(document)] += 1
                if isinstance(document, Unmapped):
                    licenses.add_unmapped(document)
                write_failed(refused_row(source.name, id, document))
            else:
                license, stated_in = _license(source, document)
                licenses.add(license, stated_in, len(document.text.encode()), document.stated)
                size += len(document.text.encode())
                if features is not None:
                    features.update(chat.features(document.text))
                for parent in document.derived_from:
                    write_parent({"id": id, "parent": parent})
                write_credit({"id": id, "title": document.title or None, "author": document.author or None})
                write(document_row(source, id, document))
    # Checked at the end of a part, when the shares are known.
    failures.require_few(selection.taken)
    skipped.require_few(selection.found + skipped.count)
    return {
        "files": digests,
        "documents": selection.taken - failures.count - refused.total(),
        "documents_found": selection.found,
        "bytes": size,
        "features": features,
        "skipped": skipped.facts(),
        "failures": failures.facts(),
        "refused": refused,
        "left_out": left_out.total(),
        "licenses": licenses.part_facts(),
    }


def _license(source: Source, document: Document) -> tuple[str, LicenseFound]:
    """Returns the license of a document, and how it was found."""
    if document.license is not None:
        return document.license, document.license_found
    license = source.document_license or source.license
    return license, "none" if license == UNKNOWN_WEB else ""


def document_row(source: Source, id: str, document: Document) -> DocumentRow:
    """Returns the row of a document that a reader gave."""
    place = f"{source.origin}#{document.location}" if document.location else source.origin
    return {
        "id": id,
        "text": document.text,
        "source": source.name,
        "license": _license(source, document)[0],
        "origin": document.url or place,
        "content_hash": content_hash(document.text),
        "prompt_chars": document.prompt_chars,
    }


@contextmanager
def _writer(is_stated: bool, path: Path, columns: Mapping[str, str]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Opens a context with a function that writes a row of a table.

    No file is written for a reader that does not state it.
    """
    if is_stated:
        with row_writer(path, columns) as write:
            yield write
    else:
        yield lambda row: None


def documents_of(
    source: Source, seed: int, files: Files, left_out: Counter[str]
) -> Iterator[Document | Unreadable | Failed | Unmapped | Refused]:
    """Yields the documents of the reader; one whose text has no UTF-8 form has failed. `left_out` counts other rows."""
    for document in source.reader.documents(source.name, seed, files):
        if document is None:
            left_out["rows"] += 1
        elif isinstance(document, Document | Unmapped) and not is_unicode(document.text):
            yield Failed(document.name, "its text holds a lone surrogate, which is not Unicode")
        else:
            yield document


class _Selection:
    """The choice of the first `limit` documents by a seeded hash of their id, in their original order.

    With a limit, the reader is read twice, and memory holds 8 bytes a document. `found` counts the documents, and
    `taken` the chosen ones.
    """

    def __init__(self, config: AcquireConfig, files: Files) -> None:
        self.config, self.files = config, files
        self.salt = f"{seed_of(f'limit/{config.source.name}', config.seed)}/"
        self.found = self.taken = 0
        reader = config.source.reader
        self.limit = reader.limit if isinstance(reader, SampledReader) else None
        self.last = 2**64 if self.limit is None else self._last_hash(self.limit)

    def takes(self, id: str) -> bool:
        """Returns True if the next document is chosen."""
        self.found += 1
        # Two documents may share the last hash; the count keeps the limit.
        chosen = self.limit is None or (self._hash(id) <= self.last and self.taken < self.limit)
        self.taken += chosen
        return chosen

    def _last_hash(self, limit: int) -> int:
        import numpy as np

        # The first pass reads the ids alone, to find the limit-th smallest hash.
        documents = documents_of(self.config.source, self.config.seed, self.files, Counter())
        readable = (each for each in documents if not isinstance(each, Unreadable))
        ids = (f"{self.config.source.name}/{document.name}" for document in readable)
        hashes = np.frombuffer(array("Q", map(self._hash, ids)), np.uint64)
        return 2**64 if hashes.size <= limit else int(np.partition(hashes, limit - 1)[limit - 1])

    def _hash(self, id: str) -> int:
        return int.from_bytes(hashlib.sha256((self.salt + id).encode()).digest()[:8], "big")


def _require_tree(source: Source, parts: Sequence[Part], files: Sequence[tuple[str, str]]) -> None:
    """Raises AtomError if the files that were read are not those of the tree digest.

    The parts made from them are removed, so that a later attempt reads again.
    """
    digest = tree_digest(files)
    if digest == source.tree_digest:
        return
    for part in parts:
        # These parts hold documents of other files.
        shutil.rmtree(part.folder)
    if source.tree_digest == "auto":
        raise AtomError(f"source {source.name}: tree_digest is not resolved; run through the recipe's resolved() form")
    require_tree(source, digest, len(files))


def _require_distinct_ids(source: Source, out: Path, work: Path) -> None:
    """Raises AtomError if two documents have the same id; failed ones are documents as well."""
    files = {table: [str(path) for path in part_files(out, table)] for table in ("documents", "failed")}
    ids = " UNION ALL ".join(f"SELECT id FROM read_parquet(${table})" for table in files)
    # Grouping hashes takes less memory than grouping ids; only the few candidates are compared by their ids.
    repeated = f"SELECT hash(id) FROM ({ids}) GROUP BY 1 HAVING count(*) > 1"
    query = f"SELECT id FROM ({ids}) WHERE hash(id) IN ({repeated}) GROUP BY id HAVING count(*) > 1"
    with connect(work) as database:
        row = database.execute(f"{query} ORDER BY id LIMIT 1", files).fetchone()
    if row:
        raise AtomError(
            f"source {source.name}: two documents have the id {row[0]}; choose an id_field of distinct values"
        )


def inspect(config: AcquireConfig) -> list[str]:
    """Returns the note of the reader. Raises RecipeError if it cannot run."""
    note = config.source.reader.inspect()
    return [] if note is None else [f"{note} ({config.source.name})"]


def estimate(config: AcquireConfig) -> Estimate:
    """Returns the estimate by the expected size of the source.

    Without one, the time is a few seconds for a source from Python's library or from a seed, and unknown for files.
    """
    size, reader = config.source.expected, config.source.reader
    if size is None:
        return estimates.estimate("acquire", None, None if isinstance(reader, FileReader) else 5.0)
    return estimates.estimate("acquire", size, step_seconds=reader.seconds_per_mb * size.bytes / 1e6)


STAGE = Stage(
    "acquire",
    VERSION,
    AcquireConfig,
    run,
    estimate=estimate,
    shards=lambda config: config.source.parts,
    run_shard=run_shard,
    inspect=inspect,
    code=lambda config: config.source.code,
)
