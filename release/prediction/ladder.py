"""`atom ladder`: fits a law with its bands to runs, and predicts the next run. It starts nothing.

Points come from sealed runs in `$ATOM_HOME`, or from a file of points that others measured.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from pipeline.core import atomic_files, json_files
from pipeline.core.errors import AtomError
from pipeline.core.store import Store
from pipeline.core.text import escaped, short
from pipeline.graph.dag import Graph
from release.prediction import sealing
from stages.evaluation import scaling_laws
from stages.evaluation.scaling_laws import COLUMNS, FORMULA, LEVEL, Array, Band, Fit, band, published

# Version of the form of ladder.json.
SCHEMA = 1
# Places of the drawn law.
CURVE = 40
# Sizes with a color of their own in the plot; of more, all points have one.
MOST_SIZES = 6
# FLOPs of training for a parameter and token.
TRAIN = 6.0
# Sizes that are compared for the least loss.
GRID = 2000
# Points of a file: the refits of a band hold 16 kB for each.
MOST_POINTS = 2000
# {figure: its name in prediction.json of a release}
ALIASES = {"parameters": "active", "loss": "heldout_loss"}
ANY = TypeAdapter(Any)


@dataclass(frozen=True)
class Point:
    """A run.

    Attributes:
        name: The name of the run, or its place in a file.
        figures: Columns and value of a law, by name.
    """

    name: str
    figures: Mapping[str, float]


def read_file(path: Path) -> list[Point]:
    """Reads the points of a file. Columns and fields that the law does not have are not read.

    Args:
        path: A CSV file with a header, or a JSON file: a list of objects, or an object with `points`, such as
            prediction.json of a release, or ladder.json.

    Raises:
        AtomError: With the file, the point and the figure that is wrong.
    """
    try:
        text = json_files.read_text(path)
    except FileNotFoundError:
        raise AtomError(f"{json_files.printable(path)} does not exist; give a CSV or JSON file of points") from None
    if path.suffix == ".json":
        body = json_files.parse(text.encode(), path, ANY)
        rows = body.get("points") if isinstance(body, dict) else body
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise AtomError(f"{json_files.printable(path)} is no list of points, and has none in `points`")
    else:
        rows = list(csv.DictReader(io.StringIO(text)))
    if len(rows) > MOST_POINTS:
        raise AtomError(f"{json_files.printable(path)} has {len(rows)} points; at most {MOST_POINTS} are fitted")
    return [_point(row, f"{json_files.printable(path)}, point {number}") for number, row in enumerate(rows, 1)]


def _point(row: Mapping[str, Any], where: str) -> Point:
    name = row.get("name") or row.get("recipe") or where.rpartition(", ")[2]
    return Point(escaped(str(name), 80), {key: _stated_figure(row, key, where) for key in (*COLUMNS, "loss")})


def _stated_figure(row: Mapping[str, Any], name: str, where: str) -> float:
    # Published predictions have other names for some figures.
    stated = next((row[key] for key in (name, ALIASES.get(name, name)) if key in row), None)
    if stated is None:
        raise AtomError(f"{where} has no {name}; the law needs {', '.join((*COLUMNS, 'loss'))}")
    try:
        # In Python a bool is an int, but it is no figure.
        value = float(stated) if isinstance(stated, str | int | float) and not isinstance(stated, bool) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if not 0 < value < math.inf:
        raise AtomError(f"{where} has {name} = {escaped(str(stated), 40)}; it must be a number above 0")
    return value


def read_runs(graphs: Sequence[Graph], store: Store) -> list[Point]:
    """Reads the points of sealed runs: active parameters, tokens, FLOPs and held-out loss after pre-training.

    Raises:
        AtomError: If a stage is not sealed or has no such figures, or if runs were measured on different text.
    """
    # Losses on different text cannot lie on one law.
    for graph in graphs[1:]:
        sealing.require_same_text(graphs[0], graph)
    return [_pretrained(graph, store) for graph in graphs]


def size_of(graph: Graph) -> dict[str, float]:
    """Returns parameters, tokens and FLOPs of the pre-training of a recipe."""
    size = sealing.size_of(graph)
    return {"parameters": float(size["active"]), "tokens": float(size["tokens"]), "flops": float(size["flops"])}


def _pretrained(graph: Graph, store: Store) -> Point:
    size, artifact = size_of(graph), sealing.sealed(graph, sealing.NODE, store, sealing.NODE)
    loss = json.loads((artifact / "summary.json").read_text())["heldout_loss"]["last"]
    return Point(graph.recipe.config.name, {**size, "loss": float(loss)})


def frontier(fit: Fit, flops: Array) -> tuple[Array, Array, Array]:
    """Returns value, low and high of the least loss that training FLOPs buy, all [n]."""
    value, drawn = published(fit.parameters[None]), published(fit.draws)

    def least(law: dict[str, Array]) -> Array:
        e, a, b, alpha, beta = (law[name][:, None] for name in ("E", "A", "B", "alpha", "beta"))
        losses = []
        for budget in flops:
            # From one parameter up to the size that leaves one token of training.
            sizes = np.geomspace(1.0, budget / TRAIN, GRID)
            tokens = budget / (TRAIN * sizes)
            losses.append((e + a * sizes**-alpha + b * tokens**-beta).min(axis=1))
        return np.stack(losses, axis=1)

    curve, low_high = least(value)[0], least(drawn)
    bands = [band(float(middle), low_high[:, n]) for n, middle in enumerate(curve)]
    return curve, np.asarray([row.low for row in bands]), np.asarray([row.high for row in bands])


# Compute, the value there, and its band.
Points = list[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Expectation:
    """A run that is predicted.

    Attributes:
        name: Its name.
        figures: Its compute, by the columns of the law.
        band: The predicted value.
        remarks: Sentences on how far it extrapolates.
    """

    name: str
    figures: Mapping[str, float]
    band: Band
    remarks: Sequence[str]


@dataclass(frozen=True)
class Ladder:
    """The result of `atom ladder`.

    Attributes:
        points: The runs.
        fit: The law.
        expectations: The runs that are predicted.
    """

    points: Sequence[Point]
    fit: Fit
    expectations: Sequence[Expectation] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "formula": FORMULA,
            "level": LEVEL,
            "points": [{"name": point.name, **point.figures} for point in self.points],
            "fit": {name: asdict(row) for name, row in self.fit.published().items()},
            "residual": self.fit.rms,
            "predictions": [
                {"name": row.name, **row.figures, "loss": asdict(row.band), "remarks": list(row.remarks)}
                for row in self.expectations
            ],
        }


def make(points: Sequence[Point], following: Sequence[tuple[str, Mapping[str, float]]] = ()) -> Ladder:
    """Fits a law to points, and predicts runs by it.

    Args:
        points: The runs.
        following: (name, figures) of runs to predict.

    Raises:
        AtomError: If the points cannot carry the law.
    """
    try:
        columns = [[point.figures[name] for point in points] for name in COLUMNS]
        fit = scaling_laws.fit(columns, [point.figures["loss"] for point in points])
    except ValueError as error:
        raise AtomError(f"these {len(points)} points carry no answer: {error}") from None
    # A prediction far from the runs is marked, and not refused.
    expectations = [
        Expectation(name, figures, fit.predict([figures[column] for column in COLUMNS]), fit.extrapolates(figures))
        for name, figures in following
    ]
    return Ladder(points, fit, expectations)


def write(report: Mapping[str, Any], plot: bytes, folder: Path, name: str) -> None:
    """Writes a report and its plot into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_files.write(folder / f"{name}.json", json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    atomic_files.write(folder / f"{name}.png", plot)


def sentences(ladder: Ladder) -> list[str]:
    """Returns the lines that the command prints."""
    fit = ladder.fit
    lines = [f"{FORMULA}, fitted to {len(ladder.points)} points; bands of {LEVEL:.0%}"]
    lines += [f"  {name} = {_figure(row)}" for name, row in fit.published().items()]
    lines.append(f"  residual: {fit.rms:.2%} of the loss")
    for row in ladder.expectations:
        at = ", ".join(f"{short(row.figures[name])} {name}" for name in COLUMNS)
        lines.append(f"{row.name} ({at}): loss {_figure(row.band)}")
        lines += [f"  {remark}" for remark in row.remarks]
    return lines


def _figure(row: Band) -> str:
    return f"{row.value:.5g} ({row.low:.5g} to {row.high:.5g})"


def drawing(ladder: Ladder) -> tuple[Points, dict[str, Points]]:
    """Returns the least loss that compute buys by the law, with its band, and the runs and predictions by label.

    Compute is 6 N D.
    """
    at = [(_compute(point.figures), point.figures["loss"]) for point in ladder.points]
    points = {label: [(x, y, y, y) for x, y in sorted(rows)] for label, rows in _groups(ladder, at).items()}
    for row in ladder.expectations:
        points[f"{row.name}, predicted"] = [(_compute(row.figures), row.band.value, row.band.low, row.band.high)]
    shown = [x for rows in points.values() for x, *_ in rows]
    # From the smallest run to the largest one, predicted ones included.
    grid = np.geomspace(min(shown), max(shown), CURVE)
    law = zip(grid, *frontier(ladder.fit, grid), strict=True)
    return [(float(a), float(b), float(c), float(d)) for a, b, c, d in law], points


def _compute(figures: Mapping[str, float]) -> float:
    return TRAIN * math.prod(figures[name] for name in COLUMNS)


def _groups(ladder: Ladder, at: Sequence[tuple[float, float]]) -> dict[str, list[tuple[float, float]]]:
    """Returns the points by their size, if sizes are few."""
    sizes = [point.figures["parameters"] for point in ladder.points]
    are_few, groups = len(set(sizes)) <= MOST_SIZES, dict[str, list[tuple[float, float]]]()
    for size, row in sorted(zip(sizes, at, strict=True)):
        groups.setdefault(f"{short(size)} parameters" if are_few else "runs", []).append(row)
    return groups
