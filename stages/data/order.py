"""The exact order of training data: the tokens and documents of every row of every step.

The order depends only on the seed, the mix and the table of documents. It is an artifact: training follows it, the
documents of a step can be looked up without the corpus, and a release can publish it.

A phase that continues from a checkpoint gets the order of its remaining steps. Each source's cursor continues at the
checkpoint's position, so that no document is read again before its epoch ends; if the order's settings are unchanged,
the rows are those of the original order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipeline.core.bounds import MOST_RAMP_STEPS, Flag, Key, Mix, Range, Seed, Steps
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added, identity
from pipeline.core.store import Artifact
from stages.data import packing
from stages.data.chunks import Chunks, read_chunks
from stages.data.packing import LongDocuments
from stages.data.row_draw import DataCursor, draw_rows
from stages.data.table import ORDER, arrow_schema, read_table, write_json, write_table
from stages.seed_labels import seed_label

if TYPE_CHECKING:
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
    """The part of a config that a checkpoint keeps, to detect whether a later config implies the same rows."""
    return {name: value for name, value in identity(config).items() if name != "first_step"}


def run(config: OrderConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal `order.parquet` (one row for every segment of every step from `first_step` on) and `meta.json`.

    inputs["tokens"]: only its documents.parquet is read. A document longer than a row is cut into chunks
    of sequence_length + 1 tokens that overlap by one, so that each token but a document's first is a target once.
    Every source is read in a seeded permutation of its chunks, a new one each epoch.
    inputs["continue"], if present: a checkpoint, at whose data position the cursors continue.
    Raises RecipeError for an unknown or empty source, or shares that do not sum to 1; AtomError for a checkpoint of
    another step.
    """
    import numpy as np
    import pyarrow as pa

    chunks = read_chunks(inputs["tokens"] / "documents.parquet", config.phase, config.mix, config.sequence_length)
    sizes = {name: len(chunks[name]["ordinal"]) for name in sorted(config.mix)}
    cursor, start = DataCursor(1, config.seed), None
    if "continue" in inputs:
        cursor, start = _resume_cursor(config, inputs["continue"], sizes)
    if config.pack:
        table, sources = _pack_rows(config, chunks, cursor)
    else:
        counts, label = config.rows_of(cursor.first_step), f"order/{seed_label(config.phase)}"
        table = draw_rows(chunks, config.mix, counts, config.first_step, label, config.seed, cursor)
        sources = {name: {} for name in sizes}
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
                f"tokens; shorter chunks replace {long['missing_tokens']} of {long['wanted_tokens']} tokens"
            )


def _pack_rows(
    config: OrderConfig, chunks: Mapping[str, Chunks], cursor: DataCursor
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Packs several chunks in each row: the table from `first_step` on, and a report on the long chunks of each source.

    If a phase continues with other settings, its remaining steps are packed again, because packing is global: chunks
    that were read may recur before all others were read.
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
