"""Seconds in which the ranks of a training phase seal and verify a checkpoint, and the limit of the phase's watchdog.

A watchdog ends an attempt in which no rank makes progress for so many seconds. While checkpoints are written or hashed,
progress is reported after every piece of work. So the limit need not be longer than a seal: it must be longer than the
largest piece takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.core.errors import RecipeError
from pipeline.graph.plan import StagePlan

SEAL_RATE = 0.4e9
"""Bytes/s at which a rank reads, hashes and writes its share of a release checkpoint, with one thread. Measured by
bench/seal.py."""
HASH_RATE = 1.2e9
"""Bytes/s at which one thread hashes a file. Measured by bench/seal.py."""
GB = 10**9


@dataclass(frozen=True)
class CheckpointTimes:
    """Seconds for one release checkpoint of a phase.

    Attributes:
        seal: For all ranks to write it.
        verify: For all ranks to hash it.
        silent: At most, from one report of progress to the next.
        watchdog: Without progress after which the phase's watchdog ends an attempt.
    """

    seal: float
    verify: float
    silent: float
    watchdog: float


def checkpoint_times(row: StagePlan, storage_gb_s: float | None) -> CheckpointTimes | None:
    """The times of a phase; None for a stage that does not train.

    storage_gb_s: GB/s that the storage reads and writes for all ranks together; None: as much as they ask for.
    """
    training = row.estimate.training
    if training is None:
        return None
    storage = math.inf if storage_gb_s is None else storage_gb_s * GB
    return CheckpointTimes(
        seal=max(training.share_bytes / SEAL_RATE, 2 * training.checkpoint_bytes / storage),  # read, and written
        verify=max(training.share_bytes / HASH_RATE, training.checkpoint_bytes / storage),
        silent=max(training.silent_bytes / SEAL_RATE, row.ranks * training.silent_bytes / storage),
        watchdog=training.watchdog_seconds,
    )


def sentences(rows: Iterable[StagePlan], storage_gb_s: float | None) -> list[str]:
    """A sentence for the phases with equal times, and one on what they rest on; none without a phase."""
    phases: dict[str, list[str]] = {}
    for row in rows:
        if (times := checkpoint_times(row, storage_gb_s)) is not None:
            figures = (
                f"sealed in {_seconds(times.seal)}, verified in {_seconds(times.verify)}, at most "
                f"{_seconds(times.silent)} without a sign of progress (watchdog_timeout_seconds: {times.watchdog:g})"
            )
            phases.setdefault(figures, []).append(row.state.name)
    if not phases:
        return []
    storage = f"storage.gb_s = {storage_gb_s:g} for all ranks" if storage_gb_s else "no limit of storage.gb_s"
    speed = f"{SEAL_RATE / GB:g} and {HASH_RATE / GB:g} GB/s a rank, as measured on one core, and {storage}"
    return [f"checkpoint of {', '.join(names)}: {text}" for text, names in phases.items()] + [f"assumed: {speed}"]


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"


def require_patient_watchdogs(rows: Iterable[StagePlan], storage_gb_s: float | None) -> None:
    """Raises RecipeError for a phase to be run whose watchdog would take sealing for a hang. storage_gb_s: as above."""
    for row in rows:
        times = checkpoint_times(row, storage_gb_s) if row.state.text == "to run" else None
        if times is not None and times.silent > times.watchdog:
            speed = f", with storage.gb_s = {storage_gb_s:g} for all ranks together" if storage_gb_s else ""
            raise RecipeError(
                f"stage {row.state.name}: while a checkpoint is sealed{speed}, no rank may report progress for "
                f"{math.ceil(times.silent):,} s, and watchdog_timeout_seconds = {times.watchdog:g} would end each "
                f"attempt; set it to {math.ceil(times.silent):,} or more"
            )
