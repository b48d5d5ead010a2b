"""What a release tells of its data: the documents of a step, the fate of a document, where a text stands, and what a
request for removal reaches.

All is read from the release's own files. Of a pulled data repository alone the same is asked; what only the whole
release can tell then stands in the answer's `unknown`, and its field is null.
"""

from __future__ import annotations

import difflib
import functools
import json
import operator
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from release import schema
from release.assembly import training
from release.assembly.data_facts import earlier_orders
from release.assembly.published_tables import read_json
from release.audit import merkle
from release.audit.text_index import ABOUT, Progress, candidates, has_trigrams, hits, index_of
from release.audit.trace_report import Document, Match, Related, Removal, Rows, Step, Text, Use
from release.checksums import read_sums
from release.layout import EXPORTED, SUMS, numbered, when
from release.repositories import files_below, repositories
from stages.data.table import read_jsonl, read_table
from stages.rl.protocols import question

NEAR = 20_000
"""Ids among which the nearest to an unknown one is sought."""
PLACE = ("row", "segment", "offset", "length")
FATE = (
    "source", "license", "disposition", "split", "rule", "value", "threshold", "duplicate_of", "match", "bytes",
    "content_hash", "kept_hash",
)  # fmt: skip
USER_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)


@dataclass(frozen=True)
class _Location:
    """A release folder (None for a pulled data repository) and its data."""

    release: Path | None
    data: Path

    @classmethod
    def locate(cls, release: Path) -> _Location:
        for release_folder, data in ((release, release / "dataset"), (None, release)):
            if (data / "dispositions.parquet").exists():
                return cls(release_folder, data)
        raise AtomError(
            f"{release} is neither a release nor its data repository: it has no dispositions.parquet; give the folder "
            "that `atom build` made, or a pulled data repository"
        )

    def name(self, path: Path) -> str:
        return path.relative_to(self.data).as_posix()

    def tables(self, pattern: str) -> list[Path]:
        """Files of the data, the release's own before those of earlier runs."""
        return sorted(self.data.glob(pattern)) + sorted(self.data.glob(f"earlier/*/{pattern}"))

    def orders(self) -> dict[str, list[tuple[Path, int, float]]]:
        """By phase, in the order of training: (folder, first step, last step) of each order that it followed."""
        orders_by_phase = {}
        final_orders = {schema.phase(p.parent): p.parent for p in self.data.glob("order/*/order.parquet")}
        for phase in sorted(final_orders, key=when):
            folders = [*earlier_orders(self.data, phase), final_orders[phase]]
            first_steps = [int(read_json(folder / "meta.json").get("first_step", 1)) for folder in folders]
            orders_by_phase[phase] = list(
                zip(folders, first_steps, [*(n - 1 for n in first_steps[1:]), float("inf")], strict=True)
            )
        return orders_by_phase

    def moved(self, phase: str, folder: Path) -> Callable[[int], bool | None]:
        """Whether a step moved the weights, of an order that the phase followed."""
        log = self.release and self.release / f"evidence/training/{folder.name}/training.jsonl"
        if not log or not log.exists() or folder.parent.name != "order":
            return lambda step: None
        steps = {line["step"] for line in training.read(log) if "loss" in line and not line.get("skipped")}
        return lambda step: step in steps

    def checkpoints(self) -> list[tuple[str, int, str]] | None:
        """(phase, step, folder) of each, by order of training."""
        if self.release is None or not (self.release / "checkpoints").is_dir():
            return None
        names = [path.parent.name for path in self.release.glob("checkpoints/*/state.json")]
        parts = [(*name.rpartition("-step-")[::2], name) for name in names]
        phase_name = schema.reader(self.release).phase
        return sorted(((phase_name(p), int(n), name) for p, n, name in parts), key=lambda row: (when(row[0]), row[1]))

    def models(self) -> list[str]:
        names = (schema.model(path.parent) for path in self.data.glob("evaluation/*/scores.json"))
        return sorted((name for name in names if numbered(name)[0] in EXPORTED), key=when)

    def unknown(self, checkpoints: bool = False) -> list[str]:
        """What cannot be told here of steps and, if asked, of checkpoints."""
        sentences = []
        if checkpoints and self.checkpoints() is None:
            sentences.append("which checkpoints include a step: they stand in the whole release only")
        if self.release is None or not (self.release / "evidence/training").is_dir():
            sentences.append("which steps moved no weight: the logs of training stand in the whole release only")
        elif any(self.data.glob("earlier/order-*")):
            sentences.append("which steps of earlier runs moved no weight: their logs are not published")
        return sentences


def step(release: Path, phase: str | None, n: int) -> Step:
    """The documents of optimizer step `n` (from 1). Raises AtomError for a step or a phase that there is not, and if
    several phases have the step and none is named."""
    location = _Location.locate(release)
    orders = location.orders()
    if phase is not None and phase not in orders:
        raise AtomError(f"{release} has no order of a phase {phase}; it has those of {', '.join(orders)}")
    matches: dict[str, tuple[Path, Rows]] = {}
    for name in orders if phase is None else [phase]:
        for folder, first, last in orders[name]:
            columns = [*PLACE, "source", "id"]
            if first <= n <= last and (rows := _select(folder / "order.parquet", columns, ("step", "=", n))):
                matches[name] = folder, rows
    if not matches:
        ends = [f"{name} ends with step {_last_step(parts[-1][0])}" for name, parts in orders.items()]
        raise AtomError(f"{release} has no order of a step {n}{' of ' + phase if phase else ''}; {', '.join(ends)}")
    if len(matches) > 1:
        raise AtomError(f"{', '.join(matches)} each have a step {n}; name the phase")
    [(name, (folder, rows))] = matches.items()
    origins = _licenses_and_origins(location, {(row["source"], row["id"]) for row in rows}, folder)
    segments = [{**row, **origins.get(row["id"], {"license": None, "origin": None})} for row in rows]
    return Step(name, n, location.name(folder), location.moved(name, folder)(n), segments, location.unknown())


def document(release: Path, doc_id: str) -> Document:
    """Everything about one document. Raises AtomError for an unknown one, with the nearest id that there is."""
    location = _Location.locate(release)
    documents = _documents(location, [doc_id])
    if doc_id not in documents:
        nearest = _nearest(location, doc_id)
        raise AtomError(f"{release} knows no document {doc_id}" + (f"; did you mean {nearest}?" if nearest else
                        "; look for its id in dataset/dispositions.parquet"))  # fmt: skip
    return documents[doc_id]


def text(release: Path, span: str, cache: Path, progress: Progress = lambda text: None) -> Text:
    """Every kept document that holds the span exactly, with the steps that read it. Steps are found by id: where an
    earlier run had another text under the same id, its steps read that one.

    cache: folder of the index, which `atom build` makes, else the first question, and is named by the checksums of the
    kept files in `SHA256SUMS`; whether these are the files that stand here is the question of `atom verify`. A span of
    less than three characters is sought in every text. Raises AtomError for an empty span, or a damaged index.
    """
    location = _Location.locate(release)
    try:
        span.encode()
    except UnicodeEncodeError:
        raise AtomError("the span is no Unicode text, which all documents are; give it in UTF-8") from None
    if not span:
        raise AtomError("the span is empty; give at least one character of the text")
    files, _ = _kept_texts(location)
    rows_to_search: Mapping[str, Sequence[int] | None] = dict.fromkeys(files)
    index_file = index(release, cache, progress) if len(span) >= 3 else None
    if index_file is not None:
        rows_to_search = candidates(index_file, span)
    matches: dict[tuple[str, str], Match] = {}
    for name, rows in rows_to_search.items():
        for row in hits(files[name], span, rows):
            match = Match(**{key: row[key] for key in ABOUT}, count=row["text"].count(span))
            matches.setdefault((match.id, match.content_hash), match).tables.append(name)
    uses = _uses(location, {match.id for match in matches.values()})
    for match in matches.values():
        match.uses.extend(uses.get(match.id, []))
    return Text(span, "index" if index_file else "scan", list(matches.values()), location.unknown())


def index(release: Path, cache: Path, progress: Progress = lambda text: None) -> Path | None:
    """The index of the kept texts, made if it is not in the cache; None if this Python's SQLite can make none."""
    return index_of(*_kept_texts(_Location.locate(release)), cache, progress) if has_trigrams() else None


def removal_report(release: Path, doc_id: str, progress: Progress = lambda text: None) -> Removal:
    """What removing a document would have to reach. Reads every table of the release. Raises what `document` raises."""
    location, subject = _Location.locate(release), document(release, doc_id)
    relations = _relations(location, subject)
    related_documents = _documents(location, sorted(relations))
    order = sorted(related_documents, key=lambda other: (relations[other], other))
    related = [Related(relations[other], related_documents[other]) for other in order]
    unknown = list(subject.unknown)
    if location.release is None:
        unknown.append("which other repositories of the release name it: only the data is here")
    in_release = subject.fates[0]["table"] == "dispositions.parquet"
    if not in_release:
        unknown.append("a proof: the document is of an earlier run, and roots are over this release's own tables")
    kept_texts, hashes = _texts(location, [subject, *related_documents.values()]), _hashes(subject)
    files = _files_that_mention(
        location, doc_id, {row["text"] for row in kept_texts if row["content_hash"] in hashes}, progress
    )
    return Removal(subject, related, files, merkle.prove(location.data, doc_id) if in_release else {}, unknown)


def _select(path: Path, columns: Sequence[str], *filters: tuple[str, str, Any]) -> Rows:
    # a set of nothing has no type for Arrow
    if any(comparison == "in" and not values for _, comparison, values in filters):
        return []
    stored = schema.columns(path, [*columns, *(name for name, _, _ in filters)])
    table = read_table(
        path, [stored[name] for name in columns], [(stored[n], comparison, value) for n, comparison, value in filters]
    )
    rows: Rows = table.rename_columns([*columns]).to_pylist()
    return rows


def _last_step(order: Path) -> int:
    import pyarrow.compute as pc

    return int(pc.max(read_table(order / "order.parquet", ["step"])["step"]).as_py())


def _licenses_and_origins(
    location: _Location, sources_and_ids: set[tuple[str, str]], order: Path
) -> dict[str, dict[str, Any]]:
    """{id: its license and origin} of (source, id); of an order of an earlier run, that run's tables count first."""
    origins: dict[str, dict[str, Any]] = {}
    for source in sorted({source for source, _ in sources_and_ids}):
        ids = [id for document_source, id in sorted(sources_and_ids) if document_source == source]
        paths = location.tables(f"kept/{source}.parquet")
        for path in paths if order.parent.name == "earlier" else reversed(paths):
            for row in _select(path, ["id", "license", "origin"], ("id", "in", ids)):
                origins[row["id"]] = {"license": row["license"], "origin": row["origin"]}
    return origins


def _uses(location: _Location, ids: Iterable[str]) -> dict[str, list[Use]]:
    """{id: the steps that read it, by order of training}"""
    sorted_ids, uses_by_id = sorted(ids), dict[str, dict[tuple[str, int], Use]]()
    for phase, parts in location.orders().items() if sorted_ids else ():
        for folder, first, last in parts:
            moves_weights = location.moved(phase, folder)
            step_range = [("step", ">=", first), *([("step", "<=", int(last))] if last != float("inf") else [])]
            for row in _select(folder / "order.parquet", ["step", "id", *PLACE], ("id", "in", sorted_ids), *step_range):
                n = row["step"]
                use = uses_by_id.setdefault(row["id"], {}).setdefault(
                    (phase, n), Use(phase, n, location.name(folder), moves_weights(n), [])
                )
                use.rows.append({name: row[name] for name in PLACE})
    return {id: list(uses.values()) for id, uses in uses_by_id.items()}


def _documents(location: _Location, ids: list[str]) -> dict[str, Document]:
    """{id: what is known of it}, of those that any table of dispositions has."""
    fates: dict[str, Rows] = {}
    for path in location.tables("dispositions.parquet"):
        for row in _select(path, ["id", *FATE], ("id", "in", ids)):
            fate = {"table": location.name(path), **{name: row[name] for name in FATE}, "origin": None}
            if fate["disposition"] == "kept":
                kept_table = path.parent / "kept" / f"{fate['source']}.parquet"
                fate["origin"] = next(
                    (r["origin"] for r in _select(kept_table, ["origin"], ("id", "=", row["id"]))), None
                )
            fates.setdefault(row["id"], []).append(fate)
    uses, checkpoints, unknown = _uses(location, fates), location.checkpoints(), location.unknown(checkpoints=True)
    documents = {}
    for id, document_fates in fates.items():
        first_use = min(
            ((when(use.phase), use.step) for use in uses.get(id, []) if use.moved is not False), default=None
        )
        reached_checkpoints = None
        if checkpoints is not None:
            reached_checkpoints = [
                folder for phase, n, folder in checkpoints if first_use and (when(phase), n) >= first_use
            ]
        models = [name for name in location.models() if first_use and when(_trained_by(name)) >= first_use[0]]
        documents[id] = Document(id, document_fates, uses.get(id, []), [], reached_checkpoints, models, unknown)
    for id, task_entry in _task_entries(location, list(documents.values())):
        documents[id].asked.append(task_entry)
    return documents


def _trained_by(model: str) -> str:
    """The phase that a model was exported after: midtrain of `mid`, longcontext-2 of `long-2`, else of its own name."""
    kind, number = numbered(model)
    phase = {"base": "pretrain", "mid": "midtrain", "long": "longcontext"}.get(kind, kind)
    return f"{phase}-{number}" if number else phase


def _texts(location: _Location, documents: Sequence[Document]) -> Rows:
    """[{id, text, content_hash}] of those that were kept, in all tables."""
    rows: Rows = []
    for document in documents:
        for fate in document.fates:
            if fate["disposition"] == "kept":
                path = (location.data / fate["table"]).parent / "kept" / f"{fate['source']}.parquet"
                rows += _select(path, ["id", "text", "content_hash"], ("id", "=", document.id))
    return rows


def _task_entries(location: _Location, documents: Sequence[Document]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, its entry of `asked`) of documents whose id or question a task of reinforcement learning has."""
    tables = sorted(location.data.glob("rl/*/tasks.jsonl"), key=lambda path: when(schema.phase(path.parent)))
    if not tables:
        return
    asks = {
        (row["id"], question_text)
        for row in _texts(location, documents)
        for question_text in USER_TURN.findall(row["text"])
    }
    asks_of: dict[str, set[str]] = {document.id: {document.id} for document in documents}
    for id, question_text in sorted(asks):
        asks_of.setdefault(question_text, set()).add(id)
    for table in tables:
        tasks: dict[str, list[str]] = {}
        for row in read_jsonl(table):
            for id in sorted(asks_of.get(row["id"], set()) | asks_of.get(question(row), set())):
                tasks.setdefault(id, []).append(row["id"])
        for id, task_ids in tasks.items():
            answers: Rows = []
            if (drawn := table.with_name("rollouts.parquet")).exists():
                answers = _select(drawn, ["step", "dropped"], ("task", "in", task_ids))
            yield id, {"phase": schema.phase(table.parent), "table": location.name(table), "tasks": task_ids,
                       "steps": sorted({row["step"] for row in answers}), "answers": len(answers),
                       "learnt": sum(row["dropped"] == "" for row in answers)}  # fmt: skip


def _nearest(location: _Location, doc_id: str) -> str | None:
    ids = sorted(
        {id for path in location.tables("dispositions.parquet") for id in read_table(path, ["id"])["id"].to_pylist()}
    )
    position = bisect(ids, doc_id)
    close = difflib.get_close_matches(doc_id, ids[max(position - NEAR // 2, 0) : position + NEAR // 2], 1, 0.8)
    return close[0] if close else None


def _relations(location: _Location, document: Document) -> dict[str, str]:
    """{other document: how it is related}, along duplicates as far as they lead."""
    relations: dict[str, str] = {document.id: ""}
    paths = location.tables("dispositions.parquet")
    for relation, column, match_column in (
        ("it stands for this one", "duplicate_of", "id"),
        ("this one stands for it", "id", "duplicate_of"),
    ):
        frontier = {document.id}
        while frontier:
            rows = [
                row
                for path in paths
                for row in _select(path, ["id", "duplicate_of"], (match_column, "in", sorted(frontier)))
            ]
            frontier = {row[column] for row in rows if row[column]} - relations.keys()
            relations |= dict.fromkeys(sorted(frontier), relation)
    hashes = sorted(_hashes(document))
    for path in paths:
        for name in ("content_hash", "kept_hash"):
            duplicates = _select(path, ["id"], (name, "in", hashes))
            relations = dict.fromkeys((row["id"] for row in duplicates), "it has the same text") | relations
    del relations[document.id]
    return relations


def _hashes(document: Document) -> set[str]:
    """Of its text as acquired and as kept."""
    return {fate[name] for fate in document.fates for name in ("content_hash", "kept_hash") if fate[name]}


def _files_that_mention(location: _Location, doc_id: str, texts: set[str], progress: Progress) -> Rows:
    """The files of a release, or of its data, that have the id or hold a text, in a column or a JSON string."""
    folder, files = location.release or location.data, []
    names: dict[str, str] = {}
    if location.release and (location.release / "checkpoints").is_dir():
        release_info = schema.read_release(location.release)
        names = {
            r.folder: r.id(release_info["namespace"], release_info["name"]) for r in repositories(location.release)
        }
    for path in files_below(folder):
        if path.endswith(".parquet"):
            progress(f"searching {path}")
            counts = _count(folder / path, doc_id, texts)
        elif path.endswith((".json", ".jsonl")) and not path.startswith("code/"):
            data = (folder / path).read_bytes()
            ids = {_json_bytes(doc_id, ascii) for ascii in (True, False)}
            inner = {_json_bytes(text, ascii)[1:-1] for text in texts for ascii in (True, False)}
            counts = [int(any(part in data for part in parts)) for parts in (ids, inner)]
        else:
            continue
        if any(counts):
            part = path.split("/")[0]
            row = {"repository": names.get(part, names.get("")), "path": path}
            files.append(row | {"by_id": counts[0], "by_text": counts[1]})
    return files


def _json_bytes(text: str, ascii: bool) -> bytes:
    return json.dumps(text, ensure_ascii=ascii).encode()


def _count(path: Path, doc_id: str, texts: set[str]) -> list[int]:
    """Rows of a table of which a column of strings is the id, and of which one holds a text."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    try:
        table = ds.dataset(path, format="parquet")
        columns = [pc.field(f.name) for f in table.schema if f.type in (pa.string(), pa.large_string())]
        by_id = [column == doc_id for column in columns]
        by_text = [pc.match_substring(column, text) for column in columns for text in sorted(texts)]
        return [table.count_rows(filter=functools.reduce(operator.or_, f)) if f else 0 for f in (by_id, by_text)]
    except (pa.ArrowException, OSError) as error:
        raise AtomError(f"{path} cannot be read as Parquet ({error}); pull it again") from None


def _kept_texts(location: _Location) -> tuple[dict[str, Path], dict[str, str]]:
    """{table: its file} with kept text, and {table: SHA-256} as the checksum file lists them."""
    checksums = read_sums(location.data / SUMS, str(location.data / SUMS))
    sums = {name: sum for name, sum in checksums.items() if re.fullmatch(r"(earlier/[^/]+/)?kept/[^/]+\.parquet", name)}
    files = {location.name(path): path for path in location.tables("kept/*.parquet")}
    if mismatched := sorted(files.keys() ^ sums.keys()):
        raise AtomError(
            f"{location.data / mismatched[0]} is missing or not listed in {SUMS} beside it; pull the data again"
        )
    return files, sums
