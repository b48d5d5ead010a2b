"""The exact order of training data: the tokens and documents of every row of every step.

The order is a function of the seed, the mix and the table of documents: a source's chunks are permuted by a Feistel
network in each epoch, and a tree deals its rows to the steps. So the documents of a step, and the steps of a document,
follow without the corpus, in the same time for a phase of any length. The order is also an artifact, in parts by range
of steps: training follows it, and a release can publish it.

A packed phase reads its streams by blocks of steps. A block begins at the chunk at which its tokens begin, so blocks
are packed independently of each other; the chunks of a block that fit in none of its rows are not read.

A phase that continues from a checkpoint gets the order of its remaining steps. Each stream continues at the
checkpoint's position, so that no chunk is read again before its epoch ends; if the order's settings are unchanged, the
rows are those of the original order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import AtomError
from pipeline.core.merkle_tree import Tree
from pipeline.core.parts import Part, link_parts, part_file, seal_part
from pipeline.core.stage import Estimate, Inputs, Published, Report, Stage, identity
from pipeline.core.store import Artifact
from stages.data.order.order_config import MEMORY_BYTES, ROW_BYTES, DataCursor, OrderConfig
from stages.formats.table import write_json, write_table

if TYPE_CHECKING:
    from stages.data.order.chunks import ChunkIndex
    from stages.data.order.computed_order import ComputedOrder

VERSION = 3


def settings(config: OrderConfig) -> dict[str, Any]:
    """Returns the part of a config that a checkpoint keeps, to detect whether a later config implies the same rows."""
    return {name: value for name, value in identity(config).items() if name != "first_step"}


def run(config: OrderConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `part-NNNNN.parquet`, one row for every segment of every step from `first_step` on, and `meta.json`.

    Of `inputs["tokens"]` only the tables of documents are read. A document longer than a row is cut into chunks
    of sequence_length + 1 tokens that overlap by one, so that each token but a document's first is a target once. Of a
    turn of a conversation, only the first chunk is read.
    Every source is read in a seeded permutation of its chunks, a new one each epoch.
    `inputs["continue"]`, if present, is a checkpoint, at whose data position the cursors continue.
    Raises RecipeError for an unknown or empty source, or shares that do not sum to 1; AtomError for a checkpoint of
    another step.
    """
    order, start = _open(config, inputs, work)
    parts = []
    for n in range(config.blocks):
        parts.append(_seal_block(order, work, n))
        report.progress(n + 1, config.blocks, "parts")
    link_parts(parts, out)
    meta = settings(config) | {"function": order.function, "sources": _source_facts(order, parts)}
    if start is not None:
        meta |= {"first_step": config.first_step, "start": start, "walk": order.cursor.__dict__}
    meta["tokens"] = sum(facts["tokens"] for facts in meta["sources"].values())
    if config.pack:
        slots = config.rows_from(config.first_step) * config.sequence_length
        meta["fill"] = round(meta["tokens"] / slots, 6)
        report.note(f"rows are filled to {meta['fill']:.1%}")
        meta["end"] = order.start(config.blocks)
    meta["parts"] = [part.facts["meta"] | {"sha256": part.rows[0].sha256} for part in parts]
    # One hash stands for all parts, so that a release can prove a single step.
    meta["merkle_root"] = merkle_root(part["sha256"] for part in meta["parts"])
    write_json(out / "meta.json", meta)
    for name, facts in meta["sources"].items():
        report.note(f"{name}: {facts['rows']} rows, {facts['documents_seen']} documents, {facts['epochs']:.2f} epochs")
        if count := order.indexes[name].cut_documents:
            report.note(
                f"{name}: {count} documents with a prompt are longer than a row; what is beyond it is left out, and "
                "all of those whose prompt fills it"
            )
        long = facts.get("long", {})
        if long.get("missing_tokens"):
            report.note(
                f"{name}: {long['chunks']} chunks of more than {long['over']} tokens hold {long['available_tokens']} "
                f"tokens; shorter chunks replace {long['missing_tokens']} of {long['wanted_tokens']} tokens"
            )


def run_shard(config: OrderConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Seals the part of one block of steps in `work`, and the index of chunks where it is missing."""
    order, _ = _open(config, inputs, work, shard / config.blocks)
    _seal_block(order, work, shard)


def _open(
    config: OrderConfig, inputs: Inputs, work: Path, turn: float = 0.0
) -> tuple[ComputedOrder, dict[str, Any] | None]:
    """Returns the order as a function, and the position of every source at the checkpoint; None without one.

    `turn` is that of `read_indexes`.
    """
    from stages.data.order.computed_order import ComputedOrder, read_indexes

    indexes = read_indexes(config, inputs["tokens"].path, work, turn)
    cursor, start = DataCursor(1, config.seed), None
    if "continue" in inputs:
        # The sources go on where the checkpoint left them, so that no chunk is read twice in an epoch.
        cursor, start = _resume_cursor(config, inputs["continue"], indexes)
    order = ComputedOrder(config, indexes, cursor, work, turn)
    return order, start


def _seal_block(order: ComputedOrder, work: Path, n: int) -> Part:
    """Seals the part of a block.

    Among its facts are `meta`, its entry in meta.json, and `sources`, counts to add up over the parts.
    """

    def make(folder: Path) -> dict[str, Any]:
        import pyarrow.compute as pc

        table, unread = order.block(n)
        write_table(folder / part_file(n), table)

        # Every token of a segment but its first is a target; `loss_from` counts the first targets, which have no loss.
        targets = pc.subtract(table["length"], 1)
        counts = table.select(["source"]).append_column("tokens", targets)
        counts = counts.append_column("loss_tokens", pc.subtract(targets, table["loss_from"])).group_by("source")
        counts = counts.aggregate([("tokens", "count"), ("tokens", "sum"), ("loss_tokens", "sum")])
        sources = {}
        for row in counts.sort_by("source").to_pylist():
            facts = {"rows": row["tokens_count"], "tokens": row["tokens_sum"], "loss_tokens": row["loss_tokens_sum"]}
            sources[row["source"]] = facts

        steps = order.config.steps_of_block(n)
        meta: dict[str, Any] = {"first_step": steps.start, "last_step": steps.stop - 1}
        meta["rows"] = {name: facts["rows"] for name, facts in sources.items()}
        if order.config.pack:
            meta["start"] = order.start(n)
        return {"meta": meta, "sources": sources, "unread": unread}

    return seal_part(work / "blocks", f"{n:05d}", make)


def _source_facts(order: ComputedOrder, parts: Sequence[Part]) -> dict[str, dict[str, Any]]:
    """Returns `sources` of meta.json: the sums over the parts, and the number of distinct documents."""
    import numpy as np
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    # One bit for each document of a source, set if a row has the document.
    seen = {name: np.zeros(-(-int(index.documents[-1]) // 8), np.uint8) for name, index in order.indexes.items()}
    for number, part in enumerate(parts):
        with pq.ParquetFile(part.folder / part_file(number)) as file:
            for batch in file.iter_batches(65_536, columns=["source", "part", "ordinal"]):
                for name in batch["source"].unique().to_pylist():
                    rows = batch.filter(pc.field("source") == name)
                    numbers = order.indexes[name].document_numbers(rows["part"].to_numpy(), rows["ordinal"].to_numpy())
                    # Several rows of a batch can set bits of one byte: plain indexing would lose all but one.
                    np.bitwise_or.at(seen[name], numbers >> 3, np.uint8(1) << (numbers & 7).astype(np.uint8))

    sources = {}
    for name, index in order.indexes.items():
        counts = [part.facts["sources"][name] for part in parts if name in part.facts["sources"]]
        facts: dict[str, Any] = {key: sum(count[key] for count in counts) for key in ("rows", "tokens", "loss_tokens")}
        facts |= {"documents_seen": int(np.bitwise_count(seen[name]).sum()), "chunks": index.chunks}
        if order.config.pack:
            facts["epochs"] = round(facts["tokens"] / sum(index.slots.values()), 6)
            facts["unread"] = sum(part.facts["unread"].get(name, 0) for part in parts)
        else:
            facts["epochs"] = round(facts["rows"] / index.chunks, 6)
        if name in order.long:
            facts["long"] = order.long[name]
        sources[name] = facts
    return sources


def merkle_root(digests: Iterable[str]) -> str:
    """Returns the root over SHA-256 digests in hex, of which each is a leaf (RFC 9162, section 2.1)."""
    return Tree.of(map(bytes.fromhex, digests)).root.hex()


def position(meta: Mapping[str, Any], rows_read: Mapping[str, int], step: int) -> dict[str, Any]:
    """Returns `data_position` of a checkpoint: the state from which another order continues after `step`.

    In the result, `rows` counts all rows of each source since the phase's first step, and `chunks` is an epoch's rows.
    A packed phase has `streams`: [position, chunks of an epoch] of each stream at the end of the block of the step.

    Args:
        meta: The meta.json of the current order.
        rows_read: The number of its rows, by source, in its steps up to `step`.
        step: The step of the checkpoint.
    """
    start = meta.get("start", {"rows": {}, "chunks": {}})
    rows = {name: start["rows"].get(name, 0) + rows_read.get(name, 0) for name in sorted({*start["rows"], *rows_read})}
    chunks = start["chunks"] | {name: source_meta["chunks"] for name, source_meta in meta["sources"].items()}
    cursor = meta.get("walk", DataCursor(1, meta["seed"]).__dict__)
    names = [name for name in (*OrderConfig.model_fields, "function") if name in meta and name != "first_step"]
    order = {name: meta[name] for name in names} | {"walk": cursor}
    result = {"next_step": step + 1, "steps": meta["steps"], "rows": rows, "chunks": chunks, "order": order}
    if "end" in meta:
        # A block is packed as a whole, so its streams are at one position for all of its steps.
        places = next((part["start"] for part in meta["parts"] if part["first_step"] > step), meta["end"])
        streams = {name: [place, meta["function"]["streams"][name]] for name, (place, _) in places.items()}
        result["streams"] = start.get("streams", {}) | streams
    return result


def _resume_cursor(
    config: OrderConfig, checkpoint: Artifact, indexes: Mapping[str, ChunkIndex]
) -> tuple[DataCursor, dict[str, Any]]:
    """Returns the cursor after a checkpoint, and the position of every source: `rows` read and `chunks` of an epoch.

    A source whose number of chunks changes (by another row length or other documents) continues at the same fraction of
    its epoch, and so does one whose chunks are divided anew into long and short ones.
    """
    from stages.data.order.chunks import stream_name
    from stages.data.order.computed_order import FUNCTION_VERSION

    state = checkpoint.json("state.json")
    if (state["phase"], state["step"] + 1) != (config.phase, config.first_step):
        raise AtomError(
            f"checkpoint {checkpoint.key} stands after step {state['step']} of {state['phase']}, "
            f"and the order was to begin with step {config.first_step} of {config.phase}"
        )
    data_position = state["data_position"]
    previous_order = data_position["order"]
    chunks = data_position["chunks"] | {source: index.chunks for source, index in indexes.items()}

    # {stream: [position, chunks of an epoch]}; a phase that is not packed has one stream for each source.
    by_source = {name: [count, data_position["chunks"][name]] for name, count in data_position["rows"].items()}
    streams: dict[str, list[int]] = data_position.get("streams", by_source)
    places = {name: place for name, (place, _) in streams.items()}
    sizes: dict[str, int] = {}
    for source, index in indexes.items():
        # A stream that the checkpoint does not have begins at the fraction that was read of the whole source.
        of_source = [streams[name] for name in streams if name.partition("/")[0] == source]
        source_place = sum(place for place, _ in of_source)
        source_epoch = sum(epoch for _, epoch in of_source) if of_source else 1
        for pool in index.cut.pools:
            name = stream_name(source, pool)
            sizes[name] = index.count(pool)
            place, epoch = streams.get(name, (source_place, source_epoch))
            # Rounded up, so that no chunk that was read comes again.
            places[name] = -(-place * sizes[name] // epoch)

    rows = data_position["rows"]
    # In a packed phase rows say nothing about the position in a stream.
    if not config.pack:
        rows = rows | {source: places[source] for source in indexes}
    start = {"rows": rows, "chunks": chunks}
    if config.pack:
        start["streams"] = {name: [place, sizes.get(name) or streams[name][1]] for name, place in places.items()}

    # Through JSON, because the checkpoint has lists where the config has tuples.
    requested = json.loads(json.dumps(settings(config)))
    previous = {name: value for name, value in previous_order.items() if name not in ("walk", "function")}
    # Equal settings only give equal rows with the same version of the function.
    same_function = previous_order.get("function", {}).get("version") == FUNCTION_VERSION
    if same_function and requested == previous and chunks == data_position["chunks"]:
        return DataCursor(**previous_order["walk"]), start
    return DataCursor(config.first_step, previous_order["walk"]["seed"], places), start


def estimate(config: OrderConfig) -> Estimate:
    """Returns the estimate, by figures of docs/lab-log.md.

    The process that joins the blocks reads the places of all chunks.
    """
    rows = chunks = config.rows_from(config.first_step)
    if config.pack:
        # Chunks of documents are assumed to have 1,000 tokens.
        chunks = rows * max(1, config.sequence_length // 1000)
    table_bytes = ROW_BYTES * chunks
    return Estimate(
        cpu_seconds=2 + chunks * (3.7e-6 if config.pack else 2.6e-6),
        serial_seconds=2 + chunks * 0.2e-6,
        tokens=rows * config.sequence_length,
        memory_bytes=MEMORY_BYTES,
        disk_bytes=table_bytes,
        published=(Published("dataset", f"order/{config.phase}", config.blocks, table_bytes),),
    )


STAGE = Stage(
    "order", VERSION, OrderConfig, run, estimate=estimate, shards=lambda config: config.blocks, run_shard=run_shard
)
