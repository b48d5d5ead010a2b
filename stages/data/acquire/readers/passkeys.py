"""Reader `passkeys`: procedural documents with a passkey to retrieve, in docstrings of the standard library."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import Range
from stages.data.acquire import python_stdlib
from stages.data.acquire.readers.base import Document, Drawn, Files, Reader, Unreadable
from stages.formats.seeds import seed_of
from stages.tasks.synthetic import passkeys

Characters = Annotated[int, Range(1, 1e7)]


class Passkeys(Reader):
    """Documents with a passkey to retrieve, in filler text from docstrings of the standard library.

    Lengths are drawn log-uniformly from `min_chars` to `max_chars`. Filler comes from PSF-2.0 text, the rest is this
    project's, so the license is `PSF-2.0 AND Apache-2.0`.
    """

    reader: Literal["passkeys"] = Field(description="selects this reader")
    count: Drawn = Field(description="number of documents")
    min_chars: Characters = Field(description="minimum length of a document in characters")
    max_chars: Characters = Field(description="maximum length of a document in characters")
    digits: Annotated[int, Range(2, 9)] = Field(
        6, description="digits of a passkey, all different; few digits give too few keys to generalize from"
    )

    @model_validator(mode="after")
    def _check_lengths(self) -> Passkeys:
        minimum = passkeys.min_characters(self.digits)
        if self.min_chars < minimum:
            raise ValueError(
                f"min_chars = {self.min_chars} leaves no room for key and question; use at least {minimum}"
            )
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
            elif isinstance(docstring, Document):  # the others have license terms of their own
                texts.append((docstring.text, docstring.location))
        rng = random.Random(seed_of(f"{self.reader}/{source}", seed))
        drawn = passkeys.draw(passkeys.fillers(texts), self.count, (self.min_chars, self.max_chars), self.digits, rng)
        for i, (text, prompt_chars, location) in enumerate(drawn):
            yield Document(f"{i:07d}", text, location, prompt_chars)


READER = Passkeys
