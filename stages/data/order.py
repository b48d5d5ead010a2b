"""The exact order of training data: which tokens of which documents make up every row of every step.

The order depends only on the seed, the mix and the table of documents. It is an artifact: training follows it, the
documents of a step can be looked up without the corpus, and a release can publish it.

A phase that continues from a checkpoint gets the order of its remaining steps. Each source's cursor continues at the
checkpoint's position, so that no document is read again before its epoch ends; if the order's settings are unchanged,
the rows are those of the original order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipeline.core.bounds import MOST_RAMP_STEPS, Flag, Key, Mix, Range, Seed, Steps
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added, identity
from pipeline.core.store import Artifact
from stages.data import packing
from stages.data.packing import LongDocuments
from stages.data.seeds import permutation
from stages.data.table import ORDER, arrow_schema, read_table, write_json, write_table
from stages.seed_labels import seed_label

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

VERSION = 1


Rows = Annotated[int, Range(1, 2**30)]
"""The rows of one step."""


class OrderConfig(Config):
    """`rows` are the rows of one step; `mix` is each source's share of all rows of the phase, of all tokens if rows are
    packed; `ramp`: (last step, rows) of smaller steps at the beginning."""

    phase: Key = Field(description="name of the phase")
    mix: Mix = Field(description="share of rows by source; with pack, share of tokens")
    sequence_length: Annotated[int, Range(2, 2**24)] = Field(description="tokens predicted in one row")
    rows: Rows = Field(description="rows of one step")
    steps: Steps = Field(description="steps of the phase")
    seed: Seed = Field(description="seed of the recipe")
    first_step: Steps = added(1, "first step; above 1 only if the phase continues from a checkpoint")
    ramp: tuple[tuple[Steps, Rows], ...] = added(
        (), "(last step, rows) of smaller steps at the beginning", max_length=MOST_RAMP_STEPS
    )
    pack: Flag = added(False, "pack several chunks into a row")
    long_documents: LongDocuments | None = added(None, "up-weighting of long chunks; requires pack; null: none")

    def rows_of(self, first: int) -> list[int]:
        """Rows of each step from `first` on."""
        sizes = []
        for step in range(first, self.steps + 1):
            sizes.append(next((rows for last, rows in self.ramp if step <= last), self.rows))
        return sizes

    def rows_from(self, first: int) -> int:
        """Rows of all steps from `first` on."""
        return rows_from(first, (*self.ramp, (self.steps, self.rows)))


def rows_from(first: int, sizes: Iterable[tuple[int, int]]) -> int:
    """Rows of all steps from `first` on, in closed form. sizes: (last step, rows of each step), one after the other."""
    total, last_counted = 0, first - 1
    for last, rows in sizes:
        total += max(0, last - last_counted) * rows
        last_counted = max(last_counted, last)
    return total


def settings(config: OrderConfig) -> dict[str, Any]:
    """The part of a config that a checkpoint keeps, to detect whether a later config gives the same rows."""
    return {name: value for name, value in identity(config).items() if name != "first_step"}


@dataclass(frozen=True)
class DataCursor:
    """A position in the data: the first step, and the rows of each source that were read before that step.

    `seed` orders the sources; a checkpoint hands it on, so that another recipe seed repeats no document.
    """

    first_step: int
    seed: int
    rows: dict[str, int] = field(default_factory=dict)


def run(config: OrderConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal `order.parquet` (one row for every segment of every step from `first_step` on) and `meta.json`.

    inputs["tokens"]: only its documents.parquet is read. A document longer than a row is cut into chunks
    of sequence_length + 1 tokens that overlap by one, so that each token but a document's first is a target once.
    Every source is read in a seeded permutation of its chunks, a new one each epoch.
    inputs["continue"], if given: a checkpoint, at whose data position the cursors continue.
    Raises RecipeError for an unknown or empty source, or shares that do not sum to 1; AtomError for a checkpoint of
    another step.
    """
    import numpy as np
    import pyarrow as pa

    chunks = _chunks_by_source(inputs["tokens"] / "documents.parquet", config)
    sizes = {name: len(chunks[name]["ordinal"]) for name in sorted(config.mix)}
    cursor, start = DataCursor(1, config.seed), None
    if "continue" in inputs:
        cursor, start = _resume_cursor(config, inputs["continue"], sizes)
    table, sources = (_pack_rows if config.pack else _draw_rows)(config, chunks, sizes, cursor)
    for name, stats in sources.items():
        mask = table["source"] == name
        length, loss_from = table["length"][mask], table["loss_from"][mask]
        sources[name] = {
            "rows": int(mask.sum()),
            "tokens": int((length - 1).sum()),
            "loss_tokens": int((length - 1 - loss_from).sum()),
            "documents_seen": len(np.unique(table["ordinal"][mask])),
            "chunks": sizes[name],
            "epochs": round(int((length - 1).sum()) / int((chunks[name]["length"] - 1).sum()), 6)
            if config.pack
            else round(int(mask.sum()) / sizes[name], 6),
            **stats,
        }
    schema = arrow_schema(ORDER)
    columns = [pa.array(table[column.name], column.type) for column in schema]
    write_table(out / "order.parquet", pa.table(columns, schema=schema))
    meta = settings(config) | {"sources": sources}
    if start is not None:
        meta |= {"first_step": config.first_step, "start": start, "walk": cursor.__dict__}
    meta["tokens"] = sum(stats["tokens"] for stats in sources.values())
    if config.pack:
        slots = config.rows_from(config.first_step) * config.sequence_length
        meta["fill"] = round(meta["tokens"] / slots, 6)
        report.note(f"rows are filled to {meta['fill']:.1%}")
    write_json(out / "meta.json", meta)
    for name, stats in sources.items():
        report.note(f"{name}: {stats['rows']} rows, {stats['documents_seen']} documents, {stats['epochs']:.2f} epochs")
        if stats.get("long", {}).get("missing_tokens"):
            long = stats["long"]
            report.note(
                f"{name}: {long['chunks']} chunks of more than {long['over']} tokens hold {long['available_tokens']} "
                f"tokens; {long['missing_tokens']} of the {long['wanted_tokens']} asked for are missing, made up by "
                "shorter ones"
            )


Table = dict[str, "NDArray[Any]"]


def _draw_rows(
    config: OrderConfig, chunks: Mapping[str, Table], sizes: Mapping[str, int], cursor: DataCursor
) -> tuple[Table, dict[str, Any]]:
    """One chunk a row: the table from `first_step` on, and an empty report for each source."""
    import numpy as np

    names, counts = sorted(config.mix), config.rows_of(cursor.first_step)
    quota = apportion(config.mix, sum(counts))
    labels = np.repeat(np.arange(len(names)), [quota[name] for name in names])
    label, from_step = f"order/{seed_label(config.phase)}", ""
    if cursor.first_step > 1:
        from_step = f" from step {cursor.first_step}"
    labels = labels[permutation(len(labels), f"{label}/sources{from_step}", config.seed)]
    counts, read_counts = (
        counts[config.first_step - cursor.first_step :],
        counts[: config.first_step - cursor.first_step],
    )
    rows_read = sum(read_counts)  # rows of the walk that the checkpoint has read

    total = len(labels) - rows_read
    columns = {name: np.zeros(total, np.int64) for name in ("ordinal", "offset", "length", "loss_from")}
    ids = np.empty(total, dtype=object)
    for i, name in enumerate(names):
        count_read, positions = np.count_nonzero(labels[:rows_read] == i), np.flatnonzero(labels[rows_read:] == i)
        first = cursor.rows.get(name, 0) + int(count_read)
        indices = _permuted_indices(sizes[name], first, len(positions), f"{label}/{name}", cursor.seed)
        for column, values in columns.items():
            values[positions] = chunks[name][column][indices]
        ids[positions] = chunks[name]["id"][indices]
    step = np.repeat(np.arange(config.first_step, config.steps + 1), counts)
    row = np.concatenate([np.arange(count) for count in counts])
    source = np.array(names, dtype=object)[labels[rows_read:]]
    table = {"step": step, "row": row, "segment": np.zeros(total, np.int64), "source": source, "id": ids, **columns}
    return table, {name: {} for name in names}


def _pack_rows(
    config: OrderConfig, chunks: Mapping[str, Table], sizes: Mapping[str, int], cursor: DataCursor
) -> tuple[Table, dict[str, Any]]:
    """Several chunks a row: the table from `first_step` on, and a report on the long chunks of each source.

    A phase that continues with other settings has its remaining steps packed again, since packing is global: chunks
    that it has read may come again before all others were read.
    """
    counts, label = config.rows_of(cursor.first_step), f"order/{seed_label(config.phase)}"
    if cursor.first_step > 1:
        label += f" from step {cursor.first_step}"
    table, reports = packing.pack(
        chunks, config.mix, counts, config.sequence_length, config.long_documents, label, config.seed
    )
    table["step"] += cursor.first_step - 1
    mask = table["step"] >= config.first_step
    return {column: values[mask] for column, values in table.items()}, reports


def position(meta: Mapping[str, Any], rows_read: Mapping[str, int], step: int) -> dict[str, Any]:
    """`data_position` of a checkpoint: the state from which another order continues after `step`.

    meta: the meta.json of the current order; rows_read: the number of its rows, by source, in its steps up to `step`.
    `rows` counts all rows of each source since the phase's first step, `chunks` is an epoch's rows.
    """
    start = meta.get("start", {"rows": {}, "chunks": {}})
    rows = {name: start["rows"].get(name, 0) + rows_read.get(name, 0) for name in sorted({*start["rows"], *rows_read})}
    chunks = start["chunks"] | {name: source_meta["chunks"] for name, source_meta in meta["sources"].items()}
    cursor = meta.get("walk", DataCursor(1, meta["seed"]).__dict__)
    names = [name for name in OrderConfig.model_fields if name in meta and name != "first_step"]
    order = {name: meta[name] for name in names} | {"walk": cursor}
    return {"next_step": step + 1, "steps": meta["steps"], "rows": rows, "chunks": chunks, "order": order}


def _resume_cursor(
    config: OrderConfig, checkpoint: Artifact, sizes: Mapping[str, int]
) -> tuple[DataCursor, dict[str, Any]]:
    """The cursor after a checkpoint, and the position of every source: `rows` read and `chunks` of an epoch.

    A source whose number of chunks changes (by another row length or other documents) continues at the same fraction of
    its epoch.
    """
    state = checkpoint.json("state.json")
    if (state["phase"], state["step"] + 1) != (config.phase, config.first_step):
        raise AtomError(
            f"checkpoint {checkpoint.key} stands after step {state['step']} of {state['phase']}, "
            f"and the order was to begin with step {config.first_step} of {config.phase}"
        )
    data_position = state["data_position"]
    previous_order, rows, chunks = data_position["order"], dict(data_position["rows"]), data_position["chunks"] | sizes
    for name in sizes:
        rows[name] = -(-rows.get(name, 0) * sizes[name] // data_position["chunks"].get(name, 1))
    requested = json.loads(json.dumps(settings(config)))
    unchanged = (
        requested == {name: previous_order[name] for name in previous_order if name != "walk"}
        and chunks == data_position["chunks"]
    )
    cursor = (
        DataCursor(**previous_order["walk"])
        if unchanged
        else DataCursor(config.first_step, previous_order["walk"]["seed"], rows)
    )
    return cursor, {"rows": rows, "chunks": chunks}


def apportion(shares: dict[str, float], total: int) -> dict[str, int]:
    """Whole numbers in proportion to the shares that sum to `total` (largest remainder; ties by name)."""
    counts = {name: int(share * total) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (counts[name] - shares[name] * total, name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def chunk(tokens: int, loss_from: int, sequence_length: int) -> list[tuple[int, int, int]]:
    """(offset, length, targets without loss) of the chunks of one document that carry any loss.

    `loss_from` is the first token of the document that carries loss. A chunk of length n has n - 1 targets.
    """
    chunks = []
    for offset in range(0, tokens - 1, sequence_length):
        length = min(sequence_length + 1, tokens - offset)
        without_loss = min(max(loss_from - offset - 1, 0), length - 1)
        if without_loss < length - 1:
            chunks.append((offset, length, without_loss))
    return chunks


def _chunks_by_source(path: Path, config: OrderConfig) -> dict[str, dict[str, NDArray[Any]]]:
    """Arrays `ordinal`, `id`, `offset`, `length`, `loss_from` by source, one entry a chunk of the training split."""
    import numpy as np

    if abs(sum(config.mix.values()) - 1) > 1e-6:
        raise RecipeError(f"{config.phase}.mix: shares sum to {sum(config.mix.values()):.6g}, not 1; adjust them")
    table = read_table(path, ["source", "split", "ordinal", "id", "tokens", "loss_from"]).to_pylist()
    rows: dict[str, list[tuple[int, str, int, int, int]]] = {document["source"]: [] for document in table}
    for document in table:
        if document["split"] == "train" and document["source"] in config.mix:
            for offset, length, without_loss in chunk(
                document["tokens"], document["loss_from"], config.sequence_length
            ):
                rows[document["source"]].append((document["ordinal"], document["id"], offset, length, without_loss))
    chunks = {}
    for name in config.mix:
        if name not in rows:
            kept = ", ".join(rows)
            raise RecipeError(
                f"{config.phase}.mix names the source {name}, of which curation left no document (it left {kept}); see "
                "the dispositions, then loosen its steps or take it out of the mix"
            )
        if not rows[name]:
            raise RecipeError(f"{config.phase}.mix: source {name} has no training tokens; remove it from the mix")
        ordinals, ids, offsets, lengths, counts_without_loss = zip(*rows[name], strict=True)
        chunks[name] = {
            "ordinal": np.array(ordinals),
            "id": np.array(ids, dtype=object),
            "offset": np.array(offsets),
            "length": np.array(lengths),
            "loss_from": np.array(counts_without_loss),
        }
    return chunks


def _permuted_indices(size: int, first: int, count: int, label: str, seed: int) -> NDArray[np.int64]:
    """Indices `first` to `first + count - 1` of an endless sequence over 0..size-1, permuted again in each epoch."""
    import numpy as np

    epoch = first // size
    epochs = range(epoch, -(-(first + count) // size))
    parts = [permutation(size, f"{label}/epoch {n}", seed) for n in epochs]
    return np.concatenate([*parts, np.zeros(0, np.int64)])[first - epoch * size :][:count]


def documents_of_step(order: Path, step: int) -> pa.Table:
    """The rows of order.parquet of one step (1-based), by row. `order` is the sealed folder or the file."""
    return read_table(_file(order), filters=[("step", "=", step)])


def steps_of_document(order: Path, id: str) -> pa.Table:
    """The rows of order.parquet in which the document occurs, by step."""
    return read_table(_file(order), filters=[("id", "=", id)])


def _file(order: Path) -> Path:
    return order / "order.parquet" if order.is_dir() else order


def estimate(config: OrderConfig) -> Estimate:
    rows = config.rows_from(config.first_step)
    return Estimate(cpu_seconds=2 + rows / 5e5, tokens=rows * config.sequence_length)


STAGE = Stage("order", VERSION, OrderConfig, run, estimate=estimate)
