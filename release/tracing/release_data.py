"""The files of a release, or of its data repository alone, that `atom trace` reads.

An order's meta.json states its function. With the tables of documents it gives the steps that read a document, without
a search of the order's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.parts import part_file
from release import layout, schema, scratch
from release.facts import training
from release.facts.data_facts import earlier_orders
from release.facts.published_tables import read_json
from release.layout import EXPORTED, all_files, disposition_files, kept_files, numbered, when
from release.opened_release import Release
from stages.data.order.chunks import ChunkIndex, Cut, Place, seal_index
from stages.data.order.computed_order import FUNCTION_VERSION, ComputedOrder
from stages.data.order.order_config import DataCursor, OrderConfig
from stages.data.order.shards import document_files
from stages.formats.table import column_names, read_table

Rows = list[dict[str, Any]]
Progress = Callable[[str], None]
Meta = Mapping[str, Any]
"""The content of meta.json of an order"""
Places = Mapping[str, tuple[str, int]]
"""{id: the source and the part of a training document}"""
MOST_EPOCHS = 10_000
"""The most epochs of a source; with more, a search of its rows is faster than looking them up."""


@dataclass(frozen=True)
class OrderPart:
    """Steps of a phase that followed one order.

    Attributes:
        folder: The folder of the order.
        first: The first step.
        last: The last step; inf of the newest order.
    """

    folder: Path
    first: int
    last: float


@dataclass(frozen=True)
class ReleaseCheckpoint:
    """A published checkpoint.

    Attributes:
        phase: The phase.
        step: The step.
        folder: The name of its folder.
    """

    phase: str
    step: int
    folder: str


@dataclass(frozen=True)
class ReleaseData:
    """The data of a release, or of its pulled data repository.

    Attributes:
        opened: The folder.
    """

    opened: Release

    @property
    def release(self) -> Path | None:
        """The folder of the release; None for a data repository."""
        return self.opened.root if self.opened.is_whole else None

    @property
    def data(self) -> Path:
        """The folder of the data."""
        return self.opened.dataset

    @classmethod
    def locate(cls, folder: Path) -> ReleaseData:
        """Opens a release folder or a data repository.

        Raises AtomError if a folder is neither, and CheckFailed if it states another version.
        """
        schema.require_readable(folder)
        for opened in (Release(folder), Release(folder, "dataset")):
            if layout.has_documents(opened.dataset):
                return cls(opened)
        raise AtomError(
            f"{folder} is neither a release nor its data repository: it has no dispositions; give the folder that "
            "`atom build` made, or a pulled data repository"
        )

    def name(self, path: Path) -> str:
        """Returns the path of a file or folder in the data."""
        return path.relative_to(self.data).as_posix()

    def folders(self) -> list[Path]:
        """Returns the folder of this run's data, and those of the data of earlier runs."""
        return [self.data, *sorted(self.data.glob("earlier/*"))]

    def dispositions(self) -> list[Path]:
        """Returns the tables of dispositions: those of this run before those of earlier runs."""
        files = [path for folder in self.folders() for path in all_files(disposition_files(folder))]
        return [path for path in files if path.exists()]

    def kept(self) -> list[Path]:
        """Returns the tables of kept documents: those of this run before those of earlier runs."""
        return [path for folder in self.folders() for path in all_files(kept_files(folder))]

    def orders(self) -> dict[str, list[OrderPart]]:
        """Returns {phase: the orders that it followed}, both in the order of training."""
        parts_by_phase = {}
        final_orders = {folder.name: folder for folder in layout.orders(self.data)}
        for phase in sorted(final_orders, key=when):
            folders = [*earlier_orders(self.data, phase), final_orders[phase]]
            first_steps = [int(read_json(folder / "meta.json").get("first_step", 1)) for folder in folders]
            # Each order was followed up to the step before the next one began.
            last_steps = [*(n - 1 for n in first_steps[1:]), float("inf")]
            parts_by_phase[phase] = [OrderPart(*part) for part in zip(folders, first_steps, last_steps, strict=True)]
        return parts_by_phase

    def weight_updates(self, order: Path) -> Callable[[int], bool | None]:
        """Returns a function from a step to whether it updated the weights; None if the log is not available.

        `order` is the folder of an order, or of the tables of a phase that samples its data.
        """
        log = self.release and self.release / f"evidence/training/{order.name}/training.jsonl"
        if not log or not log.exists() or order.parent.name not in ("order", "rl"):
            return lambda step: None
        # A line with a loss is of an update, unless the update was skipped.
        steps = {line["step"] for line in training.read(log) if "loss" in line and not line.get("skipped")}
        return lambda step: step in steps

    def checkpoints(self) -> list[ReleaseCheckpoint] | None:
        """Returns the published checkpoints by order of training; None if they are not available."""
        if self.release is None or not (self.release / "checkpoints").is_dir():
            return None
        names = [path.parent.name for path in self.release.glob("checkpoints/*/state.json")]
        checkpoints = []
        for name in names:
            phase, _, step = name.rpartition("-step-")
            checkpoints.append(ReleaseCheckpoint(phase, int(step), name))
        return sorted(checkpoints, key=lambda checkpoint: (when(checkpoint.phase), checkpoint.step))

    def models(self) -> list[str]:
        """Returns names of the exported models, by order of training."""
        names = (path.parent.name for path in self.data.glob("evaluation/*/scores.json"))
        return sorted((name for name in names if numbered(name)[0] in EXPORTED), key=when)

    def unknown(self, checkpoints: bool = False) -> list[str]:
        """Lists what these files do not state about steps, one sentence each.

        With `checkpoints`, the sentences are about checkpoints, too.
        """
        sentences = []
        if checkpoints and self.checkpoints() is None:
            sentences.append("which checkpoints include a step: they stand in the whole release only")
        if self.release is None or not (self.release / "evidence/training").is_dir():
            sentences.append("which steps moved no weight: the logs of training stand in the whole release only")
        # An earlier run's order is published, and its log is not.
        elif any(self.data.glob("earlier/order-*")):
            sentences.append("which steps of earlier runs moved no weight: their logs are not published")
        return sentences


def select_rows(files: Path | Sequence[Path], columns: Sequence[str], *filters: tuple[str, str, Any]) -> Rows:
    """Reads the rows of a table, or of its parts, that pass (column, comparison, value) filters.

    Row groups are read whose statistics allow a match. Raises AtomError for a damaged table.
    """
    # No row is in an empty list, so no table is opened.
    if any(comparison == "in" and not values for _, comparison, values in filters):
        return []
    rows: Rows = []
    for path in [files] if isinstance(files, Path) else files:
        if missing := sorted({*columns, *(name for name, _, _ in filters)} - {*column_names(path)}):
            raise AtomError(f"{path} has no column {missing[0]}; verify this copy")
        rows += read_table(path, list(columns), list(filters)).to_pylist()
    return rows


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
