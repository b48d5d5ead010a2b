"""Finds the documents of a release that a deny-list reaches, and rewrites its files without them.

Named documents, copies and near duplicates are reached. A release holds no provenance of rewrites, so a document that
was made from a denied one is not found unless its text is equal or it was recognized as a near duplicate; name it in
the deny-list.
"""

from __future__ import annotations

import datetime
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError
from release import merkle
from release.cards.document_tables import is_example_of
from release.facts import message_tables
from release.facts.published_tables import stream_rows
from release.facts.score_facts import TEXT_ITEMS
from release.layout import ATTRIBUTION, ROOTS, SITE, SUMS
from release.repositories import files_below
from release.schema import CARD
from release.tracing.documents import find_documents
from release.tracing.release_data import ReleaseData
from stages.data.curate import deny_list as deny_lists
from stages.data.curate.deny_list import OPT_OUT_RULE, DenyList, match_text

# Columns of the dispositions by which documents are found.
FATES = ["id", "content_hash", "kept_hash", "duplicate_of", "disposition", "rule"]
# A shorter text is looked for as the whole value of a column only: it occurs in others by chance.
MIN_TEXT = 20
# Rows of a table that are in memory at once.
BATCH = 4096
MESSAGES = f"dataset/{message_tables.FOLDER}/"
# The folders of tables that are about documents and do not hold their texts as they are.
BY_ID = (f"dataset/{ATTRIBUTION}/", MESSAGES, "dataset/evaluation/text_items/")
# The end of the names of models' answers about documents, which are pieces of their texts.
ANSWERS = f"/{TEXT_ITEMS}.parquet"
# The metadata at the head of a card.
HEAD = re.compile(r"\A---\r?\n.*?\r?\n---\s*?\n", re.DOTALL)


def deny_list_of(documents: Sequence[str], request: str | None, date: str | None) -> DenyList:
    """Returns the deny-list that a command names.

    Args:
        documents: Files of deny-lists, or ids of documents.
        request: The reference of the request for the ids.
        date: Its date; today by default.

    Raises:
        AtomError: For an id without a reference.
    """
    return DenyList(_deny_list_lines(documents, request, date))


def _deny_list_lines(documents: Sequence[str], request: str | None, date: str | None) -> Iterator[tuple[str, bytes]]:
    for document in documents:
        if Path(document).is_file():
            yield from deny_lists.lines(Path(document))
        elif request is None:
            raise AtomError(
                f"there is no deny-list {document}; if that is the id of a document, give --request with the reference "
                "of the request"
            )
        else:
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            entry = {"request": request, "date": date or today, "id": document}
            yield f"--documents {document}", json.dumps(entry).encode()


@dataclass
class Reached:
    """The documents that a deny-list reaches.

    Attributes:
        kinds: {id: how it was found}.
        requests: {id: SHA-256 of the references of its requests}.
        texts: The texts of the kept documents.
        models: The models that were trained on one.
        checkpoints: The checkpoints that were trained on one.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    requests: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    texts: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    checkpoints: set[str] = field(default_factory=set)

    def add(self, id: str, kind: str, requests: set[str] | tuple[str, ...]) -> bool:
        """Adds a document. Returns True if the document or one of its requests is new."""
        is_new = id not in self.kinds or not set(requests) <= self.requests[id]
        self.kinds.setdefault(id, kind)
        self.requests[id].update(requests)
        return is_new


def find_reached(release: Path, deny_list: DenyList) -> Reached:
    """Returns the kept documents that a deny-list reaches, and the models and checkpoints trained on them."""
    data, reached = ReleaseData.locate(release), Reached()
    _find_named(data, deny_list, reached)
    # A copy may have copies and near duplicates of its own.
    while _find_related(data, reached):
        pass

    # Removed documents lead to kept ones, and have no text in the release.
    kept = {row["id"] for row in _fates(data) if row["disposition"] == "kept" and row["id"] in reached.kinds}
    reached.kinds = {id: kind for id, kind in reached.kinds.items() if id in kept}
    for row in stream_rows(data.kept(), ["id", "text"]):
        if row["id"] in kept and row["text"] is not None:
            reached.texts.add(row["text"])
    for document in find_documents(data, sorted(kept)).values():
        reached.models |= set(document.models)
        reached.checkpoints |= set(document.checkpoints or ())
    return reached


def _fates(data: ReleaseData) -> Iterator[dict[str, str]]:
    return stream_rows(data.dispositions(), FATES)


def _find_named(data: ReleaseData, deny_list: DenyList, reached: Reached) -> None:
    # Dispositions have the hashes and no origins, kept documents the origins.
    for row in _fates(data):
        if denial := deny_list.find(row["id"], "", [row["content_hash"], row["kept_hash"] or ""]):
            reached.add(row["id"], denial.kind, denial.requests)
    for row in stream_rows(data.kept(), ["id", "origin"]):
        if denial := deny_list.find("", row["origin"], ()):
            reached.add(row["id"], denial.kind, denial.requests)


def _find_related(data: ReleaseData, reached: Reached) -> bool:
    """Adds the documents with the text of a reached one, and those that it duplicates. Returns True if one is new."""
    by_hash: dict[str, set[str]] = defaultdict(set)
    for row in _fates(data):
        if row["id"] in reached.kinds:
            for digest in (row["content_hash"], row["kept_hash"]):
                if digest:
                    by_hash[digest] |= reached.requests[row["id"]]
    grew = False
    for row in _fates(data):
        for digest in (row["content_hash"], row["kept_hash"]):
            if digest in by_hash:
                grew |= reached.add(row["id"], "copy", by_hash[digest])
        if row["id"] in reached.kinds and row["duplicate_of"] and row["rule"] != "opt_out":
            kind = "copy" if row["rule"] == "exact_duplicate" else "near_duplicate"
            grew |= reached.add(row["duplicate_of"], kind, reached.requests[row["id"]])
    return grew


def rewrite(release: Path, reached: Reached) -> None:
    """Takes the texts of documents out of every file of a release folder.

    Tables lose the rows that hold a text, logs the lines, cards the text; another file with a text is removed, and the
    page with its search. Dispositions state the removal.
    """
    # The page has samples of documents, and none is made for a retracted release.
    shutil.rmtree(release / SITE, ignore_errors=True)
    for path in files_below(release):
        file = release / path
        # Code holds no documents, and checksums are written again at the end.
        if path.startswith("code/") or path.endswith(SUMS):
            continue
        if path.endswith(".parquet"):
            _rewrite_table(file, path, reached)
        elif path.endswith(".jsonl"):
            _rewrite_lines(file, reached)
        elif path.endswith((".json", ".txt", ".md")):
            _rewrite_text(file, reached)
    if (release / "dataset" / ROOTS).exists():
        # The roots are those of the tables as they are now.
        roots = merkle.roots(release / "dataset")
        atomic_files.write(release / "dataset" / ROOTS, (json.dumps(roots, indent=1, sort_keys=True) + "\n").encode())


def add_notice(card: Path, notice: str) -> None:
    """Puts a notice below the metadata of a card."""
    text = card.read_text("utf-8")
    head = HEAD.match(text)
    place = head.end() if head else 0
    atomic_files.write(card, f"{text[:place]}\n> {notice}\n{text[place:]}".encode())


def _rewrite_table(path: Path, name: str, reached: Reached) -> None:
    """Writes a table again if it holds a document. Its path in the release is `name`."""
    import pyarrow.parquet as pq

    # Dispositions keep their rows, and state the removal; other tables lose rows.
    fates = "dispositions" in name.split("/")
    # Tables about documents do not hold their texts, so rows are found by id there.
    answers = name.endswith(ANSWERS)
    without = _without_ids if answers or name.startswith(BY_ID) else _without
    with pq.ParquetFile(path) as file:
        if not any(_touches(batch, fates, reached, without) for batch in file.iter_batches(BATCH)):
            return
        schema = _with_strings(file.schema_arrow) if fates else file.schema_arrow
        with atomic_files.replacing(path) as draft, pq.ParquetWriter(draft, schema, compression="zstd") as writer:
            for batch in file.iter_batches(BATCH):
                if fates:
                    kept = _decide(batch, reached, schema)
                elif answers:
                    # Scores are computed from all rows.
                    kept = _without_outputs(batch, reached)
                else:
                    kept = batch.filter(without(batch, reached))
                writer.write_batch(kept)


def _touches(batch: Any, fates: bool, reached: Reached, without: Callable[[Any, Reached], Any]) -> bool:
    import pyarrow.compute as pc

    if fates:
        kept = pc.equal(batch.column("disposition"), "kept")
        return bool(pc.any(pc.and_(kept, _has_id(batch, reached))).as_py())
    return bool(pc.any(pc.invert(without(batch, reached))).as_py())


def _has_id(batch: Any, reached: Reached) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.is_in(batch.column("id"), value_set=pa.array(sorted(reached.kinds), batch.column("id").type))


def _without_ids(batch: Any, reached: Reached) -> Any:
    """Returns a mask of the rows that are about another document."""
    import pyarrow.compute as pc

    return pc.invert(_has_id(batch, reached))


def _without_outputs(batch: Any, reached: Reached) -> Any:
    """Returns answers without the pieces of text that were answered about a document."""
    import pyarrow.compute as pc

    outputs = pc.if_else(_has_id(batch, reached), "", batch.column("output"))
    return batch.set_column(batch.schema.get_field_index("output"), "output", outputs)


def _without(batch: Any, reached: Reached) -> Any:
    """Returns a mask of the rows that hold no text of a document."""
    import pyarrow as pa
    import pyarrow.compute as pc

    holds = pa.array([False] * len(batch))
    if {"id", "text"} <= set(batch.schema.names):  # of a source by reference
        holds = pc.and_(_has_id(batch, reached), pc.is_null(batch.column("text")))
    for name, kind in zip(batch.schema.names, batch.schema.types, strict=True):
        if kind not in (pa.string(), pa.large_string()):
            continue
        column = batch.column(name)
        whole = pc.is_in(column, value_set=pa.array(sorted(reached.texts), kind))
        holds = pc.or_(holds, pc.fill_null(whole, False))
        # A text may stand inside of another, such as a rollout or the context of an item.
        for text in sorted(reached.texts):
            if len(text) >= MIN_TEXT:
                holds = pc.or_(holds, pc.fill_null(pc.match_substring(column, text), False))
    return pc.invert(holds)


def _with_strings(schema: Any) -> Any:
    """Returns a schema in which a column without any value is one of strings, since a removal gets values."""
    import pyarrow as pa

    return pa.schema([field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in schema])


def _decide(batch: Any, reached: Reached, schema: Any) -> Any:
    """Returns dispositions in which the documents are removed on request."""
    import pyarrow as pa

    rows = batch.to_pylist()
    for row in rows:
        if row["id"] in reached.kinds and row["disposition"] == "kept":
            # In the form of an opt-out during curation, so that the same checks read it.
            match = match_text(reached.kinds[row["id"]], " ".join(sorted(reached.requests[row["id"]])))
            row |= {"disposition": "removed", "split": None, "kept_hash": None, "rule": OPT_OUT_RULE}
            row |= {"value": 1.0, "threshold": 1.0, "match": match}
    return pa.RecordBatch.from_pylist(rows, schema=schema)


def _rewrite_lines(path: Path, reached: Reached) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    needles = list(_encoded(reached))
    left = [line for line in lines if not any(needle in line for needle in needles)]
    # An unchanged file keeps its link to the release, and so its bytes.
    if len(left) < len(lines):
        atomic_files.write(path, b"".join(left))


def _rewrite_text(path: Path, reached: Reached) -> None:
    content = path.read_bytes()
    needles = [needle for needle in _encoded(reached) if needle in content]
    if path.name == CARD:
        lines = content.decode().splitlines(keepends=True)
        # A card keeps its words: only the example goes, and texts that it quotes elsewhere.
        left = "".join(line for line in lines if not any(is_example_of(line, id) for id in reached.kinds)).encode()
        if left == content and not needles:
            return
        content = left
        for needle in needles:
            content = content.replace(needle, b"[taken back]")
        atomic_files.write(path, content)
    elif needles:
        path.unlink()


def _encoded(reached: Reached) -> Iterator[bytes]:
    """Yields the texts as JSON and plain text have them."""
    for text in sorted(reached.texts):
        if len(text) >= MIN_TEXT:
            yield text.encode()
            yield from (json.dumps(text, ensure_ascii=ascii)[1:-1].encode() for ascii in (True, False))
