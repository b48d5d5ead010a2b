"""Seals a prediction for a run before it begins, from the sealed smaller runs in `$ATOM_HOME`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core import environment, provenance
from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact, Store, sha256_file
from pipeline.graph.dag import Graph, Node
from pipeline.launch.attempt import PREDICTION, prediction_key
from release.facts import forecast
from release.facts.forecast import FILE, MODEL, PHASE, Point, Prediction, RunSize
from stages.evaluation import scaling_laws

VERSION = 1
"""The version of the stage in its statement."""
NODE, EVALUATION = PHASE, f"evaluate-{MODEL}"
"""The nodes whose artifacts a prediction needs of each smaller run."""


def seal(target: Graph, ladder: Sequence[Graph], store: Store) -> tuple[Artifact, Prediction]:
    """Seals the prediction for a recipe from the sealed runs of smaller ones.

    Args:
        target: The recipe.
        ladder: The recipes of the smaller runs.
        store: The store of all runs.

    Raises:
        AtomError: If a recipe has no pre-training, if that of the target has begun or has a prediction already, if a
            run of the ladder is not sealed or was measured on other data, or if the runs cannot carry a law.
    """
    node = pretraining(target)
    # The key follows from that of the run, so a run has one prediction.
    key = prediction_key(node.key)
    name = target.recipe.config.name
    if store.sealed(key):
        raise AtomError(f"{name} has the prediction {store.artifacts / key}; a run is predicted once")
    # A prediction after the first step could have seen the result: a ledger or a work folder shows a beginning.
    if begun(store, node.key):
        raise AtomError(f"{NODE} of {name} has begun ({node.key}); a prediction is sealed before that")
    points, materials = [], dict[str, Artifact]()
    for graph in ladder:
        _require_comparable(target, graph)
        artifacts = {role: sealed(graph, role, store, EVALUATION) for role in (NODE, EVALUATION)}
        points.append(_point(graph, artifacts))
        materials |= {f"{graph.recipe.config.name}/{role}": artifact for role, artifact in artifacts.items()}
    try:
        prediction = forecast.predict(RunSize(**size_of(target)), points)
    except ValueError as error:
        raise AtomError(f"the ladder of {name} carries no prediction: {error}; give --from other recipes") from None
    return write(prediction, materials, store, key, name), prediction


def begun(store: Store, key: str) -> bool:
    """Returns True if a run has left anything, were it only the record of an attempt."""
    return store.sealed(key) or any(provenance.read(store.ledger, key)) or store.work(key).exists()


def _require_comparable(target: Graph, graph: Graph) -> None:
    """Raises AtomError unless the texts, tokens, items and scoring of two runs are the same."""
    require_same_text(target, graph)
    if _scoring(target) != _scoring(graph):
        target_name, name = target.recipe.config.name, graph.recipe.config.name
        raise AtomError(f"{name} is evaluated in another way than {target_name}; make their evaluation equal")


def require_same_text(target: Graph, graph: Graph) -> None:
    """Raises AtomError unless the texts, tokens and rows of two runs are the same, as comparable losses need."""
    target_name, name = target.recipe.config.name, graph.recipe.config.name
    for node in ("tokenize", "items"):
        if target.nodes[node].key != graph.nodes[node].key:
            raise AtomError(f"{name} has other data than {target_name}: its {node} has another key; change its recipe")

    target_phase, phase = (vars(pretraining(run).config)["phase"] for run in (target, graph))
    for field in ("sequence_length", "validation"):
        target_value, value = _compared_value(target_phase, field), _compared_value(phase, field)
        if target_value != value:
            raise AtomError(
                f"{name} has {NODE}.{field} = {value}, and {target_name} has {target_value}; make them equal"
            )


def _compared_value(phase: Any, field: str) -> Any:
    """Returns what must be equal in a setting of two phases."""
    value = getattr(phase, field)
    # How often a run measures does not change the loss at its end; the number of held-out rows does.
    return value.rows if field == "validation" else value


def _scoring(graph: Graph) -> Any:
    """Returns the settings of the evaluation that are not about the model."""
    config = graph.nodes[EVALUATION].config.model_dump(mode="json")
    return {name: value for name, value in config.items() if name not in ("model", "expected", "shard")}


def require_node(graph: Graph, node: str, lack: str) -> None:
    """Raises AtomError for a recipe without a node.

    In the message, the words `lack` follow the name of the recipe, such as "trains no policy".
    """
    if node not in graph.nodes:
        raise AtomError(f"{graph.recipe.config.name} {lack}; give another recipe")


def pretraining(graph: Graph) -> Node:
    """Returns the node of pre-training. Raises AtomError for a recipe without it."""
    require_node(graph, NODE, "has no pre-training")
    return graph.nodes[NODE]


def sealed(graph: Graph, role: str, store: Store, until: str) -> Artifact:
    """Returns the artifact of a node. Raises AtomError if it is not sealed; a run must then reach the node `until`."""
    key = graph.nodes[role].key
    if not store.sealed(key):
        recipe = graph.recipe.config.name
        raise AtomError(f"{role} of {recipe} is not sealed; run it first: atom run {recipe} --until {until}")
    return store.open(key)


def size_of(graph: Graph) -> dict[str, Any]:
    """Returns the fields of RunSize of a recipe's pre-training. Raises AtomError if it has none, or reads no tokens."""
    node, name = pretraining(graph), graph.recipe.config.name
    # Any, since the type of a node's config does not tell the phase.
    config: Any = node.config
    vocabulary, phase = config.padded_vocab_size, config.phase
    if phase.merge:
        raise AtomError(f"{name} averages checkpoints, and a prediction is of the last one; leave out {NODE}.merge")
    # Batches may grow during training, so rows are counted step by step.
    slots = sum(phase.rows_of(step) for step in range(1, phase.steps + 1)) * phase.sequence_length
    if not slots:
        raise AtomError(f"{NODE} of {name} reads no tokens; give its recipe steps to train")
    per_token = config.model.flops_per_token(vocabulary, phase.sequence_length)
    active = config.model.parameters(vocabulary)["active"]
    return {"recipe": name, "key": node.key, "flops": slots * per_token, "tokens": slots, "active": active}


def _point(graph: Graph, artifacts: dict[str, Artifact]) -> Point:
    """Returns the point of a smaller run, from its artifacts by node."""
    summary = json.loads((artifacts[NODE] / "summary.json").read_text())
    scores = json.loads((artifacts[EVALUATION] / "scores.json").read_text())
    return Point(
        **size_of(graph),
        digest=artifacts[NODE].digest,
        scores_key=artifacts[EVALUATION].key,
        scores_digest=artifacts[EVALUATION].digest,
        heldout_loss=summary["heldout_loss"]["last"],
        bits_per_byte_all=scores["bits_per_byte_all"]["value"],
        accuracy_all=scores["accuracy_all"]["value"],
        items=scores["accuracy_all"]["n"],
    )


def write(prediction: Prediction, materials: dict[str, Artifact], store: Store, key: str, name: str) -> Artifact:
    """Seals a prediction with its statement.

    Args:
        prediction: The prediction.
        materials: The artifacts of its runs, by role.
        store: The store of all runs.
        key: The key to seal it under.
        name: The name of the recipe.
    """
    started = time.time()
    # A folder of its own: two commands at once write two drafts, and one of them is sealed.
    draft = store.home / "work" / f".{key}.{uuid.uuid4().hex}"
    draft.mkdir(parents=True)
    body = json.dumps(prediction.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    (draft / FILE).write_text(body)
    # The statement names the code of the law, so that a reader can compute it again.
    code = {module.__name__: sha256_file(Path(str(module.__file__))) for module in (forecast, scaling_laws)}

    def record(artifact: Artifact) -> None:
        attempt = provenance.AttemptRecord(
            subject={artifact.key: artifact.digest},
            stage=PREDICTION,
            version=VERSION,
            node=PREDICTION,
            key=key,
            config={"target": prediction.target.key},
            operations=[{}],
            materials=materials,
            code=code,
            environment=environment.describe(),
            invocation=f"{PREDICTION}/{name}",
            started=started,
            finished=time.time(),
            usage={"wall_seconds": round(time.time() - started, 3)},
            outcome="sealed",
        )
        provenance.write(store.ledger, key, provenance.statement(attempt))

    return store.seal(draft, key, record)
