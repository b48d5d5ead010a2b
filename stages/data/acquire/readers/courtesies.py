"""Reader `courtesies`: requests for courteous notes, with answers, as conversations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from stages.data.acquire.readers.base import Document, Drawn, Files, Reader, Unreadable
from stages.formats.seeds import seed_of
from stages.tasks.synthetic import courtesy_notes


class Courtesies(Reader):
    """Requests for a courteous note, with answers of mixed quality (stages/tasks/synthetic/courtesy_notes.py)."""

    reader: Literal["courtesies"] = Field(description="selects this reader")
    count: Drawn = Field(description="number of conversations")

    @property
    def conversations(self) -> bool:
        return True

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document | Unreadable]:
        from stages.formats.chat import turns

        rng = random.Random(seed_of(f"courtesies/{source}", seed))
        for i in range(self.count):
            request = courtesy_notes.draw_request(rng)
            ((text, prompt_chars),) = turns(courtesy_notes.messages(request, rng))
            yield Document(f"{request.act.name}/{i:07d}", text, request.act.name, prompt_chars)


READER = Courtesies
