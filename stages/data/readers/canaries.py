"""Reader `canaries`: made-up personal data with known repetitions, to measure what a model memorizes of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import Range
from pipeline.core.text import shown
from stages.data.readers.base import Document, Files, Reader
from stages.data.synthetic import canaries


class Canaries(Reader):
    """Documents that begin with a made-up e-mail address or phone number (stages/data/synthetic/canaries.py).

    Stage `memorization` measures the exposure of these secrets. The block `PIIFormatter` would replace the addresses;
    leave it out of this source, or keep it to measure what it leaves.
    """

    reader: Literal["canaries"] = Field(description="selects this reader")
    count: Annotated[int, Range(2, 10_000)] = Field(
        description="canaries of each kind with each number of repetitions; as many more are not planted"
    )
    repetitions: tuple[Annotated[int, Range(1, 10_000)], ...] = Field(
        min_length=1, max_length=20, description="numbers of documents with the same canary, increasing"
    )

    @model_validator(mode="after")
    def _check_increasing(self) -> Canaries:
        if list(self.repetitions) != sorted(set(self.repetitions)):
            raise ValueError(
                f"repetitions = {shown(self.repetitions)} are not increasing; put each once, the least first"
            )
        return self

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document]:
        for name, text, kind in canaries.documents(source, self.count, self.repetitions, seed):
            yield Document(name, text, kind)


READER = Canaries
