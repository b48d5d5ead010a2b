"""Work checkpoints: where a killed run goes on from. Megatron's `torch_dist` format, in the stage's work folder only.

They hold pickles, so they are never sealed, published, or read from anywhere but the work folder that this stage
wrote. A checkpoint counts once `complete.json` lies in it, which names every file with its size and SHA-256; these are
compared before anything is unpickled. The last two are kept.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from pipeline.errors import AtomError
from pipeline.stage import Report
from pipeline.store import sha256_bytes, sha256_file
from stages.model.mcore import TorchDistSaveShardedStrategy, dist_checkpointing, filesystem_async
from stages.train.engine import Engine

KEEP = 2
MARKER = "complete.json"


def save(engine: Engine, work: Path, step: int) -> None:
    """Writes the checkpoint of a finished step and forgets all but the last two.

    Raises AtomError if the file system does not take it.
    """
    folder = work / "checkpoints" / f"step-{step:09d}"
    if engine.ranks.first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    engine.ranks.barrier()
    # Megatron collects its writers' results through a queue in a process that it spawns for the purpose: six seconds
    # for the first save, and a second import of the caller's main module. All ranks save synchronously here, so the
    # queue's two ends are in this process.
    if getattr(filesystem_async, "_results_queue", ...) is None:
        filesystem_async._results_queue = queue.Queue()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    try:
        dist_checkpointing.save(engine.state(), str(folder), sharded_strategy=strategy)
    except (OSError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise AtomError(
            f"work checkpoint {folder} cannot be written ({reason}); make room and run again to go on from the last one"
        ) from error
    engine.ranks.barrier()
    if engine.ranks.first:
        files = {
            p.relative_to(folder).as_posix(): [p.stat().st_size, sha256_file(p)]
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        partial = folder / (MARKER + ".partial")
        with open(partial, "w") as f:
            json.dump({"step": step, "files": files, "product": _product(work)}, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.rename(partial, folder / MARKER)
        complete = [f for f in _folders(work) if (f / MARKER).exists()]
        for old in set(_folders(work)) - set(complete[-KEEP:]):
            shutil.rmtree(old)
    engine.ranks.barrier()


def load(engine: Engine, work: Path, report: Report) -> int:
    """Loads the newest usable checkpoint into the engine and returns its step; 0 if there never was one.

    A checkpoint that was cut short or damaged is passed over with a note. Raises AtomError if complete ones were
    written and none of them is intact any more.
    """
    problems: list[str] = []
    for folder in reversed(_folders(work)):
        problem = _problem(folder, work)
        if problem is None:
            step = int(json.loads((folder / MARKER).read_text())["step"])
            engine.load_state(dist_checkpointing.load(engine.state(loading=True), str(folder)))
            engine.ranks.barrier()
            if engine.ranks.first:  # what is passed over would otherwise count among the last two
                for newer in _folders(work)[_folders(work).index(folder) + 1 :]:
                    shutil.rmtree(newer)
            return step
        if problem:
            problems.append(problem)
            report.note(f"work checkpoint {folder.name} is damaged ({problem}); going back to the one before it")
    if problems:
        raise AtomError(
            f"every work checkpoint in {work / 'checkpoints'} is damaged (newest: {problems[0]}); "
            f"remove {work} to start this stage anew"
        )
    return 0


def _folders(work: Path) -> list[Path]:
    return sorted((work / "checkpoints").glob("step-*"))


def _product(work: Path) -> dict[str, list[Any]]:
    """{path: [size, sha256]} of what the phase has produced so far: sealed checkpoints, and the log up to here."""
    paths = sorted(p for p in (work / "sealed").rglob("*") if p.is_file())
    paths += [p for p in (work / "training.jsonl",) if p.exists()]
    return {p.relative_to(work).as_posix(): [p.stat().st_size, sha256_file(p)] for p in paths}


def _problem(folder: Path, work: Path) -> str | None:
    """What is wrong with a checkpoint, or with the product it goes on from: None if nothing, "" if never completed."""
    try:
        marker: dict[str, Any] = json.loads((folder / MARKER).read_text())
        files, product = marker["files"], marker["product"]
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError) as error:
        return f"{MARKER} cannot be read: {error}"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or sha256_file(path) != digest:
            return f"{name} is not what was written"
    for name, (size, digest) in product.items():
        path = work / name
        written = path.read_bytes()[:size] if path.is_file() else b""  # the log has grown since
        if sha256_bytes(written) != digest:
            return f"{name} is not what was written"
    return None
