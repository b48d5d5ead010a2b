"""The labels of phases in seeds. A label never changes, whatever its phase is called: other seeds are other models."""

from __future__ import annotations

LABELS = {"dpo": "rlhf", "online-rlhf": "online"}
"""{phase: its label, where that is the name that the phase had when its seeds were fixed}"""


def seed_label(phase: str) -> str:
    """What a phase is called in the labels of its seeds."""
    return LABELS.get(phase, phase)
