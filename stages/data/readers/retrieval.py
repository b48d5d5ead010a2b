"""Reader `retrieval`: procedural long documents whose question needs several statements of the text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from stages.data import python_stdlib
from stages.data.readers.base import Document, Drawn, Files, Reader, Unreadable
from stages.data.readers.passkeys import Characters
from stages.data.seeds import seed_of
from stages.data.synthetic import passkeys, retrieval


class Retrieval(Reader):
    """Long documents with a question over several statements, in text from docstrings of the standard library.

    The kinds take turns. Lengths are drawn log-uniformly from `min_chars` to `max_chars`. The text around the
    statements is PSF-2.0, the rest is this project's, so the license is `PSF-2.0 AND Apache-2.0`.
    """

    reader: Literal["retrieval"] = Field(description="selects this reader")
    kinds: tuple[retrieval.Kind, ...] = Field(
        tuple(retrieval.KINDS), min_length=1, max_length=len(retrieval.KINDS), description="kinds of tasks, in turn"
    )
    count: Drawn = Field(description="number of documents")
    min_chars: Characters = Field(description="minimum length of a document in characters")
    max_chars: Characters = Field(description="maximum length of a document in characters")

    @model_validator(mode="after")
    def _check_lengths(self) -> Retrieval:
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError("kinds names a kind twice; put each once")
        minimum = retrieval.min_characters(self.kinds)
        if self.min_chars < minimum:
            raise ValueError(f"min_chars = {self.min_chars} leaves no room for the statements; use at least {minimum}")
        if self.max_chars < self.min_chars:
            raise ValueError(f"max_chars = {self.max_chars} is below min_chars = {self.min_chars}; raise it")
        return self

    def files(self, source: str) -> Files:
        return python_stdlib.library_files()

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document | Unreadable]:
        texts = []
        for docstring in python_stdlib.read_docstrings(files):
            if isinstance(docstring, Unreadable):
                yield docstring
            else:
                texts.append((docstring.text, docstring.location))
        rng = random.Random(seed_of(f"retrieval/{source}", seed))
        chars = (self.min_chars, self.max_chars)
        drawn = retrieval.draw(passkeys.fillers(texts), self.count, chars, self.kinds, rng)
        for i, (text, prompt_chars, location) in enumerate(drawn):
            yield Document(f"{i:07d}", text, location, prompt_chars)


READER = Retrieval
