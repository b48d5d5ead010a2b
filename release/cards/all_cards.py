"""All cards of a release, from the facts that its files give: `atom build` writes them, `atom verify` compares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from release.assembly.checkpoint_facts import Intervention, read_checkpoints
from release.assembly.costs import Costs
from release.assembly.data_facts import DataFacts
from release.assembly.model_facts import ModelFacts
from release.assembly.variant_facts import read_variants
from release.cards import card_tables, render, tables
from release.layout import MODEL, VARIANT
from release.repositories import repositories
from release.schema import CARD, ReleaseInfo


def render_all(
    folder: Path,
    release: ReleaseInfo,
    data: DataFacts,
    models: Mapping[str, ModelFacts],
    interventions: list[Intervention],
    costs: Costs,
    canary: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    """Yields (path in the release, text) of each card of a release.

    Args:
        folder: The release, with all files that the cards describe.
        release: Its own statement.
        data: The facts of its data.
        models: The facts of each model, by folder.
        interventions: Resumptions from earlier runs.
        costs: The cost of each stage.
        canary: The string that identifies its evaluation problems.
    """
    example = None
    for name, model in models.items():
        facts = card_tables.release_facts(folder, name, model, data, interventions, costs)
        if name == MODEL:
            example = facts.example
        yield f"{name}/{CARD}", render.model_card(name, release, facts)
    for suffix, variant in read_variants(folder).items():
        yield f"{VARIANT}{suffix}/{CARD}", render.variant_card(suffix, release, variant, example)
    yield f"dataset/{CARD}", render.data_card(release, data, canary)
    steps = tables.checkpoints(read_checkpoints(folder / "checkpoints"))
    yield f"checkpoints/{CARD}", render.plain_card("checkpoints", release, release.license.weights, checkpoints=steps)
    places = [
        [place.id(release.namespace, release.name), place.kind, place.branch, f"`{place.folder or '.'}`"]
        for place in repositories(folder)
    ]
    repository_table = tables.table(["repository", "kind", "branch", "place in the release"], places)
    further = tables.further_evidence(folder)
    yield (
        CARD,
        render.plain_card("evidence", release, release.license.code, repositories=repository_table, further=further),
    )
