"""Scorer `problems`, version 1: exact match on evaluation problems. Frozen: a change is a new version in a new file."""

from __future__ import annotations

END_OF_TEXT = "<|endoftext|>"


def answer_of(output: str) -> str:
    """The answer in a model's output: what stands after the last colon, up to the end of text."""
    return output.split(END_OF_TEXT, 1)[0].rsplit(":", 1)[-1].strip()


def score(answer: str, output: str) -> int:
    """1 if the output's answer is exactly the expected one, else 0."""
    return int(answer_of(output) == answer)
