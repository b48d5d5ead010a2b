"""Base of the readers of long procedural documents, whose filler text is of docstrings of the standard library."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from pipeline.core.bounds import Range
from stages.data import python_stdlib
from stages.data.readers.base import Document, Drawn, Files, Reader, Unreadable
from stages.data.seeds import seed_of
from stages.data.synthetic import passkeys

Characters = Annotated[int, Range(1, 1e7)]


class FillerReader(Reader):
    """Base of these readers."""

    content: ClassVar[str]
    """What stands in the filler text, in words."""

    count: Drawn = Field(description="number of documents")
    min_chars: Characters = Field(description="minimum length of a document in characters")
    max_chars: Characters = Field(description="maximum length of a document in characters")

    @model_validator(mode="after")
    def _check_lengths(self) -> FillerReader:
        minimum = self.min_characters()
        if self.min_chars < minimum:
            raise ValueError(f"min_chars = {self.min_chars} leaves no room for {self.content}; use at least {minimum}")
        if self.max_chars < self.min_chars:
            raise ValueError(f"max_chars = {self.max_chars} is below min_chars = {self.min_chars}; raise it")
        return self

    @abstractmethod
    def min_characters(self) -> int:
        """The length of the shortest document that holds `content`."""

    @abstractmethod
    def draw(self, texts: Sequence[tuple[str, str]], rng: random.Random) -> Iterator[tuple[str, int, str]]:
        """(text, leading characters without loss, location of the first filler text) of each document; texts: the
        (text, location) pairs that filler is cut from."""

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
        for i, (text, prompt_chars, location) in enumerate(self.draw(passkeys.fillers(texts), rng)):
            yield Document(f"{i:07d}", text, location, prompt_chars)
