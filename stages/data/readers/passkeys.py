"""Reader `passkeys`: procedural documents with a passkey to retrieve."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.core.bounds import Range
from stages.data.readers.filler import FillerReader
from stages.data.synthetic import passkeys


class Passkeys(FillerReader):
    """Documents with a passkey to retrieve, in filler text from docstrings of the standard library.

    Lengths are drawn log-uniformly from `min_chars` to `max_chars`. Filler comes from PSF-2.0 text, the rest is this
    project's, so the license is `PSF-2.0 AND Apache-2.0`.
    """

    content: ClassVar = "key and question"

    reader: Literal["passkeys"] = Field(description="selects this reader")
    digits: Annotated[int, Range(2, 9)] = Field(
        6, description="digits of a passkey, all different; few digits give too few keys to generalize from"
    )

    def min_characters(self) -> int:
        return passkeys.min_characters(self.digits)

    def draw(self, texts: Sequence[tuple[str, str]], rng: random.Random) -> Iterator[tuple[str, int, str]]:
        return passkeys.draw(texts, self.count, (self.min_chars, self.max_chars), self.digits, rng)


READER = Passkeys
