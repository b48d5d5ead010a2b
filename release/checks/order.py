"""Checks the order of training.

It must be within the training documents, be the one that its function gives, and end at the last checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.core.parts import part_file, part_tables
from pipeline.core.store import sha256_file
from release.checks.check import BuildContext, Findings
from release.facts.published_tables import read_json, stream_batches
from release.layout import WITHOUT_ORDER, orders, phases_of
from release.opened_release import Release
from release.tracing import release_data
from stages.data.order.chunks import ChunkIndex, Cut, Place, seal_index
from stages.data.order.computed_order import ComputedOrder
from stages.data.order.order_stage import merkle_root
from stages.data.order.shards import document_files
from stages.formats.table import read_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Keys = NDArray[np.int64]

BLOCKS = 8
"""The maximum number of blocks of an order that are computed again; the SHA-256 of its meta.json draws them."""
MOST_PROBLEMS = 100
"""Segments of one order that are reported."""
COLUMNS = ["step", "row", "segment", "source", "part", "ordinal", "id", "offset", "length"]
ROWS = 65_536
"""Rows of an order in memory."""
Indexes = Mapping[str, ChunkIndex]


def segments(release: Release) -> Findings:
    """Checks that every segment of the order is within a training document, and that the order follows its function.

    So no held-out document was trained on. The function of an order must give its rows: those of all blocks, or of a
    sample of a large order.

    In memory is a part of the order and of the documents.
    """
    dataset, problems = release.dataset, []
    earlier = sorted(meta.parent for meta in (dataset / "earlier").glob("order-*/meta.json"))
    current = dataset / "tokens"
    # an earlier run may have had different documents, which are then beside its order
    tables = [*sorted(path for path in (dataset / "earlier").glob("tokenize-*") if path.is_dir()), current]
    published = orders(dataset) + earlier
    for order in published:
        meta, name = read_json(order / "meta.json"), order.relative_to(dataset).as_posix()
        with TemporaryDirectory() as work:
            cut = release_data.cut_of(meta)
            candidates = [
                read_documents(tokens, Path(work, str(number)), cut)
                for number, tokens in enumerate(tables if order in earlier else [current])
            ]
            wrong_segments = list(islice(_wrong_segments(order, candidates), MOST_PROBLEMS))
            problems += [f"{name}: {text}" for text in wrong_segments]
            if not wrong_segments and release_data.is_function(meta):
                fitting = next((indexes for indexes in candidates if _fits(meta, indexes)), candidates[-1])
                problems += [f"{name}: {text}" for text in _recompute(release, order, meta, fitting, Path(work))]
    return Findings(problems, compared=bool(published))


def read_documents(tokens: Path, work: Path, cut: Cut) -> dict[str, ChunkIndex]:
    """Returns the index of the training documents of each source, made in `work` from the published tables."""
    return {
        source: ChunkIndex([(part, seal_index(work, file, source, part, cut)) for part, file in files], cut)
        for source, files in document_files(tokens).items()
    }


def _fits(meta: Mapping[str, Any], indexes: Indexes) -> bool:
    """Returns True if the sources have as many chunks as the order states."""
    return all(name in indexes and indexes[name].chunks == facts["chunks"] for name, facts in meta["sources"].items())


def _wrong_segments(order: Path, candidates: Sequence[Indexes]) -> Iterator[str]:
    """Yields a sentence for each segment that is no part of a training document, or is out of order."""
    import numpy as np
    import pyarrow.compute as pc

    previous: tuple[Keys, Keys] = np.full(1, -1), np.full(1, -1)
    for batch in stream_batches(sorted(order.glob("*.parquet")), COLUMNS, ROWS):
        columns = {name: batch[name].to_numpy().astype(np.int64) for name in COLUMNS if name not in ("source", "id")}
        known, within = np.zeros(len(batch), bool), np.zeros(len(batch), bool)
        end = columns["offset"] + columns["length"]
        proper = (columns["offset"] >= 0) & (columns["length"] > 0)
        for source in batch["source"].unique().to_pylist():
            rows = np.flatnonzero(pc.equal(batch["source"], source).to_numpy(zero_copy_only=False))
            # An order of an earlier run fits the documents of one of several runs, and nothing states of which.
            for indexes in candidates:
                if source in indexes:
                    tokens, ids = indexes[source].documents_at(columns["part"][rows], columns["ordinal"][rows])
                    same = pc.equal(ids, batch["id"].take(rows).cast(ids.type)).fill_null(False)
                    same = same.to_numpy(zero_copy_only=False)
                    known[rows] |= same
                    within[rows] |= same & proper[rows] & (end[rows] <= tokens)
        # One number for step and row, so that batches are compared without a loop.
        places = columns["step"] << 32 | columns["row"], columns["segment"]
        row_key, segment_key = (np.concatenate([old, new]) for old, new in zip(previous, places, strict=True))
        previous = row_key[-1:], segment_key[-1:]
        later = (row_key[1:] > row_key[:-1]) | (row_key[1:] == row_key[:-1]) & (segment_key[1:] > segment_key[:-1])
        for n in np.flatnonzero(~(within & later)).tolist():
            segment = f"step {columns['step'][n]} row {columns['row'][n]}"
            if not known[n]:
                yield f"{segment} is {batch['id'][n].as_py()}, which is no training document"
            elif not within[n]:
                yield f"{segment} reaches beyond the end of {batch['id'][n].as_py()}"
            if not later[n]:
                yield f"{segment} is out of order or doubled"


def _recompute(release: Release, folder: Path, meta: Mapping[str, Any], indexes: Indexes, work: Path) -> Iterator[str]:
    """Yields a sentence for each block that is not the one that the order's function gives.

    Its rows differ, or its places in the streams.
    """
    config = release_data.config_of(meta)
    # Computing blocks of other documents would only give a misleading difference.
    if not _fits(meta, indexes):
        yield "the documents do not have the chunks that meta.json states"
        return
    parts, end = meta["parts"], meta.get("end")
    if len(parts) != config.blocks:
        yield f"meta.json lists {len(parts)} parts instead of {config.blocks}"
        return
    names = [part_file(n) for n in range(config.blocks)]
    if [file.name for file in part_tables(folder)] != names:
        yield f"its files are not the parts {names[0]} to {names[-1]} that meta.json lists"
        return
    blocks: Sequence[int] = range(config.blocks)
    starts: dict[int, dict[str, Place]] = {}
    # Computing all blocks of a large order again takes as long as making them.
    if config.blocks > BLOCKS:
        # The sample follows from the file, so that every reader checks the same blocks.
        blocks = sorted(random.Random(sha256_file(folder / "meta.json")).sample(blocks, BLOCKS))
        starts = release_data.starts_of(meta)
    used = {name: indexes[name] for name in sorted(config.mix)}
    order = ComputedOrder(config, used, release_data.cursor_of(meta), work, starts=starts)
    if order.function != meta["function"]:
        yield "meta.json states another function than its settings give"
    if merkle_root(part["sha256"] for part in parts) != meta["merkle_root"]:
        yield "merkle_root of meta.json is not the root over its parts"
    for n in blocks:
        name = names[n]
        stated = {key: parts[n][key] for key in ("first_step", "last_step")}
        steps = config.steps_of_block(n)
        # The last step is part of the block.
        if stated != {"first_step": steps.start, "last_step": steps.stop - 1}:
            yield f"meta.json states other steps of {name} than its settings give"
        if config.pack and (problem := _wrong_place(order, n, parts, end)):
            yield f"{name} {problem}"
            continue
        table, _ = order.block(n)
        if release.digest(folder / name) != parts[n]["sha256"] or not read_table(folder / name).equals(table):
            yield f"{name} differs from the rows that the function of the order gives"


def _wrong_place(order: ComputedOrder, n: int, parts: Sequence[Any], end: Mapping[str, Any] | None) -> str | None:
    """Returns the problem of the places in the streams where a block begins and ends; None if they are right.

    Of a sampled block, the places are taken from meta.json: they must be next to the tokens at which they should be.
    """
    stated = [*(part["start"] for part in parts), end][n : n + 2]
    for number, places in zip((n, n + 1), stated, strict=True):
        if {name: list(place) for name, place in order.start(number).items()} != places:
            return "begins or ends at another place than meta.json states"
        targets = order.targets(number)
        for stream in order.streams:
            position, tokens = places[stream.name]
            before = tokens - int(stream.lengths(position - 1, position)[0]) if position else -1
            if not before < targets[stream.name] <= tokens:
                return f"begins or ends too early or too late in {stream.name}"
    for stream in order.streams:
        (first, tokens), (last, end_tokens) = (places[stream.name] for places in stated)
        if int(stream.lengths(first, last).sum()) != end_tokens - tokens:
            return f"does not hold the tokens of {stream.name} that meta.json states"
    return None


def checkpoints_and_order(build: BuildContext) -> Findings:
    """Checks that every phase has checkpoints, and an order from its first step to that of the last checkpoint."""
    rows = build.release.checkpoints
    orders, findings = build.release.data.order, Findings()
    findings.summary = f"{len(rows)} checkpoints; order of {', '.join(orders)}"
    for phase in phases_of(build.release.info.nodes):
        steps = [row.step for row in rows if row.phase == phase]
        if not steps:
            findings.problems.append(f"no checkpoint of {phase}; set {phase}.release_checkpoint_interval")
        elif phase in WITHOUT_ORDER:
            continue
        elif phase not in orders:
            findings.problems.append(f"no order index of {phase}; run its order stage")
        elif (first := orders[phase].parts[0].first_step) != 1:
            text = f"the order of {phase} begins with step {first}"
            findings.problems.append(f"{text}; the order that the checkpoint followed is missing")
        elif steps[-1] != orders[phase].steps:
            text = f"the last checkpoint of {phase} is step {steps[-1]}, the order has {orders[phase].steps} steps"
            findings.problems.append(f"{text}; finish the training stage")
    return findings
