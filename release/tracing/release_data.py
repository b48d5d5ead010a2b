"""The files of a release, or of its data repository alone, that `atom trace` reads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from release import layout, schema
from release.facts import training
from release.facts.data_facts import earlier_orders
from release.facts.published_tables import BATCH, read_json
from release.layout import EXPORTED, all_files, disposition_files, kept_files, numbered, when
from release.opened_release import Release

Rows = list[dict[str, Any]]
Progress = Callable[[str], None]


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

    Reads the columns of the filters where the statistics of a row group allow a match, and the others where there is
    one. Raises AtomError for a damaged table.
    """
    # No row is in an empty list, so no table is opened.
    if any(comparison == "in" and not values for _, comparison, values in filters):
        return []
    return [row for path in ([files] if isinstance(files, Path) else files) for row in _select(path, columns, filters)]


def _select(path: Path, columns: Sequence[str], filters: Sequence[tuple[str, str, Any]]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    filter_columns = list(dict.fromkeys(name for name, _, _ in filters))
    try:
        with pq.ParquetFile(path) as file:
            if missing := sorted({*columns, *filter_columns} - {*file.schema_arrow.names}):
                raise AtomError(f"{path} has no column {missing[0]}; verify this copy")
            for group in range(file.num_row_groups):
                # Statistics rule most groups out before any of their rows is read.
                if not all(_may_hold(file.metadata.row_group(group), *each) for each in filters):
                    continue
                # The columns of the filters first: texts are read only where a row passes.
                positions = _positions(file, group, filter_columns, filters)
                first = 0
                batches = file.iter_batches(BATCH, row_groups=[group], columns=list(columns))
                for batch in batches if len(positions) else ():
                    start, stop = (bisect_left(positions, number) for number in (first, first + len(batch)))
                    taken = batch.take(pa.array([position - first for position in positions[start:stop]], pa.int64()))
                    yield from taken.select(list(columns)).to_pylist()
                    first += len(batch)
                    if stop == len(positions):
                        break
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise AtomError(f"{path} cannot be read as Parquet ({reason}); pull or build it again") from None


def _may_hold(group: Any, column: str, comparison: str, value: Any) -> bool:
    """Returns True if the statistics of a row group allow a value that passes a filter."""
    indices = (number for number in range(group.num_columns) if group.column(number).path_in_schema == column)
    statistics = next((group.column(number).statistics for number in indices), None)
    # Without statistics the row group has to be read.
    if statistics is None or not statistics.has_min_max:
        return True
    low, high = statistics.min, statistics.max
    try:
        if comparison == "in":
            return any(low <= each <= high for each in value)
        if comparison == "=":
            return bool(low <= value <= high)
        return bool(low <= value if comparison == "<=" else value <= high)
    except TypeError:  # statistics of another type
        return True


def _positions(file: Any, group: int, columns: list[str], filters: Sequence[tuple[str, str, Any]]) -> list[int]:
    """Returns the numbers of the rows of a row group that pass the filters, in order."""
    import pyarrow as pa
    import pyarrow.compute as pc

    compare = {"=": pc.equal, "<=": pc.less_equal, ">=": pc.greater_equal}
    positions: list[int] = []
    first = 0
    for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
        mask = None
        for name, comparison, value in filters:
            column = batch.column(name)
            if comparison == "in":
                passes = pc.is_in(column, value_set=pa.array(list(value), column.type))
            else:
                passes = pc.fill_null(compare[comparison](column, value), False)
            mask = passes if mask is None else pc.and_(mask, passes)
        positions += [first + number for number in pc.indices_nonzero(mask).to_pylist()]
        first += len(batch)
    return positions
