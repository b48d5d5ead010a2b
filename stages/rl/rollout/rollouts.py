"""Rollouts: every answer that a phase draws, with all fields needed to check its part in training.

`rollouts.parquet` has one row per answer; docs/formats.md describes the columns. The answers of a step are written
before the update, so a kill loses no finished answer, and a resumed step reads them again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import AtomError
from stages.data.table import ROWS_PER_GROUP, read_errors, read_table

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

DROPPED = {
    "": "kept",
    "variance": "all answers to the task have one reward, so none is better than another",
    "between": "neither the best answer to the task nor the worst",
    "idle": "the round had too few pairs to learn from",
    "wrong": "it is no right answer, and only those are an anchor",
    "truncated": "it did not end within max_new_tokens",
}


@dataclass(frozen=True)
class Rollout:
    """One answer. `dropped`: the reason why no update used it, a key of DROPPED. `routes`: the experts of its tokens
    (stages/rl/rollout/routes.py), with routing replay."""

    step: int
    wave: int
    group: int
    sample: int
    task: str
    kind: str
    level: int
    policy: str
    seed: int
    prompt_ids: Sequence[int]
    ids: Sequence[int]
    logprobs: Sequence[float]
    text: str
    finished: bool
    reward: float
    parts: Mapping[str, float]
    verifier: str
    verifier_version: str
    dropped: str
    routes: bytes | None = None


def schema(routes: bool = False) -> pa.Schema:
    """routes: of a phase with routing replay, whose answers have a column more."""
    import pyarrow as pa

    ids, text = pa.list_(pa.int32()), pa.string()
    types = {name: pa.int32() for name in ("step", "wave", "group", "sample", "level")}
    types |= {"seed": pa.uint64(), "prompt_ids": ids, "ids": ids, "logprobs": pa.list_(pa.float32())}
    types |= {"finished": pa.bool_(), "reward": pa.float64(), "routes": pa.binary()}
    names = [name for name in Rollout.__dataclass_fields__ if routes or name != "routes"]
    return pa.schema([(name, types.get(name, text)) for name in names])


def write(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Writes the file atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**vars(r), "parts": json.dumps(r.parts, sort_keys=True)} for r in rollouts]
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema(any(r.routes is not None for r in rollouts)))
    pq.write_table(table, partial, compression="zstd", row_group_size=ROWS_PER_GROUP)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.rename(partial, path)


def read(path: Path, step: int | None = None) -> list[Rollout]:
    """The answers, or those of a step. Raises AtomError if the file is damaged."""
    rows = read_table(path, filters=None if step is None else [("step", "=", step)]).to_pylist()
    return [Rollout(**{**row, "parts": json.loads(row["parts"])}) for row in rows]


def is_of_earlier_version(path: Path) -> bool:
    """Whether the file names policies by `digest`, and not by the digest of their tensors' digests. Raises AtomError if
    it cannot be read."""
    import pyarrow.parquet as pq

    with read_errors(path), pq.ParquetFile(path) as file:
        first = next(file.iter_batches(1, columns=["policy"]), None)
    return first is not None and first.num_columns == 1 and str(first["policy"][0]).startswith("sha256:")


def merge(parts: Sequence[Path], target: Path, routes: bool = False) -> int:
    """Merges all answers of a phase into one file, one row group per step. Returns their number. routes: as for
    `schema`."""
    import pyarrow.parquet as pq

    count = 0
    with pq.ParquetWriter(target, schema(routes), compression="zstd") as out:
        for part in parts:
            table = read_table(part)
            if table.schema != schema(routes):
                raise AtomError(f"{part} is not a file of this version's answers; remove it and run again")
            out.write_table(table)
            count += table.num_rows
    return count


def mean_rewards(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean reward by kind of task, in the order of their names."""
    kinds: dict[str, list[float]] = {}
    for r in rollouts:
        kinds.setdefault(r.kind, []).append(r.reward)
    return {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors, by name, one after the other. Files of earlier
    versions name a policy by it (`is_of_earlier_version`)."""
    import torch

    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy())
    return f"sha256:{hasher.hexdigest()}"
