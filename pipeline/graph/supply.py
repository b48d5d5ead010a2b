"""Compares the tokens that a run asks of its sources with those that they can give, without reading data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.errors import RecipeError
from pipeline.core.progress import human


@dataclass(frozen=True)
class SourceSupply:
    """The tokens of one source, and those that are asked of it."""

    source: str
    # After filters and deduplication; None if they are not known.
    tokens: float | None
    # `probed`, `stated`, `computed` or `unknown`.
    basis: str
    # The sample, or who states it; empty if they are not known.
    where: str
    # The tokens that each phase asks for.
    asked: Mapping[str, float]
    # The epochs that the recipe takes; infinite for documents that are drawn.
    most_epochs: float
    # It could be probed, was not or not well, and nothing says that it need not be.
    lacks_probe: bool
    # The kind of its text: the pipeline that curates it, or prose, code and so on.
    text: str = ""
    # Core hours to filter a billion tokens that are read.
    curation_core_hours: float = 0.0

    @property
    def epochs(self) -> float | None:
        """Times that all phases together read the source; None if its tokens are not known."""
        return self.epochs_of(sum(self.asked.values()))

    def epochs_of(self, asked: float) -> float | None:
        """Returns how often so many tokens read it; None if its tokens are not known."""
        if self.tokens is None:
            return None
        return asked / self.tokens if self.tokens else math.inf

    def json(self) -> dict[str, Any]:
        # JSON has no infinity.
        most = self.most_epochs if math.isfinite(self.most_epochs) else None
        return {**asdict(self), "epochs": self.epochs if self.tokens else None, "most_epochs": most}


def origins(rows: Sequence[SourceSupply]) -> list[str]:
    """Returns a sentence for each origin of supply, with its sources, and one for the sources without any."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row.basis, row.where), []).append(row.source)
    return [
        f"{basis} supply of {', '.join(names)}" + (f": {where}" if where else "")
        for (basis, where), names in groups.items()
    ]


def curation_costs(rows: Sequence[SourceSupply]) -> list[str]:
    """Returns a sentence for each kind of text on what curation costs, sources of equal cost together."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        kinds.setdefault(row.text, {}).setdefault(f"{row.curation_core_hours:.2f}", []).append(row.source)
    return [
        f"curation of {text}, core hours per billion tokens read: "
        + "; ".join(f"{hours} {', '.join(names)}" for hours, names in costs.items())
        for text, costs in kinds.items()
    ]


def unserved(rows: Sequence[SourceSupply]) -> list[str]:
    """Returns a sentence for each source that is read more often than the recipe takes. An unknown supply is none."""
    sentences = []
    for row in rows:
        if row.epochs is None or row.epochs <= row.most_epochs:
            continue
        asked = f"{human(sum(row.asked.values()))} tokens are asked for by {', '.join(row.asked)}"
        if not row.tokens:
            sentences.append(f"source {row.source}: {asked}, and curation leaves none of its sample ({row.where})")
            continue
        # Rounded up, so that it suffices.
        enough = math.ceil(row.epochs * 10) / 10
        sentences.append(
            f"source {row.source}: {asked}, and {human(row.tokens)} are {row.basis}: {row.epochs:.1f} epochs, more "
            f"than {row.most_epochs:g}; lower its share in the mixes, or acknowledge them by "
            f"supply.acknowledged_epochs: {{{row.source}: {enough:g}}}"
        )
    return sentences


def require_served(title: str, rows: Sequence[SourceSupply]) -> None:
    """Raises RecipeError if a source is read more often than the recipe takes."""
    if sentences := unserved(rows):
        more = f" (and {len(sentences) - 1} more)" if len(sentences) > 1 else ""
        raise RecipeError(f"{title}: {sentences[0]}{more}")


def require_probed(title: str, rows: Sequence[SourceSupply]) -> None:
    """Raises RecipeError if a source was to be probed."""
    if names := [row.source for row in rows if row.lacks_probe]:
        raise RecipeError(
            f"{title}: the supply of {', '.join(names)} is not probed, and training would be paid for on a guess; run "
            "`atom pin RECIPE`, or say in supply.acknowledged_unprobed why each may be taken without"
        )
