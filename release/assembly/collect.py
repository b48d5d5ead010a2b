"""Collects the input of `build` from a recipe's graph and its sealed artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.core import environment, provenance
from pipeline.core.environment import code_root, machine_paths
from pipeline.core.errors import AtomError
from pipeline.core.stage import identity
from pipeline.core.store import Artifact, Store
from pipeline.graph.dag import Graph, states
from pipeline.launch.attempt import prediction_key
from release.assembly.assemble import BuildInput
from release.facts.forecast import MODEL, PHASE
from release.layout import models_of
from release.references import Reference
from stages.data.acquire.acquire_stage import AcquireConfig
from stages.data.curate.filter_stage import FilterConfig
from stages.recipe import ReleaseRecipe


def build_input(graph: Graph, store: Store, previous: Path | None = None) -> BuildInput:
    """Opens every artifact of the graph.

    `previous` is the folder of an earlier release. Raises AtomError with the nodes that are not sealed or have no
    statement, and for a recipe whose last model is its base.
    """
    # The final model and the base have a repository each, so they cannot be one model.
    if models_of(graph.nodes)[-1] == MODEL:
        raise AtomError(
            f"{graph.recipe.title} trains no model after {PHASE}, and a release has one beside its base; add midtrain "
            "or sft, or publish the artifact of export-base by itself"
        )
    missing = [name for name, node in graph.nodes.items() if not store.sealed(node.key)]
    if missing:
        remainder = f" and {len(missing) - 1} more stages are" if len(missing) > 1 else " is"
        raise AtomError(f"{missing[0]}{remainder} not sealed yet; run `atom run {graph.recipe.path.stem}` first")
    artifacts = {name: store.open(node.key) for name, node in graph.nodes.items()}
    earlier = _earlier(graph, store)
    statements, metrics = [], {}
    for name, artifact in {**artifacts, **earlier}.items():
        statements += [path for path, _ in provenance.read(store.ledger, artifact.key)]
        # The curves of the attempt that sealed the artifact; those of failed ones stay in the store.
        curves = store.logs / provenance.invocation(_statement(store, artifact)) / "metrics.jsonl"
        if curves.exists():
            metrics[name] = curves
    root = code_root()
    commit, dirty = environment.git_commit(root)
    return BuildInput(
        name=graph.recipe.config.name,
        version=graph.recipe.config.version,
        recipe={**identity(graph.recipe.config), "data_recipe": identity(graph.recipe.data)},
        recipe_files=graph.recipe.files,
        artifacts=artifacts,
        earlier=earlier,
        statements=statements,
        metrics=metrics,
        environment=environment.describe(),
        code_root=root,
        commit=commit,
        dirty=dirty,
        stale=[s.name for s in states(graph, store).values() if s.text == "stale"],
        prediction=_prediction(graph, store),
        references=_references(graph, artifacts, earlier),
        previous=previous,
        machine_paths=machine_paths(store.home),
    )


def _prediction(graph: Graph, store: Store) -> tuple[Artifact, Path] | None:
    """Returns the sealed prediction of this run and its statement, if it has one; only pre-training is predicted."""
    if PHASE not in graph.nodes:
        return None
    key = prediction_key(graph.nodes[PHASE].key)
    if not store.sealed(key):
        return None
    artifact = store.open(key)
    if (sealed := provenance.sealed(store.ledger, artifact)) is None:
        raise AtomError(f"{key} has no statement in {store.ledger}; a prediction without one proves nothing: remove it")
    return artifact, sealed[0]


def _references(
    graph: Graph, artifacts: Mapping[str, Artifact], earlier: Mapping[str, Artifact]
) -> dict[str, Reference]:
    """Returns the sources by reference.

    Raises AtomError for a source that is in no files, or of a run that resumed from data of an earlier one.
    """
    recipe, config = graph.recipe.config, graph.nodes["filter"].config
    assert isinstance(recipe, ReleaseRecipe) and isinstance(config, FilterConfig)
    names = recipe.release.by_reference
    if names and any(key.startswith("dedup-") for key in earlier):
        raise AtomError(
            f"release.by_reference names {names[0]}, but this run resumed from documents of an earlier one, which the "
            "release holds as well; run the phases on one corpus, or leave it out"
        )
    references = {}
    for name in names:
        acquired = graph.nodes[f"acquire-{name}"].config
        if not isinstance(acquired, AcquireConfig):
            raise AtomError(f"release.by_reference names {name}, whose texts a model wrote here; leave it out")
        # Only steps that edited a text are needed to make it again; the others removed documents.
        edits = artifacts["filter"].json("edits.json")[name]
        steps = next(source.steps for source in config.sources if source.name == name)
        references[name] = Reference.of(acquired.source, acquired.seed, [s for s in steps if edits.get(s.name)])
    return references


def _earlier(graph: Graph, store: Store) -> dict[str, Artifact]:
    """Returns {key: artifact} of earlier runs that this run resumes from: checkpoints and all their inputs."""
    run_keys = {node.key for node in graph.nodes.values()}
    # The inputs of an input count as well, or no statement would lead to the texts of the first run.
    pending = [key for node in graph.nodes.values() for key in node.external.values()]
    artifacts: dict[str, Artifact] = {}
    while pending:
        key = pending.pop()
        if key in run_keys or key in artifacts:
            continue
        if not store.sealed(key):
            raise AtomError(
                f"{key} of an earlier run, which this one goes on from, is not sealed under {store.artifacts}; "
                "run the recipe that made it, or copy the artifact and its folder of the ledger"
            )
        artifacts[key] = store.open(key)
        pending += provenance.material_keys(_statement(store, artifacts[key])).values()
    return dict(sorted(artifacts.items()))


def _statement(store: Store, artifact: Artifact) -> provenance.Statement:
    sealed_statement = provenance.sealed(store.ledger, artifact)
    if sealed_statement is None:
        raise AtomError(
            f"artifact {artifact.key} has no statement in {store.ledger}; "
            f"remove {artifact.path} and run the recipe again"
        )
    return sealed_statement[1]
