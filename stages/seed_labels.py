"""The labels of phases in seeds.

A label never changes when its phase is renamed, because other seeds make other models.
"""

from __future__ import annotations

LABELS = {"dpo": "rlhf", "online-rlhf": "online"}
"""{phase: its label, if this is an earlier name of the phase}"""


def seed_label(phase: str) -> str:
    """The label of a phase in its seeds."""
    return LABELS.get(phase, phase)
