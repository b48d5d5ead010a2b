"""The points of a ladder: from sealed runs in `$ATOM_HOME`, or from a file of points that others measured."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.core import json_files
from pipeline.core.errors import AtomError
from pipeline.core.store import Store
from pipeline.core.text import escaped
from pipeline.graph.dag import Graph
from release.prediction import sealing
from stages.evaluation.scaling_laws import COLUMNS

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
    return Point(escaped(str(name), 80), {key: _figure(row, key, where) for key in (*COLUMNS, "loss")})


def _figure(row: Mapping[str, Any], name: str, where: str) -> float:
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
