"""Licenses and languages of the tokenized documents, and opt-outs.

They are read from the tables of the dataset repository.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import CheckFailed
from release import layout
from release.facts.published_tables import TEXT_BATCH, read_json, stream_batches, stream_rows
from release.layout import OPT_OUTS
from stages.data.acquire.licenses.expressions import asks_for_attribution
from stages.data.curate.deny_list import OPT_OUT_RULE
from stages.formats.table import MEASURES, SPLITS, column_names, content_hash, row_count

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray


BATCH = 65536


@dataclass
class LicenseFacts:
    """The documents of one license after curation.

    Attributes:
        documents: Documents.
        tokens: Tokens of them.
        bases: Acquired documents by how the license was found: `field` of a row, `file` of a package, `page`,
            `notice`, `none`, or empty where it is the source's declaration.
    """

    documents: int = 0
    tokens: int = 0
    bases: Counter[str] = field(default_factory=Counter)


@dataclass
class LanguageFacts:
    """The documents of a source in one language."""

    documents: int = 0
    tokens: int = 0


@dataclass
class DocumentFacts:
    """Licenses and measures of the documents after curation.

    Attributes:
        licenses: By SPDX expression, that of most tokens first.
        attributed: {source: documents in its attribution table}
        notices: Distinct texts of licenses and notices of packages.
        languages: By source and code, that of most tokens first; a document without a measure has the language "".
            Only of sources whose steps identified it.
        measured: True if there are measures of documents at all.
    """

    licenses: dict[str, LicenseFacts] = field(default_factory=dict)
    attributed: dict[str, int] = field(default_factory=dict)
    notices: int = 0
    languages: dict[str, dict[str, LanguageFacts]] = field(default_factory=dict)
    measured: bool = False


def read_document_facts(dataset: Path) -> DocumentFacts:
    """Reads the tables of documents once, some thousand rows at a time."""
    import numpy as np

    facts, asking = DocumentFacts(), Counter[str]()
    files = layout.all_files(layout.token_files(dataset))
    for batch in stream_batches(files, ["source", "license", "tokens"], BATCH):
        tokens = batch["tokens"].to_numpy()
        asks = np.zeros(len(tokens), bool)
        for license, rows in _rows_by_value(batch["license"]):
            row = facts.licenses.setdefault(license, LicenseFacts())
            row.documents += len(rows)
            row.tokens += int(tokens[rows].sum())
            asks[rows] = asks_for_attribution(license)
        for source, rows in _rows_by_value(batch["source"]):
            asking[source] += int(asks[rows].sum())
    # What the acquisition found of licenses, before anything was removed.
    for path in sorted((dataset / "sources").glob("*.json")):
        declared = read_json(path)
        everything = {"license": declared.get("license"), "found": "", "documents": declared.get("documents", 0)}
        for row in declared.get("licenses", [everything]):
            if row["license"] in facts.licenses:
                facts.licenses[row["license"]].bases[row["found"]] += row["documents"]
    facts.licenses = dict(sorted(facts.licenses.items(), key=lambda item: (-item[1].tokens, item[0])))
    facts.attributed = _count_attributed(dataset, asking)
    facts.notices = _count_notices(dataset)
    token_files = layout.token_files(dataset)
    for source, files in layout.measure_files(dataset).items():
        by_name = {path.name: path for path in token_files.get(source, [])}
        for path in files:
            if path.name in by_name:
                facts.measured = True
                _add_languages(facts, source, by_name[path.name], path)
    for source, by_language in facts.languages.items():
        facts.languages[source] = dict(sorted(by_language.items(), key=lambda item: (-item[1].tokens, item[0])))
    return facts


def _count_attributed(dataset: Path, asking: Counter[str]) -> dict[str, int]:
    """Returns the rows of the attribution tables by source.

    `asking` has the number of documents by source whose licenses ask for it. Raises CheckFailed if the tables do not
    list as many.
    """
    counts = {
        source: sum(row_count(path) for path in files) for source, files in layout.attribution_files(dataset).items()
    }
    for source in sorted(asking if counts else ()):
        if counts.get(source, 0) != asking[source]:
            raise CheckFailed(
                f"{layout.ATTRIBUTION}/{source} lists {counts.get(source, 0)} documents, and the licenses of "
                f"{asking[source]} ask for attribution"
            )
    return counts


def _count_notices(dataset: Path) -> int:
    """Returns the number of distinct notices.

    Raises CheckFailed if a digest is not that of a text, or has none before it.
    """
    digests = set[str]()
    files = layout.all_files(layout.notice_files(dataset))
    for row in stream_rows(files, ["sha256", "text"], TEXT_BATCH):
        # A text is published once, with the first package that has it.
        if row["sha256"] in digests:
            continue
        if content_hash(row["text"] or "") != row["sha256"]:
            raise CheckFailed(f"{layout.NOTICES} has no text whose SHA-256 is {row['sha256']}")
        digests.add(row["sha256"])
    return len(digests)


def _add_languages(facts: DocumentFacts, source: str, tokens_file: Path, measures_file: Path) -> None:
    """Adds the languages of a part, if a step identified them."""
    import pyarrow.compute as pc

    if "language" not in column_names(measures_file):
        return
    languages = facts.languages.setdefault(source, {})
    for tokens, measures in _join(tokens_file, measures_file):
        for language, rows in _rows_by_value(pc.fill_null(measures["language"], "")):
            row = languages.setdefault(language, LanguageFacts())
            row.documents += len(rows)
            row.tokens += int(tokens[rows].sum())


def _join(tokens_file: Path, measures_file: Path) -> Iterator[tuple[NDArray[np.int64], pa.RecordBatch]]:
    """Yields (tokens, measures) of the tokenized documents of a part, some thousand rows at a time.

    Both tables have the documents of each split in the order of the part, and that of measures also has those that
    deduplication removed. Raises CheckFailed if it lacks one.
    """
    for split in SPLITS:
        yield from _join_split(tokens_file, measures_file, split)


def _join_split(
    tokens_file: Path, measures_file: Path, split: str
) -> Iterator[tuple[NDArray[np.int64], pa.RecordBatch]]:
    import numpy as np
    import pyarrow.compute as pc

    rows_of_part = stream_batches(tokens_file, ["id", "split", "tokens"], BATCH)
    batches = (batch.filter(pc.equal(batch["split"], split)) for batch in rows_of_part)
    pending = next(batches, None)
    for measures in stream_batches(measures_file, ["id", "language"], BATCH):
        while pending is not None:
            # Both tables are in the same order, so the rows before the first absent one are complete.
            rows = pc.index_in(pending["id"], value_set=measures["id"])
            absent = np.flatnonzero(rows.is_null().to_numpy(zero_copy_only=False))
            count = int(absent[0]) if absent.size else len(rows)
            yield pending["tokens"][:count].to_numpy().astype(np.int64), measures.take(rows[:count])
            if count < len(rows):
                pending = pending.slice(count)
                break
            pending = next(batches, None)
    # A batch without rows of this split is empty after the filter.
    while pending is not None and not len(pending):
        pending = next(batches, None)
    if pending is not None:
        raise CheckFailed(
            f"{MEASURES}/{measures_file.parent.name}/{measures_file.name} does not have the document "
            f"{pending['id'][0]} among those of the part, in their order"
        )


def _rows_by_value(column: pa.Array) -> list[tuple[str, NDArray[np.int64]]]:
    """Returns (value, numbers of the rows that have it) of each value of an Arrow column."""
    import numpy as np

    encoded = column.dictionary_encode()
    codes = encoded.indices.to_numpy()
    return [(value, np.flatnonzero(codes == code)) for code, value in enumerate(encoded.dictionary.to_pylist())]


OPT_OUT_COLUMNS = ["id", "source", "rule", "match", "duplicate_of", "content_hash"]


@dataclass
class OptOut:
    """A request to leave documents out.

    Attributes:
        request: The SHA-256 of its reference.
        date: The date in the deny-list.
        entries: {kind: entries of the deny-list}
        removed: Documents by how they were found: as named (`id`, `url`, …), or as `copy`, `near_duplicate`,
            `derived`.
    """

    request: str
    date: str
    entries: dict[str, int]
    removed: Counter[str] = field(default_factory=Counter)


def read_opt_outs(dataset: Path) -> list[OptOut]:
    """Returns the requests of a dataset folder in the order of their hashes; none for a corpus without a deny-list."""
    if not (dataset / OPT_OUTS).exists():
        return []
    opt_outs = {
        row["request"]: OptOut(row["request"], row["date"], row["entries"])
        for row in read_json(dataset / OPT_OUTS)["requests"]
    }
    for row in removed_documents(dataset):
        for request in row["requests"]:
            if request in opt_outs:
                opt_outs[request].removed[row["found"]] += 1
    return [opt_outs[request] for request in sorted(opt_outs)]


def removed_documents(dataset: Path) -> Iterator[dict[str, Any]]:
    """Yields the dispositions of the documents that were removed on request.

    Each has the kind `found` and the `requests` of its match.
    """
    import pyarrow.compute as pc

    for batch in stream_batches(layout.all_files(layout.disposition_files(dataset)), OPT_OUT_COLUMNS, BATCH):
        for row in batch.filter(pc.equal(batch.column("rule"), OPT_OUT_RULE)).to_pylist():
            kind, *requests = (row.pop("match") or "").split(" ")
            yield {**row, "found": kind, "requests": requests}
