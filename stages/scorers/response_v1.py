"""What of a model's text is its answer, version 1. Frozen: a change is a new version in a new file."""

from __future__ import annotations


def answer_of(text: str) -> str:
    """What stands after the reasoning, or all of the text where there is none. Reasoning that was opened and never
    closed leaves no answer."""
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after.strip()
    return "" if "<think>" in text else text.strip()
