"""The documents of a step, and the fate of a document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.parts import part_number
from release.layout import kept_beside, kept_files, order_of, trained_by, when
from release.tracing import release_data, rollout_lookup
from release.tracing.answers import Document, Fate, Place, Segment, Step, TaskRecord, TaskUse, Use
from release.tracing.release_data import OrderPart, Places, ReleaseData, Rows, select_rows
from stages.formats.table import order_files, read_jsonl, stream_part_batches
from stages.tasks import question

PLACE = tuple(field.name for field in fields(Place))
FATE = tuple(field.name for field in fields(Fate) if field.name not in ("table", "origin"))
"""Columns of an order and of dispositions in the answers."""
USER_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)


def trace_step(folder: Path, phase: str | None, n: int) -> Step:
    """Returns the documents, tasks, answers and pairs of an optimizer step.

    Only a step that sampled or read tasks, answers and pairs has them.

    Args:
        folder: A release or its data repository.
        phase: The phase; None if only one has such a step.
        n: The number of the step, from 1.

    Raises:
        AtomError: The step or the phase is unknown, or several phases have the step and none is named.
    """
    data = ReleaseData.locate(folder)
    orders, sampling = data.orders(), rollout_lookup.last_steps(data)
    phases = sorted({*orders, *sampling}, key=when)
    if phase is not None and phase not in phases:
        raise AtomError(f"{folder} has no order and no answers of phase {phase}; it has {', '.join(phases)}")
    matches: dict[str, tuple[Path | None, Rows, list[TaskRecord]]] = {}
    for name in phases if phase is None else [phase]:
        order, rows = None, list[Any]()
        for part in orders.get(name, ()):
            if part.first <= n <= part.last:
                columns = [*PLACE, "source", "part", "id"]
                order, rows = part.folder, _order_rows(part.folder, columns, ("step", "=", n))
        tasks = rollout_lookup.step_tasks(data, name, n) if n <= sampling.get(name, 0) else []
        if rows or tasks:
            matches[name] = order, rows, tasks
    if not matches:
        last_steps = {name: _last_step(parts[-1]) for name, parts in orders.items()}
        ends = [f"{name} ends with step {max(sampling.get(name, 0), last_steps.get(name, 0))}" for name in phases]
        raise AtomError(f"{folder} has no step {n}{' of ' + phase if phase else ''}; {', '.join(ends)}")
    if len(matches) > 1:
        raise AtomError(f"{', '.join(matches)} each have a step {n}; name the phase")
    [(name, (order, rows, tasks))] = matches.items()
    documents = {(row["source"], row.pop("part"), row["id"]) for row in rows}
    origins = _licenses_and_origins(data, documents, order) if order else {}
    # A packed row holds parts of several documents.
    segments = []
    for row in rows:
        license, origin = origins.get(row["id"], (None, None))
        segments.append(Segment(**row, license=license, origin=origin))
    place = rollout_lookup.tables(data).get(name) or order
    assert place is not None, "the phase has an order, or samples its data"
    moved = data.weight_updates(place)(n)
    return Step(name, n, None if order is None else data.name(order), moved, segments, tasks, data.unknown())


def trace_document(folder: Path, doc_id: str) -> Document:
    """Returns the fate of a document of a release or its data repository, or the use of a task.

    Raises AtomError for an unknown document.
    """
    data = ReleaseData.locate(folder)
    documents, tasks = find_documents(data, [doc_id]), rollout_lookup.task_records(data, doc_id)
    if tasks:
        return replace(documents[doc_id], tasks=tasks) if doc_id in documents else _task(data, doc_id, tasks)
    if doc_id not in documents:
        raise AtomError(f"{folder} has no document {doc_id}, and no task; look for its id in the dispositions")
    return documents[doc_id]


def _task(data: ReleaseData, id: str, tasks: list[TaskRecord]) -> Document:
    """Returns a task that is no document.

    Checkpoints and models are those after the first answer that was learnt from.
    """
    steps = [(when(task.phase), answer.step) for task in tasks for answer in task.answers if answer.learnt is not False]
    checkpoints, models = _trained_on(data, min(steps, default=None))
    uses, unknown = [use for _, use in _task_uses(data, {id: []})], data.unknown(checkpoints=True)
    if any(task.pairs for task in tasks):
        unknown.append("which steps of a reward model read its pairs")
    return Document(id, [], [], uses, tasks, checkpoints, models, unknown)


def _trained_on(data: ReleaseData, first_use: tuple[Any, int] | None) -> tuple[list[str] | None, list[str]]:
    """Returns the folders of checkpoints and the names of models that were trained with or after a step of a phase.

    The folders are None if they are not available.
    """
    checkpoints = data.checkpoints()
    folders = [c.folder for c in checkpoints or () if first_use and (when(order_of(c.phase)), c.step) >= first_use]
    models = [name for name in data.models() if first_use and when(trained_by(name)) >= first_use[0]]
    return None if checkpoints is None else folders, models


def find_documents(data: ReleaseData, ids: Sequence[str]) -> dict[str, Document]:
    """Returns {id: document} of those in a table of dispositions."""
    # A document may be in this run's tables and in those of earlier runs.
    fates: dict[str, list[Fate]] = {}
    for path in data.dispositions():
        for row in select_rows(path, ["id", *FATE], ("id", "in", list(ids))):
            id, origin = row.pop("id"), None
            if row["disposition"] == "kept":
                origins = select_rows(kept_beside(path), ["origin"], ("id", "=", id))
                origin = origins[0]["origin"] if origins else None
            fates.setdefault(id, []).append(Fate(table=data.name(path), **row, origin=origin))
    uses, tasks = find_uses(data, fates, _training_places(data, fates)), _find_tasks(data, fates)
    unknown, documents = data.unknown(checkpoints=True), {}
    for id, document_fates in fates.items():
        # A use counts unless the log says that it moved no weights; without the log it may have.
        moving_uses = [(when(use.phase), use.step) for use in uses.get(id, []) if use.moved is not False]
        checkpoints, models = _trained_on(data, min(moving_uses, default=None))
        documents[id] = Document(
            id=id,
            fates=document_fates,
            uses=uses.get(id, []),
            asked=tasks.get(id, []),
            tasks=[],
            checkpoints=checkpoints,
            models=models,
            unknown=unknown,
        )
    return documents


def find_uses(data: ReleaseData, ids: Iterable[str], places: Places | None = None) -> dict[str, list[Use]]:
    """Returns {id: the steps that read the document, by order of training}.

    Args:
        data: The data of a release.
        ids: The documents.
        places: The places of all the training documents among them, if known. Where an order is a function, only the
            rows are read that it gives for them.
    """
    sorted_ids, uses_by_id = sorted(ids), dict[str, dict[tuple[str, int], Use]]()
    for phase, parts in data.orders().items() if sorted_ids else ():
        for part in parts:
            moves_weights = data.weight_updates(part.folder)
            for row in _rows_with(data, part, sorted_ids, places):
                n = row["step"]
                use = Use(phase, n, data.name(part.folder), moves_weights(n), [])
                use = uses_by_id.setdefault(row["id"], {}).setdefault((phase, n), use)
                use.rows.append(Place(**{name: row[name] for name in PLACE}))
    return {id: list(uses.values()) for id, uses in uses_by_id.items()}


def _rows_with(data: ReleaseData, part: OrderPart, ids: Sequence[str], places: Places | None) -> Iterator[Any]:
    """Yields the rows of an order, as far as it was followed, that read one of the documents."""
    steps_by_file = None
    # Orders of earlier runs may have been computed from other tables than those of this run.
    if places is not None and part.folder.parent == data.data / "order":
        steps_by_file = release_data.steps_by_file(data.data, part.folder, places)
    if steps_by_file is None:
        searches = [(order_files(part.folder), part.first, part.last)]
    else:
        searches = [([file], max(part.first, steps.start), steps[-1]) for file, steps in steps_by_file.items()]
    for files, first, last in searches:
        # A part that was followed to its end has no last step.
        conditions = [("step", ">=", first), *([("step", "<=", int(last))] if last != float("inf") else [])]
        yield from select_rows(files, ["step", "id", *PLACE], ("id", "in", ids), *conditions)


def _training_places(data: ReleaseData, fates: Mapping[str, Sequence[Fate]]) -> Places:
    """Returns the places of the training documents of this run."""
    tables = [(id, fate, data.data / fate.table) for id in fates for fate in fates[id] if fate.split == "train"]
    return {
        id: (fate.source, number)
        for id, fate, table in tables
        if table.parents[2] == data.data and (number := part_number(table)) is not None
    }


def kept_rows(data: ReleaseData, id: str, fates: Iterable[Fate]) -> Rows:
    """Returns [{id, text, content_hash}] of a document in the tables of kept text."""
    rows: Rows = []
    for fate in fates:
        if fate.kept:
            path = kept_beside(data.data / fate.table)
            rows += select_rows(path, ["id", "text", "content_hash"], ("id", "=", id))
    return rows


def _order_rows(order: Path, columns: Sequence[str], *filters: tuple[str, str, object]) -> Rows:
    return select_rows(order_files(order), columns, *filters)


def _last_step(part: OrderPart) -> int:
    import pyarrow.compute as pc

    batches = stream_part_batches(order_files(part.folder)[-1:], ["step"])
    return max(int(pc.max(batch["step"]).as_py()) for batch in batches)


def _licenses_and_origins(
    data: ReleaseData, documents: set[tuple[str, int, str]], order: Path
) -> dict[str, tuple[str, str]]:
    """Returns {id: (license, origin)} of kept documents, (source, part, id).

    Of an order of an earlier run, that run's tables take precedence.
    """
    ids_of_part: dict[tuple[str, int], list[str]] = {}
    for source, part, id in sorted(documents):
        ids_of_part.setdefault((source, part), []).append(id)
    origins: dict[str, tuple[str, str]] = {}
    # What a later folder has replaces what an earlier one gave.
    folders = data.folders() if order.parent.name == "earlier" else data.folders()[::-1]
    for folder in folders:
        files = kept_files(folder)
        for (source, part), ids in ids_of_part.items():
            file = files.get(source, [])[part : part + 1]
            for row in select_rows(file, ["id", "license", "origin"], ("id", "in", ids)):
                origins[row["id"]] = row["license"], row["origin"]
    return origins


def _find_tasks(data: ReleaseData, fates: dict[str, list[Fate]]) -> dict[str, list[TaskUse]]:
    """Returns {id: tasks of reinforcement learning with its id or its question, by order of training}."""
    uses_by_id: dict[str, list[TaskUse]] = {}
    for id, use in _task_uses(data, fates):
        uses_by_id.setdefault(id, []).append(use)
    return uses_by_id


def _task_uses(data: ReleaseData, fates: dict[str, list[Fate]]) -> Iterator[tuple[str, TaskUse]]:
    tables = sorted(data.data.glob("rl/*/tasks.jsonl"), key=lambda path: when(path.parent.name))
    if not tables:
        return
    # A task made from a document need not have its id, so it is also found by its question.
    questions = {
        (id, text)
        for id, document_fates in fates.items()
        for row in kept_rows(data, id, document_fates)
        for text in USER_TURN.findall(row["text"])
    }
    ids_by_question: dict[str, set[str]] = {id: {id} for id in fates}
    for id, text in sorted(questions):
        ids_by_question.setdefault(text, set()).add(id)
    for table in tables:
        tasks: dict[str, list[str]] = {}
        for row in read_jsonl(table):
            for id in sorted(ids_by_question.get(row["id"], set()) | ids_by_question.get(question(row), set())):
                tasks.setdefault(id, []).append(row["id"])
        for id, task_ids in tasks.items():
            answers: Rows = []
            if (rollouts := table.with_name("rollouts.parquet")).exists():
                answers = select_rows(rollouts, ["step", "dropped"], ("task", "in", task_ids))
            yield (
                id,
                TaskUse(
                    phase=table.parent.name,
                    table=data.name(table),
                    tasks=task_ids,
                    steps=sorted({row["step"] for row in answers}),
                    answers=len(answers),
                    learnt=sum(row["dropped"] == "" for row in answers),
                ),
            )
