"""Finds the log of a stage: that of one of its processes, with all starts of its latest job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.core.errors import AtomError
from pipeline.core.store import Store
from pipeline.graph.run import Run

FIRST = "_0_log.out"
"""The suffix of the name of rank 0's log, after the id of the job."""


def find_log(store: Store, candidates: Sequence[Run], stage: str, rank: int) -> tuple[Run, Path]:
    """(the first of the runs that has a log of the stage, the file). Raises AtomError if there is none."""
    for run in candidates:
        if logs := _logs(run, stage):
            return run, _log_of_rank(run, stage, logs[-1], rank)
    names = sorted({node["name"] for run in candidates for node in run.body["nodes"]})
    hint = f"; stages: {', '.join(names)}" if names and stage not in names else ""
    raise AtomError(f"there is no log of stage {stage} under {store.logs}{hint or '; it never ran there'}")


def submitted_run(candidates: Sequence[Run], stage: str) -> Run | None:
    """The run that submitted the job of a stage in the first run that has it, perhaps an earlier one. None if there
    is no such job."""
    rows = [(run, run.jobs().get(stage)) for run in candidates if any(n["name"] == stage for n in run.body["nodes"])]
    if not rows or rows[0][1] is None:
        return None
    job = rows[0][1]["job"]
    return next((run for run, row in rows if row is not None and row["job"] == job and not row["attached"]), None)


def has_log(run: Run, stage: str, rank: int) -> bool:
    return any(_name_of_rank(log, rank).exists() for log in _logs(run, stage))


def _logs(run: Run, stage: str) -> list[Path]:
    """Rank 0's logs of a stage, the latest last."""
    return sorted((run.folder / stage / "submitit").glob(f"*{FIRST}"), key=lambda path: path.stat().st_mtime)


def _log_of_rank(run: Run, stage: str, first: Path, rank: int) -> Path:
    path = _name_of_rank(first, rank)
    if not path.exists():
        number = len(list(path.parent.glob(first.name.replace(FIRST, "_*_log.out"))))
        ranks = "one rank, 0" if number == 1 else f"ranks 0 to {number - 1}"
        raise AtomError(f"stage {stage} has no rank {rank} in run {run.id}; its latest attempt ran as {ranks}")
    return path


def _name_of_rank(first: Path, rank: int) -> Path:
    return first.with_name(first.name.replace(FIRST, f"_{rank}_log.out"))
