"""The files of a release, or of its data repository alone, that `atom trace` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from release import schema
from release.assembly import training
from release.assembly.data_facts import earlier_orders
from release.assembly.published_tables import read_json
from release.layout import EXPORTED, numbered, when
from stages.data.table import read_table

Rows = list[dict[str, Any]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class OrderPart:
    """Steps of a phase that followed one order. folder: of the order; first, last: steps; last is inf of the newest."""

    folder: Path
    first: int
    last: float


@dataclass(frozen=True)
class ReleaseCheckpoint:
    """A published checkpoint. folder: its name."""

    phase: str
    step: int
    folder: str


@dataclass(frozen=True)
class ReleaseData:
    """release: a release folder, None for a pulled data repository. data: the folder of its data."""

    release: Path | None
    data: Path

    @classmethod
    def locate(cls, folder: Path) -> ReleaseData:
        """Raises AtomError if a folder is neither a release nor a data repository."""
        for release, data in ((folder, folder / "dataset"), (None, folder)):
            if (data / "dispositions.parquet").exists():
                return cls(release, data)
        raise AtomError(
            f"{folder} is neither a release nor its data repository: it has no dispositions.parquet; give the folder "
            "that `atom build` made, or a pulled data repository"
        )

    def name(self, path: Path) -> str:
        """The path of a file or folder in the data."""
        return path.relative_to(self.data).as_posix()

    def tables(self, pattern: str) -> list[Path]:
        """Files of the data: those of this run before those of earlier runs."""
        return sorted(self.data.glob(pattern)) + sorted(self.data.glob(f"earlier/*/{pattern}"))

    def orders(self) -> dict[str, list[OrderPart]]:
        """{phase: the orders that it followed}, both in the order of training."""
        parts_by_phase = {}
        final_orders = {schema.phase(p.parent): p.parent for p in self.data.glob("order/*/order.parquet")}
        for phase in sorted(final_orders, key=when):
            folders = [*earlier_orders(self.data, phase), final_orders[phase]]
            first_steps = [int(read_json(folder / "meta.json").get("first_step", 1)) for folder in folders]
            last_steps = [*(n - 1 for n in first_steps[1:]), float("inf")]
            parts_by_phase[phase] = [OrderPart(*part) for part in zip(folders, first_steps, last_steps, strict=True)]
        return parts_by_phase

    def weight_updates(self, order: Path) -> Callable[[int], bool | None]:
        """A function from a step of an order to whether it updated the weights; None if the log is not available."""
        log = self.release and self.release / f"evidence/training/{order.name}/training.jsonl"
        if not log or not log.exists() or order.parent.name != "order":
            return lambda step: None
        steps = {line["step"] for line in training.read(log) if "loss" in line and not line.get("skipped")}
        return lambda step: step in steps

    def checkpoints(self) -> list[ReleaseCheckpoint] | None:
        """By order of training; None if they are not available."""
        if self.release is None or not (self.release / "checkpoints").is_dir():
            return None
        names = [path.parent.name for path in self.release.glob("checkpoints/*/state.json")]
        phase_name = schema.reader(self.release).phase
        checkpoints = []
        for name in names:
            phase, _, step = name.rpartition("-step-")
            checkpoints.append(ReleaseCheckpoint(phase_name(phase), int(step), name))
        return sorted(checkpoints, key=lambda checkpoint: (when(checkpoint.phase), checkpoint.step))

    def models(self) -> list[str]:
        """Names of the exported models, by order of training."""
        names = (schema.model(path.parent) for path in self.data.glob("evaluation/*/scores.json"))
        return sorted((name for name in names if numbered(name)[0] in EXPORTED), key=when)

    def unknown(self, checkpoints: bool = False) -> list[str]:
        """What these files do not state about steps, one sentence each. checkpoints: about checkpoints too."""
        sentences = []
        if checkpoints and self.checkpoints() is None:
            sentences.append("which checkpoints include a step: they stand in the whole release only")
        if self.release is None or not (self.release / "evidence/training").is_dir():
            sentences.append("which steps moved no weight: the logs of training stand in the whole release only")
        elif any(self.data.glob("earlier/order-*")):
            sentences.append("which steps of earlier runs moved no weight: their logs are not published")
        return sentences


def select_rows(path: Path, columns: Sequence[str], *filters: tuple[str, str, Any]) -> Rows:
    """Rows of a table that pass (column, comparison, value) filters, with present names of columns. Raises AtomError
    for a damaged table."""
    # an empty set has no type for Arrow
    if any(comparison == "in" and not values for _, comparison, values in filters):
        return []
    stored = schema.columns(path, [*columns, *(name for name, _, _ in filters)])
    table = read_table(
        path, [stored[name] for name in columns], [(stored[n], comparison, value) for n, comparison, value in filters]
    )
    rows: Rows = table.rename_columns([*columns]).to_pylist()
    return rows
