"""The function of a published order, and the steps in which it reads documents.

The function is stated in the order's meta.json. With the tables of documents it gives these steps without a search of
the order's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.parts import part_file
from release import scratch
from release.facts.published_tables import read_json
from release.tracing.release_data import select_rows
from stages.data.order.chunks import ChunkIndex, Cut, Place, seal_index
from stages.data.order.computed_order import FUNCTION_VERSION, ComputedOrder
from stages.data.order.order_config import DataCursor, OrderConfig
from stages.data.order.shards import document_files

Meta = Mapping[str, Any]


def is_function(meta: Meta) -> bool:
    """Returns True if this code computes the rows of the order."""
    return bool(meta.get("function", {}).get("version") == FUNCTION_VERSION)


def config_of(meta: Meta) -> OrderConfig:
    return OrderConfig.model_validate({name: meta[name] for name in OrderConfig.model_fields if name in meta})


def cut_of(meta: Meta) -> Cut:
    long = meta.get("long_documents")
    return Cut(meta["sequence_length"], long["over"] if long else None)


def cursor_of(meta: Meta) -> DataCursor:
    return DataCursor(**meta["walk"]) if "walk" in meta else DataCursor(1, meta["seed"])


def starts_of(meta: Meta) -> dict[int, dict[str, Place]]:
    """Returns the place of each stream of a packed phase at each block and at the end.

    It is empty for other phases.
    """
    if not meta.get("pack"):
        return {}
    places = [*(part["start"] for part in meta["parts"]), meta["end"]]
    return {n: {name: Place(*place) for name, place in start.items()} for n, start in enumerate(places)}


Places = Mapping[str, tuple[str, int]]
"""{id: the source and the part of a training document}"""


MOST_EPOCHS = 10_000
"""The most epochs of a source; with more, a search of its rows is faster than looking them up."""


def steps_by_file(data: Path, order: Path, places: Places) -> dict[Path, range] | None:
    """Returns {file of an order: the first to the last of its steps in which it may read the documents}.

    None if the order is no function of the tables of documents, so that its rows have to be searched.

    Args:
        data: A dataset folder.
        order: The folder of one of its orders, not of an earlier run.
        places: The places of the documents.
    """
    meta = read_json(order / "meta.json")
    try:
        if not is_function(meta):
            return None
        with scratch.folder() as work:
            return _look_up(data, order, places, meta, work)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # `atom verify` says what is wrong in it
        return None


def _look_up(data: Path, order: Path, places: Places, meta: Meta, work: Path) -> dict[Path, range] | None:
    config, cursor = config_of(meta), cursor_of(meta)
    starts, cut = starts_of(meta), cut_of(meta)
    # Without the places at each block the streams would have to be read from the start.
    if config.pack and len(starts) != config.blocks + 1:
        return None
    files, steps = document_files(data / "tokens"), dict[Path, range]()
    ids_by_part: dict[tuple[str, int], list[str]] = {}
    for id, place in sorted(places.items()):
        ids_by_part.setdefault(place, []).append(id)
    for source in sorted({source for source, _ in ids_by_part} & config.mix.keys()):
        parts = [(part, seal_index(work, file, source, part, cut)) for part, file in files[source]]
        index = ChunkIndex(parts, cut)
        reads = config.rows_from(cursor.first_step) * config.mix[source]
        if config.pack:
            ends = starts[config.blocks].items()
            reads = sum(place.position for stream, place in ends if stream.partition("/")[0] == source)
        # The tables are not those of the order, or are read so often that a search of the rows is faster.
        if index.chunks != meta["sources"][source]["chunks"] or reads > MOST_EPOCHS * index.chunks:
            return None
        computed = ComputedOrder(config, {source: index}, cursor, order, starts=starts)
        for (_, part), ids in ((place, ids) for place, ids in ids_by_part.items() if place[0] == source):
            table = data / "tokens/documents" / source / part_file(part)
            for row in select_rows(table, ["ordinal"], ("id", "in", ids), ("split", "=", "train")):
                for block, here in computed.blocks_of(source, part, row["ordinal"]).items():
                    file = order / part_file(block)
                    known = steps.get(file, here)
                    steps[file] = range(min(known.start, here.start), max(known.stop, here.stop))
    return dict(sorted(steps.items()))
