"""The labels of phases in seeds.

A label never changes when its phase is renamed, because other seeds make other models.
"""

from __future__ import annotations

LABELS = {"dpo": "rlhf", "online-rlhf": "online"}
"""{phase: its label}, for phases whose label is an earlier name."""


def seed_label(phase: str) -> str:
    """Returns the label of a phase in its seeds."""
    return LABELS.get(phase, phase)
