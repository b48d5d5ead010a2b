"""The data of phases that sample it: tasks, answers with their rewards, and pairs of answers.

A table of answers has a row group for each step and wave, so the answers of a step are read without the others; those
to a task are found by one column. Token ids, log-probabilities and routes are never read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from release.facts.published_tables import read_json
from release.layout import when
from release.tracing.answers import PairRecord, SampledAnswer, TaskRecord
from release.tracing.release_data import ReleaseData, select_rows
from stages.formats.seeds import seed_label
from stages.formats.table import read_errors, rows_at, stream_part_batches
from stages.rl.rollout.rollouts import PairOrder, hash_fraction

TASKS, ANSWERS, PAIRS = "tasks.jsonl", "rollouts.parquet", "pairs.parquet"
REWARD = "reward"
"""The phase that learns from the pairs of another one."""
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


def log_folder(data: ReleaseData, phase: str) -> Path | None:
    """Returns a folder by whose name `ReleaseData.weight_updates` finds the log of a phase that samples its data.

    None for another phase.
    """
    if phase != REWARD:
        return tables(data).get(phase)
    return data.data / "rl" / REWARD if data.checkpoints() else None


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
    if (order := RewardOrder.locate(data)) is not None:
        last[REWARD] = order.steps
    return last


def step_tasks(data: ReleaseData, phase: str, n: int) -> list[TaskRecord]:
    """Returns the tasks of a step with their answers of this step, and the pairs that the step formed or read.

    Empty if the phase samples nothing in it.
    """
    if phase == REWARD:
        return _reward_step(data, n)
    folder = tables(data).get(phase)
    if folder is None or not (folder / ANSWERS).exists():
        return []
    answers = _answers(data, folder, ("step", "=", n))
    pairs = _pairs(data, folder, ("round", "=", n))
    return _records(data, phase, folder, answers, pairs)


def task_records(data: ReleaseData, task: str) -> list[TaskRecord]:
    """Returns a task in each phase that has one of this id, with all answers to it and all pairs of them."""
    records = []
    for phase, folder in tables(data).items():
        if (row := _task_rows(folder, {task}).get(task)) is not None:
            answers = _answers(data, folder, ("task", "=", task))
            pairs = _pairs(data, folder, ("task", "=", task))
            records.append(_record(data, phase, folder, task, row, answers, pairs))
    return records


class RewardOrder:
    """The pairs that each step of the reward model read, from the settings in its published checkpoints.

    table: of the pairs. steps, per_step, heldout_fraction: settings of the phase.
    """

    def __init__(self, table: Path, steps: int, per_step: int, heldout_fraction: float, seed: int) -> None:
        self.table, self.steps, self.per_step = table, steps, per_step
        self.heldout_fraction, self.seed = heldout_fraction, seed

    @cached_property
    def rows(self) -> list[int]:
        """The numbers of the rows that are not held out. Reads one column of the table."""
        batches = stream_part_batches([self.table], ["question"])
        fractions = (hash_fraction(text) for batch in batches for text in batch["question"].to_pylist())
        return [row for row, fraction in enumerate(fractions) if fraction >= self.heldout_fraction]

    @cached_property
    def order(self) -> PairOrder:
        return PairOrder(len(self.rows), self.per_step, seed_label(REWARD), self.seed)

    @classmethod
    def locate(cls, data: ReleaseData) -> RewardOrder | None:
        """Returns the order of the reward model; None without such a model, or where its settings are missing.

        The settings stand in the whole release only.
        """
        steps = [c for c in data.checkpoints() or () if c.phase == REWARD]
        table = next((f / PAIRS for f in tables(data).values() if (f / PAIRS).exists()), None)
        if not steps or table is None or data.release is None:
            return None
        path = data.release / "checkpoints" / steps[-1].folder / "state.json"
        try:
            config = read_json(path)["config"]
            phase = config["phase"]
            return cls(table, int(phase["steps"]), int(phase["pairs"]), phase["heldout_fraction"], int(config["seed"]))
        except (KeyError, TypeError, ValueError) as error:
            raise AtomError(
                f"{path} does not state how the reward model reads pairs ({error}); verify this copy"
            ) from None

    def of_step(self, n: int) -> list[int]:
        """Returns the numbers of the rows that a step read, in its order."""
        if not 1 <= n <= self.steps or not self.rows:
            return []
        return [self.rows[number] for number in self.order.of_step(n)]

    def steps_of(self, rows: set[int]) -> dict[int, list[int]]:
        """Returns {row: the steps that read it} of some rows of the table."""
        steps: dict[int, list[int]] = {row: [] for row in rows}
        for n in range(1, self.steps + 1) if rows else ():
            for row in self.of_step(n):
                if row in steps:
                    steps[row].append(n)
        return steps


def _reward_step(data: ReleaseData, n: int) -> list[TaskRecord]:
    order = RewardOrder.locate(data)
    if order is None or not (wanted := order.of_step(n)):
        return []
    numbers = sorted(set(wanted))
    rows = dict(zip(numbers, rows_at(order.table, numbers, list(OF_PAIR)), strict=True))
    pairs = [PairRecord(row=number, reward_steps=[n], **rows[number]) for number in dict.fromkeys(wanted)]
    return _records(data, REWARD, order.table.parent, [], pairs)


def _answers(data: ReleaseData, folder: Path, condition: tuple[str, str, object]) -> list[SampledAnswer]:
    path = folder / ANSWERS
    if not path.exists():
        return []
    updates = data.weight_updates(folder)
    # Only phases that call tools have this column.
    with_turns = "turns" in _columns(path)
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


def _pairs(data: ReleaseData, folder: Path, condition: tuple[str, str, object]) -> list[PairRecord]:
    """Returns the pairs of a phase that meet a condition, with the steps of the reward model that read them."""
    path = folder / PAIRS
    if not path.exists():
        return []
    rows = _numbered_rows(path, condition)
    order = RewardOrder.locate(data)
    # The reward model reads the pairs of one table; nothing is known about those of others.
    steps = order.steps_of(set(rows)) if order is not None and order.table == path else None
    return [PairRecord(row=n, reward_steps=None if steps is None else steps[n], **row) for n, row in rows.items()]


def _numbered_rows(path: Path, condition: tuple[str, str, object]) -> dict[int, dict[str, Any]]:
    """Returns {number in the table: row} of the rows whose column equals a value."""
    import pyarrow.compute as pc

    column, _, value = condition
    first, rows = 0, dict[int, dict[str, Any]]()
    for batch in stream_part_batches([path], list(OF_PAIR)):
        here = pc.indices_nonzero(pc.fill_null(pc.equal(batch[column], value), False))
        rows |= {first + n: row for n, row in zip(here.to_pylist(), batch.take(here).to_pylist(), strict=True)}
        first += len(batch)
    return rows


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


def _columns(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    with read_errors(path):
        names: list[str] = pq.read_schema(path).names
    return names
