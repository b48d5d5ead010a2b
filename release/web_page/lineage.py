"""The artifacts of a release and their inputs, as a graph and as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from pipeline.core import provenance
from release.layout import STATEMENTS
from release.opened_release import Release
from release.standards.standard_facts import segment

COLUMN, ROW, BOX, MARGIN = 166, 32, 144, 8
MOST_ALIKE = 6
"""Boxes of one stage in a column of the graph; more of them are one box."""
MANIFESTS = "evidence/manifests"


@dataclass
class Product:
    """An artifact.

    Attributes:
        node: Its node; its key if it is of an earlier run.
        key: Its key.
        digest: Its digest.
        stage: The stage that made it.
        statement: The path of the statement on the attempt that made it.
        inputs: {role: node} of its inputs.
        seconds: Wall time of that attempt.
        starts: The starts of training in that attempt.
        failed: Number of attempts that ended without it.
        checkpoint: True for a checkpoint of a phase.
    """

    node: str
    key: str
    digest: str
    stage: str = ""
    statement: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    starts: list[provenance.Start] = field(default_factory=list)
    failed: int = 0
    checkpoint: bool = False


def read_products(release: Release) -> dict[str, Product]:
    """Returns {node: product}, with the artifacts of earlier runs by their keys."""
    products = {m.key: Product(node, m.key, m.digest) for node, m in release.manifests.items()}
    for path, body in release.statements.items():
        parameters = provenance.parameters_of(body)
        product = products.get(parameters["key"])
        if product is None:
            continue
        product.stage, product.checkpoint = parameters["stage"], provenance.phase_of(body) is not None
        # The statement of an attempt that failed has no such subject.
        if {"name": product.key, "digest": {"sha256": product.digest}} not in body["subject"]:
            product.failed += 1
            continue
        product.statement = f"{STATEMENTS}/{path.name}"
        product.inputs = provenance.material_keys(body)
        product.seconds = float(provenance.usage(body).get("wall_seconds", 0.0))
        product.starts = provenance.starts(body)
    # Statements name inputs by key; a reader knows nodes.
    nodes = {product.key: product.node for product in products.values()}
    for product in products.values():
        # An input of which the release has no manifest keeps its key.
        product.inputs = {role: nodes.get(key, key) for role, key in product.inputs.items()}
    return {product.node: product for product in sorted(products.values(), key=lambda each: each.node)}


def _boxes(products: Mapping[str, Product]) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Returns ({box: its artifacts}, {artifact: its column}) of the graph, without checkpoints."""
    drawn = {node: p for node, p in products.items() if not p.checkpoint}
    depth = _depths(drawn)
    alike: dict[tuple[int, str], list[str]] = {}
    for node in sorted(drawn):
        alike.setdefault((depth[node], drawn[node].stage), []).append(node)
    boxes: dict[str, list[str]] = {}
    for (column, stage), nodes in alike.items():
        # Hundreds of equal boxes, such as parts of a source, would hide the rest.
        if len(nodes) > MOST_ALIKE and stage:
            boxes[f"{stage}: {len(nodes)} in column {column + 1}"] = nodes
        else:
            boxes |= {node: [node] for node in nodes}
    return boxes, depth


def drawing(products: Mapping[str, Product]) -> Markup:
    """Returns the graph as SVG: an artifact stands to the right of its inputs. Checkpoints are not drawn.

    Each box is a link to the statement of its artifact; one that stands for several, to the folder of statements.
    """
    drawn, depth = _boxes(products)
    box_of = {node: box for box, nodes in drawn.items() for node in nodes}
    columns: dict[int, list[str]] = {}
    for box in sorted(drawn):
        columns.setdefault(depth[drawn[box][0]], []).append(box)
    inputs = {
        box: sorted({box_of[i] for node in nodes for i in products[node].inputs.values() if i in box_of} - {box})
        for box, nodes in drawn.items()
    }
    # A box stands at the mean height of its inputs, so that few edges cross.
    places: dict[str, tuple[float, float]] = {}
    for number, column in sorted(columns.items()):
        order = sorted(column, key=lambda box: (_height(inputs[box], places), box))
        for row, box in enumerate(order):
            places[box] = MARGIN + number * COLUMN, MARGIN + row * ROW
    height = MARGIN + ROW * max((len(column) for column in columns.values()), default=1)
    edges = Markup("").join(_edge(places[source], places[box]) for box in drawn for source in inputs[box])
    boxes = Markup("").join(_box(box, [products[node] for node in nodes], *places[box]) for box, nodes in drawn.items())
    width = MARGIN + COLUMN * (max(columns, default=0) + 1)
    return Markup('<svg width="{}" height="{}" viewBox="0 0 {} {}">{}{}</svg>').format(
        width, height, width, height, edges, boxes
    )


def _depths(products: Mapping[str, Product]) -> dict[str, int]:
    """Returns the length of the longest way to each product."""
    # Without recursion, since a graph may be deep; bounded, since a forged one may have a circle.
    depth = dict.fromkeys(products, 0)
    for _ in products:
        changed = False
        for node, product in products.items():
            deepest = max((depth[i] + 1 for i in product.inputs.values() if i in depth and i != node), default=0)
            if deepest > depth[node] and deepest < len(products):
                depth[node], changed = deepest, True
        if not changed:
            break
    return depth


def _height(inputs: list[str], places: Mapping[str, tuple[float, float]]) -> float:
    """Returns the mean height of a box's inputs."""
    heights = [places[box][1] for box in inputs if box in places]
    return sum(heights) / len(heights) if heights else 0.0


def _edge(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    (x1, y1), (x2, y2) = (start[0] + BOX, start[1] + 12), (end[0], end[1] + 12)
    bend = max(18.0, (x2 - x1) / 2)
    return Markup('<path class="edge" d="M{} {}C{} {} {} {} {} {}"/>').format(
        x1, y1, x1 + bend, y1, x2 - bend, y2, x2, y2
    )


def _box(name: str, products: Sequence[Product], x: float, y: float) -> Markup:
    if len(products) > 1:
        name, path = f"{len(products)} × {products[0].stage}", f"{STATEMENTS}/"
    else:
        path = products[0].statement or f"{MANIFESTS}/{products[0].node}.json"
    label = name if len(name) <= 21 else f"{name[:20]}…"
    return Markup(
        '<a class="box" href="../{}" aria-label="{}"><rect x="{}" y="{}" width="{}" height="24" rx="5"/>'
        '<text x="{}" y="{}">{}</text></a>'
    ).format(segment(path, "/"), f"artifacts: {name}", x, y, BOX, x + 8, y + 16, label)
