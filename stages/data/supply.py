"""The supply of a corpus: the tokens of each source, and those that the phases of a recipe ask for.

Supply is probed by `atom pin`, or stated in the data recipe, or computed for documents that are drawn, or unknown. It
has no documents that are held out. A phase without `pack` asks for at most the tokens here, since its rows are padded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Line, Range, SourceName
from pipeline.core.stage import Config
from pipeline.graph.supply import SourceSupply
from stages.data import estimates
from stages.data.acquire.readers.hub import Hub
from stages.data.recipe import DataRecipe, SourceConfig

Epochs = Annotated[float, Range(0, 1e6, above=True)]


class SupplySection(Config):
    """Limits on the epochs of a source, and which supply is taken without a probe. The section is part of no key."""

    max_epochs: Epochs = 4.0
    """epochs of a source over all phases beyond which `atom plan` and `atom submit` refuse the recipe: up to four cost
    next to nothing, and later ones give less and less (Muennighoff et al., 2023, arXiv:2305.16264)"""
    acknowledged_epochs: dict[SourceName, Epochs] = Field(default={}, max_length=MOST_SOURCES)
    """by source, a larger number of epochs that is meant"""
    acknowledged_unprobed: dict[SourceName, Line] = Field(default={}, max_length=MOST_SOURCES)
    """by source of the Hub, why `atom submit` may take its supply without a probe"""

    def most_epochs(self, source: str) -> float:
        """Returns how often all phases together may read a source."""
        return max(self.max_epochs, self.acknowledged_epochs.get(source, 0.0))


def supplies(
    section: SupplySection, data: DataRecipe, asked: Mapping[str, Mapping[str, float]]
) -> tuple[SourceSupply, ...]:
    """Returns the supply of each source that a phase reads, in the order of the data recipe.

    Args:
        section: The section `supply`.
        data: The data recipe.
        asked: The tokens that each phase asks for, by phase and source.
    """
    rows = []
    for source in data.sources:
        of_source = {phase: tokens[source.name] for phase, tokens in asked.items() if source.name in tokens}
        if of_source:
            rows.append(_supply(section, source, data, of_source))
    return tuple(rows)


def _kept_by_classifiers(source: SourceConfig, data: DataRecipe) -> float:
    """Returns the share of a source that its classifiers are set to keep, which no sample shows."""
    names = [name for step in source.steps for name in step.inputs]
    return math.prod(row.keep for row in data.classifiers if f"classifier-{row.name}" in names)


def _supply(section: SupplySection, source: SourceConfig, data: DataRecipe, asked: Mapping[str, float]) -> SourceSupply:
    share = 1 - data.heldout_fraction_of(source)
    tokens, basis, where, probe, problem = None, "unknown", "", source.probe, ""
    if probe is not None:
        problem = data.problem_of(source, probe)
        tokens = probe.kept_tokens * source.limited_share * share * _kept_by_classifiers(source, data)
        basis = "probed"
        place = source.reader.repo if isinstance(source.reader, Hub) else "files here"
        where = f"{probe.sampled_documents:,} documents of {place} ({probe.sampled}: {probe.pieces})"
        where += f", with a problem: {problem}" if problem else ""
    elif source.supply is not None:
        tokens, basis, where = source.supply.tokens * share, "stated", source.supply.where
    elif (drawn := source.reader.expected_tokens(source.bytes_per_token)) is not None:
        tokens, basis = drawn * share, "computed"
        where = f"expected different documents; tokens are digits, or {source.bytes_per_token:g} bytes of other text"
    # A rule that is to be learnt is meant to be seen often; what was measured of repeats is about natural text.
    is_judged = basis != "computed" or source.name in section.acknowledged_epochs
    can_probe = isinstance(source.reader, Hub) and source.name not in section.acknowledged_unprobed
    return SourceSupply(
        source=source.name,
        tokens=tokens,
        basis=basis,
        where=where,
        asked=asked,
        most_epochs=section.most_epochs(source.name) if is_judged else math.inf,
        lacks_probe=can_probe and (probe is None or bool(problem)),
        text=source.pipeline or source.kind,
        curation_core_hours=estimates.core_hours_per_billion(
            probe.bytes_per_token if probe else source.bytes_per_token,
            sum(step.seconds_per_mb for step in source.steps),
        ),
    )
