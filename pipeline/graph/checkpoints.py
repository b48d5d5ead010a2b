"""Release checkpoints of training phases: artifacts of their own, from which a later run may continue.

A checkpoint is written `pretrain-<12 hex>@1200`: the key of the phase that trained it, and its step. `pretrain@1200` is
short for the only sealed checkpoint of that step in this home.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.core import json_files, provenance
from pipeline.core.errors import RecipeError
from pipeline.core.store import Store, canonical, sha256_bytes


@dataclass(frozen=True)
class Checkpoint:
    """The state of a phase after a step, sealed or not."""

    # Key of the phase that trained it.
    phase: str
    step: int

    def __str__(self) -> str:
        return f"{self.phase}@{self.step}"

    @property
    def node(self) -> str:
        """The name of the phase and the step, such as `pretrain@1200`."""
        return f"{self.phase.rsplit('-', 1)[0]}@{self.step}"

    @property
    def key(self) -> str:
        """The key of its artifact."""
        return f"{self.node}-{sha256_bytes(canonical([self.phase, self.step]))[:12]}"


def find(reference: str, phase: str, where: str, store: Store) -> Checkpoint:
    """Returns the checkpoint that a recipe names.

    The long form needs no lookup.

    Args:
        reference: The name: `<phase>@<step>`, or the long form `<phase>-<key>@<step>`.
        phase: The phase whose checkpoint it must be.
        where: The field of the recipe, for errors.
        store: The home.

    Raises:
        RecipeError: It is a checkpoint of another phase, or a short form that matches no sealed checkpoint or several.
    """
    match = re.fullmatch(rf"({phase}(?:-[0-9a-f]{{12}})?)@([0-9]+)", reference)
    if match is None:
        raise RecipeError(
            f"{where} = {reference} is no checkpoint of {phase}; write {phase}@STEP, or {phase}-KEY@STEP to say whose"
        )
    # The long form has the key of the phase.
    if match[1] != phase:
        return Checkpoint(match[1], int(match[2]))
    checkpoints = sealed(phase, store)
    matching = {checkpoint: run for checkpoint, run in checkpoints.items() if checkpoint.node == reference}
    if len(matching) > 1:
        runs = ", ".join(f"{checkpoint} of run {run}" for checkpoint, run in matching.items())
        raise RecipeError(
            f"{where} = {reference} fits {len(matching)} checkpoints: {runs}; write the one that is meant"
        )
    if not matching:
        nodes = {checkpoint.step: checkpoint.node for checkpoint in checkpoints}
        others = ", ".join(node for _, node in sorted(nodes.items()))
        hint = f"there are {others}" if others else "run the recipe to continue from first"
        raise RecipeError(f"{where} = {reference} is not sealed under {store.artifacts}; {hint}")
    return next(iter(matching))


def sealed(phase: str, store: Store) -> dict[Checkpoint, str]:
    """Returns every sealed checkpoint of a phase with the run that made it.

    A checkpoint without its statement is left out.
    """
    runs = {}
    for path in sorted(store.artifacts.glob(f"{phase}@*-*")):
        body = statement(path.name, store)
        of = provenance.parameters_of(body).get("of") if body else None
        if body and of:
            runs[Checkpoint(of["key"], of["step"])] = provenance.invocation(body).split("/")[0]
    return runs


def statement(key: str, store: Store) -> provenance.Statement | None:
    """Returns the statement that made a checkpoint; None if either is not here, or damaged, which is reported."""
    sealed_by = None
    with json_files.reporting("this checkpoint is left out"):
        if store.sealed(key):
            sealed_by = provenance.sealed(store.ledger, store.manifest(key))
    return sealed_by[1] if sealed_by else None
