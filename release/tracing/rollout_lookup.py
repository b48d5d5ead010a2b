"""The data of phases that sample it: tasks, answers with their rewards, and pairs of answers.

A table of answers has a row group for each step and wave, so the answers of a step are read without the others; those
to a task are found by one column. Token ids, log-probabilities and routes are never read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from release.layout import when
from release.tracing.answers import PairRecord, SampledAnswer, TaskRecord
from release.tracing.release_data import ReleaseData, select_rows
from stages.formats.table import column_names, read_errors, stream_part_batches

TASKS, ANSWERS, PAIRS = "tasks.jsonl", "rollouts.parquet", "pairs.parquet"
OF_ANSWER = (
    "step", "wave", "group", "sample", "task", "kind", "level", "text", "finished", "reward", "parts", "verifier",
    "verifier_version", "policy", "seed", "dropped",
)  # fmt: skip
"""Columns of a table of answers in the answer of a trace."""
OF_PAIR = (
    "round", "task", "question", "judge", "judge_version", "chosen", "rejected", "chosen_sample", "rejected_sample",
    "chosen_reward", "rejected_reward", "learnt",
)  # fmt: skip


def tables(data: ReleaseData) -> dict[str, Path]:
    """Returns {phase: the folder of its tables}, in the order of training."""
    folders = {path.name: path for path in sorted(data.data.glob("rl/*")) if path.is_dir()}
    return dict(sorted(folders.items(), key=lambda entry: when(entry[0])))


def last_steps(data: ReleaseData) -> dict[str, int]:
    """Returns {phase: the last step that sampled answers}."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    last = {}
    for phase, folder in tables(data).items():
        if (path := folder / ANSWERS).exists():
            with read_errors(path), pq.ParquetFile(path) as file:
                if groups := file.num_row_groups:
                    # The rows are in the order of their steps, so the last group has the last step.
                    last[phase] = int(pc.max(file.read_row_group(groups - 1, columns=["step"])["step"]).as_py())
    return last


def step_tasks(data: ReleaseData, phase: str, n: int) -> list[TaskRecord]:
    """Returns the tasks of a step with their answers of this step, and the pairs that the step formed.

    Empty if the phase samples nothing in it.
    """
    folder = tables(data).get(phase)
    if folder is None or not (folder / ANSWERS).exists():
        return []
    answers = _answers(data, folder, ("step", "=", n))
    pairs = _pairs(folder, ("round", "=", n))
    return _records(data, phase, folder, answers, pairs)


def task_records(data: ReleaseData, task: str) -> list[TaskRecord]:
    """Returns a task in each phase that has one of this id, with all answers to it and all pairs of them."""
    records = []
    for phase, folder in tables(data).items():
        if (row := _task_rows(folder, {task}).get(task)) is not None:
            answers = _answers(data, folder, ("task", "=", task))
            pairs = _pairs(folder, ("task", "=", task))
            records.append(_record(data, phase, folder, task, row, answers, pairs))
    return records


def _answers(data: ReleaseData, folder: Path, condition: tuple[str, str, object]) -> list[SampledAnswer]:
    path = folder / ANSWERS
    if not path.exists():
        return []
    updates = data.weight_updates(folder)
    # Only phases that call tools have this column.
    with_turns = "turns" in column_names(path)
    answers = []
    for row in select_rows(path, [*OF_ANSWER, *(["turns"] if with_turns else [])], condition):
        turns = row.pop("turns", None)
        calls = [call for turn in turns or () for call in turn["calls"]]
        # A dropped answer is in the table with the reason, and no update used it.
        learnt = _learnt(row["dropped"], updates(row["step"]))
        answers.append(SampledAnswer(**{**row, "parts": _parts(path, row["parts"])}, calls=calls, learnt=learnt))
    return answers


def _learnt(dropped: str, moved: bool | None) -> bool | None:
    """Returns True if an update used an answer; None if that is unknown, because the log of the phase is not here."""
    return False if dropped else moved


def _parts(path: Path, text: str) -> dict[str, float]:
    try:
        parts: dict[str, float] = dict(json.loads(text))
    except (TypeError, ValueError):
        raise AtomError(f"{path} has parts of a reward that are no JSON; verify this copy") from None
    return parts


def _pairs(folder: Path, condition: tuple[str, str, object]) -> list[PairRecord]:
    """Returns the pairs of a phase whose column equals a value, with their numbers in the table."""
    import pyarrow.compute as pc

    path, (column, _, value) = folder / PAIRS, condition
    first, pairs = 0, list[PairRecord]()
    for batch in stream_part_batches([path], list(OF_PAIR)) if path.exists() else ():
        here = pc.indices_nonzero(pc.fill_null(pc.equal(batch[column], value), False))
        rows = zip(here.to_pylist(), batch.take(here).to_pylist(), strict=True)
        pairs += [PairRecord(row=first + number, **row) for number, row in rows]
        first += len(batch)
    return pairs


def _records(
    data: ReleaseData, phase: str, folder: Path, answers: list[SampledAnswer], pairs: list[PairRecord]
) -> list[TaskRecord]:
    """Returns a record for each task of the answers and pairs, in their order."""
    ids = list(dict.fromkeys([*(answer.task for answer in answers), *(pair.task for pair in pairs)]))
    rows = _task_rows(folder, set(ids))
    by_task: dict[str, tuple[list[SampledAnswer], list[PairRecord]]] = {id: ([], []) for id in ids}
    for answer in answers:
        by_task[answer.task][0].append(answer)
    for pair in pairs:
        by_task[pair.task][1].append(pair)
    return [_record(data, phase, folder, id, rows.get(id, {}), *by_task[id]) for id in ids]


def _record(
    data: ReleaseData,
    phase: str,
    folder: Path,
    id: str,
    row: Mapping[str, Any],
    answers: list[SampledAnswer],
    pairs: list[PairRecord],
) -> TaskRecord:
    messages = row.get("responses_create_params", {}).get("input")
    kind, level, verifier = (row.get(name) for name in ("kind", "level", "verifier"))
    return TaskRecord(phase, data.name(folder / TASKS), id, kind, level, verifier, messages, answers, pairs)


def _task_rows(folder: Path, ids: set[str]) -> dict[str, dict[str, Any]]:
    """Returns {id: row} of tasks, line by line."""
    path, rows = folder / TASKS, dict[str, dict[str, Any]]()
    if not ids or not path.exists():
        return rows
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                if row["id"] in ids:
                    rows[row["id"]] = row
            except (ValueError, LookupError, TypeError) as error:
                raise AtomError(f"{path} has a line that is no task ({error}); verify this copy") from None
    return rows
