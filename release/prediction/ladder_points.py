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
from stages.evaluation.ladder_laws import Form

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


def read_file(path: Path, form: Form) -> list[Point]:
    """Reads the points of a file. Columns and fields that the law does not have are not read.

    Args:
        path: A CSV file with a header, or a JSON file: a list of objects, or an object with `points`, such as
            prediction.json of a release, or ladder.json.
        form: The law.

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
    return [_point(row, form, f"{json_files.printable(path)}, point {number}") for number, row in enumerate(rows, 1)]


def _point(row: Mapping[str, Any], form: Form, where: str) -> Point:
    name = row.get("name") or row.get("recipe") or where.rpartition(", ")[2]
    return Point(escaped(str(name), 80), {key: _figure(row, key, form, where) for key in (*form.columns, form.value)})


def _figure(row: Mapping[str, Any], name: str, form: Form, where: str) -> float:
    # Published predictions have other names for some figures.
    stated = next((row[key] for key in (name, ALIASES.get(name, name)) if key in row), None)
    if stated is None:
        raise AtomError(f"{where} has no {name}; the law {form.name} needs {', '.join((*form.columns, form.value))}")
    try:
        # In Python a bool is an int, but it is no figure.
        value = float(stated) if isinstance(stated, str | int | float) and not isinstance(stated, bool) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    # Reinforcement begins at no compute, and its score may be 0 or 1.
    if form.name == "reinforcement":
        is_score = name == "score"
        valid = 0 <= value <= 1 if is_score else 0 <= value < math.inf
        limits = "a number from 0 to 1" if is_score else "a number from 0 on"
    elif name == "score":
        valid, limits = 0 < value < 1, "a number between 0 and 1"
    else:
        valid, limits = 0 < value < math.inf, "a number above 0"
    if not valid:
        raise AtomError(f"{where} has {name} = {escaped(str(stated), 40)}; it must be {limits}")
    return value


def read_runs(graphs: Sequence[Graph], store: Store, form: Form) -> list[Point]:
    """Reads the points of sealed runs.

    The pre-training laws have one for each run: active parameters, tokens, FLOPs and held-out loss after pre-training.
    Reinforcement has each measurement in the log of `rlvr`: tokens generated so far, and the mean over the kinds of
    validation. Inference has each k of the last model that answers problems: tokens of k answers, and pass@k.

    Raises:
        AtomError: If a stage is not sealed or has no such figures, or if runs were measured on different text.
    """
    # Losses on different text cannot lie on one law.
    if form.is_loss:
        for graph in graphs[1:]:
            sealing.require_same_text(graphs[0], graph)
        return [_pretrained(graph, store) for graph in graphs]
    read = _reinforced if form.name == "reinforcement" else _answered
    return [point for graph in graphs for point in read(graph, store)]


def size_of(graph: Graph) -> dict[str, float]:
    """Returns parameters, tokens and FLOPs of the pre-training of a recipe."""
    size = sealing.size_of(graph)
    return {"parameters": float(size["active"]), "tokens": float(size["tokens"]), "flops": float(size["flops"])}


def _pretrained(graph: Graph, store: Store) -> Point:
    size, artifact = size_of(graph), sealing.sealed(graph, sealing.NODE, store, sealing.NODE)
    loss = json.loads((artifact / "summary.json").read_text())["heldout_loss"]["last"]
    return Point(graph.recipe.config.name, {**size, "loss": float(loss)})


def _reinforced(graph: Graph, store: Store) -> list[Point]:
    from release.facts import training

    name = graph.recipe.config.name
    sealing.require_node(graph, "rlvr", "trains no policy")
    log = sealing.sealed(graph, "rlvr", store, "rlvr") / "training.jsonl"
    points = [
        Point(f"{name}, step {line['step']}", {"compute": float(line["generated"]), "score": sum(kinds) / len(kinds)})
        for line in training.stream(log)
        if "generated" in line and (kinds := list(line.get("validation", {}).values()))
    ]
    if not points:
        raise AtomError(f"the log of rlvr of {name} has no validation; give its recipe rlvr.validation, and run it")
    return points


def _answered(graph: Graph, store: Store) -> list[Point]:
    name = graph.recipe.config.name
    # In the order of training, so the last one is that of the final model.
    nodes = [node for node in graph.nodes if node.startswith("solve-")]
    sealing.require_node(graph, nodes[-1] if nodes else "solve", "has no model that answers problems in conversation")
    scores = json.loads((sealing.sealed(graph, nodes[-1], store, nodes[-1]) / "scores.json").read_text())
    at = (scores["problems_all"] or {}).get("at", {})
    rows = [(int(k), float(row["tokens"]), float(row["pass"]["value"])) for k, row in at.items()]
    points = [
        Point(f"{name}, {nodes[-1]}, k = {k}", {"compute": tokens, "score": score})
        for k, tokens, score in sorted(rows)
        if 0 < score < 1
    ]
    if not points:
        raise AtomError(f"{nodes[-1]} of {name} has no pass@k between 0 and 1, so that no law can be fitted to it")
    return points
