"""Training rows by step: the order artifact says which tokens, the shards hold them. Nothing is shuffled here, so the
position in the data is the step and nothing else.

A row is one document, or one chunk of one, of at most sequence_length + 1 tokens: its tokens but the last are the
inputs, its tokens but the first the targets. Rows are padded on the right to the longest row of their step, which
every rank knows from the order alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline.errors import AtomError, RecipeError
from pipeline.store import Artifact
from stages.data.shards import check_shard
from stages.model.mcore import IndexedDataset
from stages.train.config import PhaseConfig

ALIGN = 8  # rows are padded to a multiple of this many tokens


@dataclass(frozen=True)
class Row:
    """One row of a batch: where its tokens stand. `loss_from` targets at its start carry no loss."""

    source: str
    id: str
    ordinal: int
    offset: int
    length: int
    loss_from: int

    @property
    def targets(self) -> int:
        """Targets that carry loss."""
        return max(0, self.length - 1 - self.loss_from)


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch, each [rows, width]; `loss_mask` is 1 where a target carries loss, `padding` is True
    where an input is padding (Megatron's router leaves those out of its balance)."""

    ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    padding: torch.Tensor


class Shards:
    """The token shards of one split, opened as they are asked for."""

    def __init__(self, tokens: Artifact, split: str, padded_vocab_size: int) -> None:
        meta = tokens.json("meta.json")
        if meta["vocab_size"] > padded_vocab_size:
            raise RecipeError(
                f"tokenizer.padded_vocab_size = {padded_vocab_size} is less than the {meta['vocab_size']} tokens of "
                f"the tokenizer; raise it"
            )
        self.pad_id: int = meta["pad_id"]
        self.tokens, self.split = tokens, split
        self.sets: dict[str, IndexedDataset] = {}

    def source(self, name: str) -> IndexedDataset:
        """Megatron's reader of one source. Raises AtomError if the shard is missing or not what its index says."""
        if name not in self.sets:
            prefix = self.tokens.path / self.split / name
            check_shard(prefix)
            self.sets[name] = IndexedDataset(str(prefix), mmap=True)
        return self.sets[name]

    def read(self, row: Row) -> np.ndarray:
        dataset = self.source(row.source)
        if row.ordinal >= len(dataset) or row.offset + row.length > dataset.sequence_lengths[row.ordinal]:
            raise AtomError(f"the data order asks for tokens {row.offset} to {row.offset + row.length} of document "
                            f"{row.id}, which shard {self.split}/{row.source} does not hold; remove both artifacts "
                            f"and run again")  # fmt: skip
        return np.asarray(dataset.get(row.ordinal, offset=row.offset, length=row.length))

    def batch(self, rows: Sequence[Row], width: int) -> Batch:
        """Reads rows and pads them to `width` tokens."""
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        labels = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.float32)
        padding = np.ones((len(rows), width), dtype=bool)
        for i, row in enumerate(rows):
            tokens, n = self.read(row), row.length - 1
            ids[i, :n], labels[i, :n] = tokens[:-1], tokens[1:]
            mask[i, row.loss_from : n] = 1
            padding[i, :n] = False
        return Batch(*(torch.from_numpy(x) for x in (ids, labels, mask, padding)))


def width_of(rows: Sequence[Row]) -> int:
    """Tokens to which the rows of a step are padded."""
    longest = max(row.length for row in rows) - 1
    return -(-longest // ALIGN) * ALIGN


class Order:
    """The rows of every step of a phase."""

    def __init__(self, order: Artifact, phase: PhaseConfig) -> None:
        meta = json.loads((order / "meta.json").read_text())
        for name, value in (("steps", phase.steps), ("rows", phase.rows), ("sequence_length", phase.sequence_length)):
            if meta[name] != value:
                raise AtomError(f"order artifact {order.key} was made for {name} = {meta[name]}, not {value}")
        columns = ["step", "segment", "source", "id", "ordinal", "offset", "length", "loss_from"]
        table = pq.read_table(order / "order.parquet", columns=columns)
        if len(table) and max(table["segment"].to_numpy()) > 0:
            raise AtomError(f"order artifact {order.key} packs several documents into a row, which is not supported")
        self.table = table
        self.starts = np.searchsorted(table["step"].to_numpy(), np.arange(1, phase.steps + 2))
        if set(np.diff(self.starts)) != {phase.rows}:
            raise AtomError(f"order artifact {order.key} does not hold {phase.rows} rows for each of its steps")

    def rows(self, step: int) -> list[Row]:
        """step: 1-based."""
        part = self.table.slice(self.starts[step - 1], self.starts[step] - self.starts[step - 1]).to_pylist()
        return [Row(r["source"], r["id"], r["ordinal"], r["offset"], r["length"], r["loss_from"]) for r in part]


def heldout_rows(tokens: Artifact, phase: PhaseConfig) -> list[Row]:
    """The first held-out documents of each source of the mix, in shares of the mix, cut to the sequence length.

    Raises RecipeError if no source of the mix has a held-out document.
    """
    table = pq.read_table(Path(tokens / "documents.parquet"))
    documents = [d for d in table.to_pylist() if d["split"] == "heldout"]
    total = sum(phase.mix.values())
    rows: list[Row] = []
    for source, share in sorted(phase.mix.items()):
        own = sorted((d for d in documents if d["source"] == source), key=lambda d: d["ordinal"])
        for d in own[: max(1, round(phase.heldout.rows * share / total))]:
            length = min(d["tokens"], phase.sequence_length + 1)
            # in documents.parquet loss_from is the first token that carries loss; its target stands one place earlier
            rows.append(Row(source, d["id"], d["ordinal"], 0, length, max(0, d["loss_from"] - 1)))
    rows = [row for row in rows if row.targets]
    if not rows:
        raise RecipeError(f"no held-out document in any source of the mix ({', '.join(sorted(phase.mix))}); "
                          f"raise the held-out share of the data recipe")  # fmt: skip
    return rows
