"""Searches of a release by text: the documents that contain a span, and the scope of a request to remove a document.

The scope has the document, related ones, the files that mention it, and Merkle proofs. Every text is read, which took
0.7 s for 203 MB on two shared cores.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from release import merkle, references
from release.facts.published_tables import TEXT_BATCH
from release.tracing.answers import Document, Match, Mention, Related, Removal, TextMatches
from release.tracing.documents import find_documents, find_uses, kept_rows, trace_document
from release.tracing.release_data import Progress, ReleaseData, select_rows
from stages.formats.table import stream_batches

ABOUT = ("id", "source", "license", "origin", "split", "content_hash")
"""Columns of a kept document in the answer."""


def trace_text(folder: Path, span: str, progress: Progress = lambda text: None) -> TextMatches:
    """Finds every kept document that contains the span exactly, with the steps that read it.

    Steps are found by id: if an earlier run had another text under the same id, its steps read that text.

    Args:
        folder: A release or its data repository.
        span: The text to find.
        progress: Is told each step.

    Raises:
        AtomError: The span is empty or no text, or a table is damaged.
    """
    data = ReleaseData.locate(folder)
    try:
        span.encode()
    except UnicodeEncodeError:
        raise AtomError("the span is not valid Unicode text; give it in UTF-8") from None
    if not span:
        raise AtomError("the span is empty; give at least one character of the text")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in data.kept():
        progress(f"searching {data.name(path)}")
        for row in _containing(path, span):
            about = {column: row[column] for column in ABOUT} | {"count": row["text"].count(span), "tables": []}
            rows.setdefault((row["id"], row["content_hash"]), about)["tables"].append(data.name(path))
    uses = find_uses(data, {id for id, _ in rows})
    matches = [Match(**row, uses=uses.get(id, [])) for (id, _), row in rows.items()]
    unknown = [f"the texts of {name}: they are by reference" for name in references.read(data.data)]
    return TextMatches(span, matches, [*data.unknown(), *unknown])


def _containing(path: Path, span: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table whose text contains the span."""
    import pyarrow.compute as pc

    for batch in stream_batches(path, [*ABOUT, "text"], TEXT_BATCH):
        contains = pc.fill_null(pc.match_substring(batch["text"], span), False)
        yield from batch.filter(contains).to_pylist()


def trace_removal(folder: Path, doc_id: str, progress: Progress = lambda text: None) -> Removal:
    """Returns the scope of removing a document or a task. Reads every table of the release.

    Raises what `trace_document` raises.
    """
    data, subject = ReleaseData.locate(folder), trace_document(folder, doc_id)
    relations = _relations(data, subject)
    documents = find_documents(data, sorted(relations))
    related_ids = sorted(documents, key=lambda id: (relations[id], id))
    related = [Related(relations[id], documents[id]) for id in related_ids]

    unknown = list(subject.unknown)
    if data.release is None:
        unknown.append("which other repositories of the release name it: only the data is here")
    in_release = bool(subject.fates) and not subject.fates[0].table.startswith("earlier/")
    if not subject.fates:
        unknown.append("a proof: tasks and answers are in no table that has a root")
    elif not in_release:
        unknown.append("a proof: the document is of an earlier run, and roots are over this release's own tables")

    rows = [row for document in (subject, *documents.values()) for row in kept_rows(data, document.id, document.fates)]
    texts = {row["text"] for row in rows if row["content_hash"] in subject.hashes and row["text"] is not None}
    mentions = _mentions(data, doc_id, texts, progress)
    return Removal(subject, related, mentions, merkle.prove(data.data, doc_id) if in_release else {}, unknown)


def _relations(data: ReleaseData, document: Document) -> dict[str, str]:
    """Returns {id of another document: its relation}, along chains of duplicates."""
    relations: dict[str, str] = {document.id: ""}
    paths = data.dispositions()
    for relation, column, match_column in (
        ("it stands for this one", "duplicate_of", "id"),
        ("this one stands for it", "id", "duplicate_of"),
    ):
        # A duplicate may itself stand for others, so the chain is followed to its end.
        frontier = {document.id}
        while frontier:
            rows = [
                row
                for path in paths
                for row in select_rows(path, ["id", "duplicate_of"], (match_column, "in", sorted(frontier)))
            ]
            frontier = {row[column] for row in rows if row[column]} - relations.keys()
            relations |= dict.fromkeys(sorted(frontier), relation)
    hashes = sorted(document.hashes)
    for path in paths:
        for name in ("content_hash", "kept_hash"):
            duplicates = select_rows(path, ["id"], (name, "in", hashes))
            for row in duplicates:
                # A relation that the tables state says more than an equal text, so it is kept.
                relations.setdefault(row["id"], "it has the same text")
    del relations[document.id]
    return relations


def _mentions(data: ReleaseData, doc_id: str, texts: set[str], progress: Progress) -> list[Mention]:
    """Lists the files of a release, or of its data, that have the id or contain a text.

    Searched are columns of strings in tables, and files of JSON outside of `code`.
    """
    release, mentions = data.opened, []
    # {folder of a repository: its id}; "" is that of the evidence, which has the files outside of the other folders.
    repository_ids: dict[str, str] = {}
    if release.is_whole and (release.root / "checkpoints").is_dir():
        repository_ids = {row.folder: row.id(release.info.namespace, release.info.name) for row in release.repositories}
    # An id stands alone between its quotes; a text may be part of a longer string, so it is searched without them.
    json_ids = _json_forms(doc_id)
    json_texts = {form[1:-1] for text in texts for form in _json_forms(text)}
    # Every file, because an id may also stand in tables and logs that this code does not know.
    for path in release.files:
        if path.endswith(".parquet"):
            progress(f"searching {path}")
            by_id, by_text = _count_rows(release.root / path, doc_id, texts)
        elif path.endswith((".json", ".jsonl")) and not path.startswith("code/"):
            content = (release.root / path).read_bytes()
            by_id = int(any(form in content for form in json_ids))
            by_text = int(any(form in content for form in json_texts))
        else:
            continue
        if by_id or by_text:
            repository = repository_ids.get(path.split("/")[0], repository_ids.get(""))
            mentions.append(Mention(repository, path, by_id, by_text))
    return mentions


def _json_forms(text: str) -> set[bytes]:
    """Returns a text as JSON, which may be written with and without escapes of letters."""
    return {json.dumps(text, ensure_ascii=escapes).encode() for escapes in (True, False)}


def _count_rows(path: Path, doc_id: str, texts: set[str]) -> tuple[int, int]:
    """Returns rows of a table with a column of strings that equals the id, and rows with one that contains a text."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    id_rows = text_rows = 0
    try:
        with pq.ParquetFile(path) as file:
            names = [field.name for field in file.schema_arrow if field.type in (pa.string(), pa.large_string())]
            for batch in file.iter_batches(TEXT_BATCH, columns=names) if names else ():
                by_id = [pc.equal(column, doc_id) for column in batch.columns]
                by_text = [pc.match_substring(column, text) for column in batch.columns for text in sorted(texts)]
                id_rows += _count_any(by_id)
                text_rows += _count_any(by_text)
    except (pa.ArrowException, OSError) as error:
        raise AtomError(f"{path} cannot be read as Parquet ({error}); pull it again") from None
    return id_rows, text_rows


def _count_any(masks: list[Any]) -> int:
    """Returns the number of rows for which one of the masks is true."""
    import pyarrow.compute as pc

    if not masks:
        return 0
    is_any = functools.reduce(pc.or_, (pc.fill_null(mask, False) for mask in masks))
    return int(pc.sum(is_any).as_py())
