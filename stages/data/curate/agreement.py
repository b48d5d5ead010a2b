"""Agreement of the filters with stock datatrove by rule: figures that a release publishes and the data card prints.

They are measured by `bench/agreement.py` and held by `tests/integration/data/test_agreement.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

FIGURES = Path(__file__).with_suffix(".yaml")


class Agreement(TypedDict):
    """The agreement of a filter with its reference.

    Attributes:
        agreement: Share of the documents that both keep or both remove.
        kappa: Cohen's kappa; 1.0 if both keep all.
        kept: Documents that our filter keeps.
        reference_kept: Documents that the reference keeps.
    """

    agreement: float
    kappa: float
    kept: int
    reference_kept: int


def agreement_of(ours: Sequence[str | None], reference: Sequence[str | None]) -> Agreement:
    """Returns the agreement, by the reasons for removing each document, None where it is kept."""
    count = len(ours)
    kept, reference_kept = sum(reason is None for reason in ours), sum(reason is None for reason in reference)
    equal = sum((a is None) == (b is None) for a, b in zip(ours, reference, strict=True)) / count
    chance = (kept * reference_kept + (count - kept) * (count - reference_kept)) / count**2
    kappa = (equal - chance) / (1 - chance) if chance < 1 else 1.0
    return {"agreement": round(equal, 4), "kappa": round(kappa, 4), "kept": kept, "reference_kept": reference_kept}


def read_figures() -> dict[str, Any]:
    """Returns `reference`, `corpus`, number of `documents`, and the `rules` with an Agreement each."""
    import yaml

    figures: dict[str, Any] = yaml.safe_load(FIGURES.read_text())
    return figures
