"""Rollouts: every answer that a phase draws, with all fields needed to check its part in training.

`rollouts.parquet` has one row per answer; docs/formats.md describes the columns. The answers of a step are written
before the update, so a resumed step reads them again.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError
from stages.formats.seeds import seed_of
from stages.formats.table import ROWS_PER_GROUP, Double, Int32, String, columns_of, read_table
from stages.generation.protocols import ToolCall, Turn

if TYPE_CHECKING:
    import pyarrow as pa


# {reason why no update used an answer: its description}.
DROPPED = {
    "": "kept",
    "variance": "all answers to the task have one reward, so none is better than another",
    "between": "neither the best answer to the task nor the worst",
    "idle": "the round had too few pairs to learn from",
    "wrong": "it is no right answer, and only those are an anchor",
    "truncated": "it did not end within max_new_tokens, or, if it calls tools, within max_turns or the context",
    "stale": "a token of the group is of a policy that is older than max_staleness",
}

# An answer loops if it ends with so many copies of an n-gram of at least so many tokens.
REPEATS, MIN_NGRAM = 3, 2

# The reasons that hold for all answers of a group, which then is replaced.
WHOLE_GROUPS = ("variance", "stale")


class Span(TypedDict):
    """Successive tokens of an answer that one policy drew."""

    version: int | None
    """the last step after which the trainer had this policy; null before a step takes the answer"""
    policy: str
    """digest of the policy"""
    tokens: int
    """number of these tokens"""


@dataclass(frozen=True)
class Rollout:
    """One answer, which is a row of rollouts.parquet (docs/formats.md).

    In an asynchronous phase, `group` is the number in which the group was issued, `step` the one that took it, in the
    order of the rows, and `policy` drew the first token. In a phase with tools, `ids` are those of all turns and of the
    results between them, and `text` is that of the last turn.

    Attributes:
        step: The step (or the round) for which it was drawn; in asynchronous phases the one that took it.
        wave: Number of the draw within the step, from 0; 0 in asynchronous phases.
        group: Number of the group, the answers to one task; in asynchronous phases the one under which it was issued.
        sample: Number of the answer in its group.
        task: Id of the task.
        kind: Kind of the task.
        level: Level of the task.
        policy: Digest of the policy that generated it, below; in asynchronous phases that of the first token.
        seed: Seed of its sampling.
        prompt_ids: Token ids of the prompt.
        ids: Token ids of the answer; with tools those of all turns and of the tokens between them.
        logprobs: The sampler's log-probability of each of `ids`, in fp32; 0 where the policy did not generate.
        text: The text that is scored; with tools that of the last turn.
        finished: Whether the answer ended by itself.
        reward: Reward by the verifier.
        parts: Parts of the reward, in the column as JSON.
        verifier: Name of the verifier.
        verifier_version: Version of the verifier.
        dropped: Empty, or the reason why no update used the answer, below.
        issued: Only of asynchronous phases: the version of the policy when the group was issued.
        versions: Only of asynchronous phases: the policies of its tokens.
        turns: Only of phases with tools: the turns of the answer.
    """

    step: Int32
    wave: Int32
    group: Int32
    sample: Int32
    task: String
    kind: String
    level: Int32
    policy: String
    seed: Annotated[int, "uint64"]
    prompt_ids: Annotated[Sequence[int], "list of int32"]
    ids: Annotated[Sequence[int], "list of int32"]
    logprobs: Annotated[Sequence[float], "list of float"]
    text: String
    finished: Annotated[bool, "bool"]
    reward: Double
    parts: Annotated[Mapping[str, float], "string"]
    verifier: String
    verifier_version: String
    dropped: String
    issued: Annotated[int | None, "int32"] = None
    versions: Annotated[Sequence[Span] | None, "list of structures"] = None
    turns: Annotated[Sequence[Turn] | None, "list of structures"] = None

    @property
    def is_sampled(self) -> list[bool]:
        """The flag of each of `ids`, which is True if the policy drew the token."""
        if self.turns is None:
            return [True] * len(self.ids)
        return [flag for t in self.turns for flag in [True] * t["sampled"] + [False] * t["appended"]]

    @property
    def length(self) -> int:
        """The number of tokens that the policy drew."""
        return len(self.ids) if self.turns is None else sum(turn["sampled"] for turn in self.turns)


class PairRow(TypedDict):
    """A row of pairs.parquet: two answers to one question, the better first."""

    round: Int32
    """round of the phase"""
    task: String
    """id of the task"""
    question: String
    """the question"""
    chosen: String
    """the better answer"""
    rejected: String
    """the other answer"""
    chosen_finished: Annotated[bool, "bool"]
    """whether it ended by itself"""
    rejected_finished: Annotated[bool, "bool"]
    """whether it ended by itself"""
    chosen_sample: Int32
    """its `sample` in `rollouts.parquet`"""
    rejected_sample: Int32
    """its `sample` in `rollouts.parquet`"""
    chosen_reward: Double
    """its reward"""
    rejected_reward: Double
    """its reward"""
    judge: String
    """name of the verifier"""
    judge_version: String
    """version of the verifier"""
    policy: String
    """digest of the policy that generated both"""
    learnt: Annotated[bool, "bool"]
    """whether DPO used the pair"""


PAIRS = columns_of(PairRow)


def schema(asynchronous: bool = False, tools: bool = False) -> pa.Schema:
    """Returns the columns of rollouts.parquet.

    Args:
        asynchronous: True for an asynchronous phase, whose answers have two columns more.
        tools: True for a phase with tools, whose answers have a column more.
    """
    import pyarrow as pa

    ids, text = pa.list_(pa.int32()), pa.string()
    span = {"version": pa.int32(), "policy": text, "tokens": pa.int32()}
    call = pa.struct([(name, text) for name in ToolCall.__annotations__])
    turn = {"sampled": pa.int32(), "calls": pa.list_(call), "appended": pa.int32()}
    lists = {"prompt_ids": ids, "ids": ids, "logprobs": pa.list_(pa.float32())}
    lists |= {name: pa.list_(pa.struct(list(row.items()))) for name, row in (("versions", span), ("turns", turn))}
    present = {"issued": asynchronous, "versions": asynchronous, "turns": tools}
    columns = {name: kind for name, kind in columns_of(Rollout).items() if present.get(name, True)}
    return pa.schema([(name, lists.get(name) or pa.type_for_alias(kind)) for name, kind in columns.items()])


def write(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Writes the file of some answers atomically. It is on disk when this returns, also if the machine crashes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**vars(r), "parts": json.dumps(r.parts, sort_keys=True)} for r in rollouts]
    path.parent.mkdir(parents=True, exist_ok=True)
    # A column that no answer fills is one that the phase does not have.
    present = (any(getattr(r, name) is not None for r in rollouts) for name in ("versions", "turns"))
    table = pa.Table.from_pylist(rows, schema(*present))
    with atomic_files.replacing(path) as draft:
        pq.write_table(table, draft, compression="zstd", row_group_size=ROWS_PER_GROUP)


def read(path: Path, step: int | None = None) -> list[Rollout]:
    """Returns the answers, or those of a step.

    Raises:
        AtomError: The file is damaged.
    """
    rows = read_table(path, filters=None if step is None else [("step", "=", step)]).to_pylist()
    return [Rollout(**{**row, "parts": json.loads(row["parts"])}) for row in rows]


def merge(parts: Sequence[Path], target: Path, columns: pa.Schema) -> int:
    """Merges all answers of a phase into one file, one row group per step, and returns their number.

    Args:
        parts: Files of the answers, in order.
        target: The file to write.
        columns: A `schema`.
    """
    import pyarrow.parquet as pq

    count = 0
    with pq.ParquetWriter(target, columns, compression="zstd") as out:
        for part in parts:
            table = read_table(part)
            if table.schema != columns:
                raise AtomError(f"{part} is not a file of this version's answers; remove it and run again")
            out.write_table(table)
            count += table.num_rows
    return count


def pass_rate(group: Sequence[Rollout]) -> float:
    """Returns the mean reward of a group, each between 0 and 1."""
    return sum(min(max(r.reward, 0.0), 1.0) for r in group) / len(group)


def loops(ids: Sequence[int]) -> bool:
    """Returns True if the tokens end with an n-gram of MIN_NGRAM tokens or more, REPEATS times in succession.

    That is the repetition of Holtzman et al., 2020 (arXiv:1904.09751), which counts texts that end so.
    """
    import numpy as np

    values = np.asarray(ids, dtype=np.int64)[::-1]
    # The n for which the last token stands n tokens before, which most of them are not.
    for n in np.flatnonzero(values[MIN_NGRAM : len(values) // REPEATS + 1] == values[:1]) + MIN_NGRAM:
        span = int(n) * (REPEATS - 1)
        if np.array_equal(values[:span], values[n : n + span]):
            return True
    return False


def termination_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns the shares of answers that are cut off, and of those that are cut off in a loop."""
    cut = [r for r in rollouts if not r.finished]
    return {"truncated": len(cut) / len(rollouts), "looping": sum(loops(r.ids) for r in cut) / len(rollouts)}


def mean_rewards(rewards: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Returns the mean of (kind of task, reward) pairs by kind, in the order of their names."""
    kinds: dict[str, list[float]] = {}
    for kind, reward in rewards:
        kinds.setdefault(kind, []).append(reward)
    return {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())}


def length_correlation(answers: Sequence[Rollout]) -> float | None:
    """Returns the correlation of reward and length of answers, each less the mean of its group.

    A policy that learns a reward with a high one learns to write more. None if all rewards or lengths of every group
    are equal.
    """
    groups: dict[tuple[int, int], list[Rollout]] = {}
    for r in answers:
        groups.setdefault((r.wave, r.group), []).append(r)
    reward_gaps, length_gaps = list[float](), list[float]()
    for group in groups.values():
        rewards, lengths = [r.reward for r in group], [r.length for r in group]
        if len(set(rewards)) == 1:  # a mean that is rounded would differ from all of them
            continue
        reward_gaps += [reward - math.fsum(rewards) / len(group) for reward in rewards]
        length_gaps += [length - sum(lengths) / len(group) for length in lengths]
    product = math.fsum(a * b for a, b in zip(reward_gaps, length_gaps, strict=True))
    scale = math.sqrt(math.fsum(a * a for a in reward_gaps) * math.fsum(b * b for b in length_gaps))
    return product / scale if scale > 0 else None


def consumption_digest(rollouts: Sequence[Rollout]) -> str:
    """Returns SHA-256 over the answers of an asynchronous phase in their order.

    Each answer gives a line of JSON (sorted keys, no spaces) with all columns but `logprobs` and `turns`, and its
    log-probabilities as little-endian fp32.
    """
    hasher = hashlib.sha256()
    for r in rollouts:
        columns = {name: value for name, value in vars(r).items() if name not in ("logprobs", "turns")}
        hasher.update(json.dumps(columns, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        hasher.update(struct.pack(f"<{len(r.logprobs)}f", *r.logprobs))
    return f"sha256:{hasher.hexdigest()}"


def hash_fraction(question: str) -> float:
    """Returns a hash of a text, as a number in [0, 1).

    Pairs whose question has less than `heldout_fraction` are held out.
    """
    return int(hashlib.sha256(question.encode()).hexdigest()[:8], 16) / 2**32


class PairOrder:
    """The order of the pairs that a reward model learns from: all of them once an epoch, shuffled anew in each.

    Args:
        count: Number of pairs that are not held out.
        per_step: Pairs of a step.
        label: Label of the phase in seeds.
        seed: The recipe's.
    """

    def __init__(self, count: int, per_step: int, label: str, seed: int) -> None:
        self.count, self.per_step, self.label, self.seed = count, per_step, label, seed
        self._epoch, self._shuffled = -1, list[int]()

    def of_step(self, step: int) -> list[int]:
        """Returns the numbers of the pairs of a step (from 1), from 0 to count - 1."""
        numbers = []
        for number in range((step - 1) * self.per_step, step * self.per_step):
            epoch, position = divmod(number, self.count)
            numbers.append(self._of_epoch(epoch)[position])
        return numbers

    def _of_epoch(self, epoch: int) -> list[int]:
        """Returns the order of an epoch. The last one is kept, since a step needs it for each pair."""
        if self._epoch != epoch:
            self._shuffled = list(range(self.count))
            random.Random(seed_of(f"{self.label}/epoch {epoch}", self.seed)).shuffle(self._shuffled)
            self._epoch = epoch
        return self._shuffled
