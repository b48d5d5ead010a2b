"""Reader `retrieval`: procedural long documents whose question needs several statements of the text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from stages.data.readers.filler import FillerReader
from stages.data.synthetic import retrieval


class Retrieval(FillerReader):
    """Long documents with a question over several statements, in text from docstrings of the standard library.

    The kinds take turns. Lengths are drawn log-uniformly from `min_chars` to `max_chars`. The text around the
    statements is PSF-2.0, the rest is this project's, so the license is `PSF-2.0 AND Apache-2.0`.
    """

    content: ClassVar = "the statements"

    reader: Literal["retrieval"] = Field(description="selects this reader")
    kinds: tuple[retrieval.Kind, ...] = Field(
        tuple(retrieval.KINDS), min_length=1, max_length=len(retrieval.KINDS), description="kinds of tasks, in turn"
    )

    @model_validator(mode="after")
    def _check_kinds(self) -> Retrieval:
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError("kinds names a kind twice; put each once")
        return self

    def min_characters(self) -> int:
        return retrieval.min_characters(self.kinds)

    def draw(self, texts: Sequence[tuple[str, str]], rng: random.Random) -> Iterator[tuple[str, int, str]]:
        return retrieval.draw(texts, self.count, (self.min_chars, self.max_chars), self.kinds, rng)


READER = Retrieval
