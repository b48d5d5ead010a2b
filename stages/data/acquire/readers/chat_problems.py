"""Reader `chat-problems`: procedural problems as conversations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pipeline.core.bounds import Share
from stages.data.acquire.readers.base import Document, Drawn, Files, Reader, Unreadable
from stages.data.acquire.readers.problems import TaskWeights
from stages.formats.seeds import seed_of
from stages.tasks.synthetic.problems import draw, messages


class ChatProblems(Reader):
    """Procedural problems as conversations, some of whose answers reason first."""

    reader: Literal["chat-problems"] = Field(description="selects this reader")
    tasks: TaskWeights = Field(description="weights of tasks by name; they need not sum to 1")
    thinking: Share = Field(description="share of answers that show their steps first")
    count: Drawn = Field(description="number of conversations")

    @property
    def conversations(self) -> bool:
        return True

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document | Unreadable]:
        from stages.formats.chat import turns

        rng = random.Random(seed_of(f"problems/{source}", seed))
        for i, problem in enumerate(draw(self.tasks, self.count, rng)):
            ((text, prompt_chars),) = turns(messages(problem, rng.random() < self.thinking))
            yield Document(f"{problem.task}/{i:07d}", text, problem.task, prompt_chars)


READER = ChatProblems
