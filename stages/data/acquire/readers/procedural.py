"""Readers of documents that are drawn from a seed: problems, conversations about them, courteous notes, passkeys."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from statistics import mean
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.core.bounds import Key, Range, Share
from stages.data.acquire.readers import python_stdlib
from stages.data.acquire.readers.base import Document, Drawn, Files, Reader, Unreadable
from stages.formats.seeds import seed_of
from stages.tasks.synthetic import courtesy_notes, passkeys
from stages.tasks.synthetic.problems import FORMS, TASKS, draw, expected_distinct, messages

# Documents that are drawn to learn their mean tokens.
SAMPLE = 200
Characters = Annotated[int, Range(1, 1e7)]


def _require_known_tasks(tasks: dict[str, float]) -> dict[str, float]:
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown task {unknown[0]}; known are {', '.join(sorted(TASKS))}")
    return tasks


# Weights of tasks by name; they need not sum to 1.
TaskWeights = Annotated[
    dict[Key, Annotated[float, Range(0, 1000, above=True)]],
    Field(min_length=1, max_length=100),
    AfterValidator(_require_known_tasks),
]


class Procedural(Reader):
    """Base of the readers that draw documents with the seed of the recipe."""

    count: Drawn
    """number of documents"""

    @property
    def different(self) -> float:
        """The expected number of different documents."""
        return self.count

    def mean_tokens(self, bytes_per_token: float) -> float:
        """Returns the mean tokens of a document, by some that are drawn; the tokenizer splits digits singly."""
        few = self.model_copy(update={"count": min(self.count, SAMPLE)}).documents(self.reader, 0, ())
        pieces = (re.findall(r"\d|\D+", document.text) for document in few if isinstance(document, Document))
        # One more ends the document.
        return mean(1 + sum(max(1, len(piece) / bytes_per_token) for piece in each) for each in pieces)

    def expected_tokens(self, bytes_per_token: float) -> float:
        return self.different * self.mean_tokens(bytes_per_token)


class Problems(Procedural):
    """Procedural problems, drawn with the seed of the recipe."""

    reader: Literal["problems"]
    """selects this reader"""
    tasks: TaskWeights
    """weights of tasks by name; they need not sum to 1"""
    form: Literal["plain", "worked"]
    """plain: question and answer; worked: with the steps between them"""

    @property
    def different(self) -> float:
        return expected_distinct(self.tasks, self.count)

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document | Unreadable]:
        rng = random.Random(seed_of(f"problems/{source}", seed))
        for i, problem in enumerate(draw(self.tasks, self.count, rng)):
            text, prompt_chars = FORMS[self.form](problem)
            yield Document(f"{problem.task}/{i:07d}", text, problem.task, prompt_chars)


class ChatProblems(Procedural):
    """Procedural problems as conversations, some of whose answers reason first."""

    reader: Literal["chat-problems"]
    """selects this reader"""
    tasks: TaskWeights
    """weights of tasks by name; they need not sum to 1"""
    thinking: Share
    """share of answers that show their steps first"""

    @property
    def different(self) -> float:
        shares = (self.thinking, 1 - self.thinking)
        return sum(expected_distinct(self.tasks, self.count * share) for share in shares)

    @property
    def conversations(self) -> bool:
        return True

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document | Unreadable]:
        from stages.formats.chat import turns

        rng = random.Random(seed_of(f"problems/{source}", seed))
        for i, problem in enumerate(draw(self.tasks, self.count, rng)):
            ((text, prompt_chars),) = turns(messages(problem, rng.random() < self.thinking))
            yield Document(f"{problem.task}/{i:07d}", text, problem.task, prompt_chars)


class Courtesies(Procedural):
    """Requests for a courteous note, with answers of mixed quality (stages/tasks/synthetic/courtesy_notes.py)."""

    reader: Literal["courtesies"]
    """selects this reader"""

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


class Passkeys(Procedural):
    """Documents with a passkey to retrieve, in filler text from docstrings of the standard library.

    Lengths are drawn log-uniformly from `min_chars` to `max_chars`. Filler comes from PSF-2.0 text, the rest is this
    project's, so the license is `PSF-2.0 AND Apache-2.0`.
    """

    reader: Literal["passkeys"]
    """selects this reader"""
    min_chars: Characters
    """minimum length of a document in characters"""
    max_chars: Characters
    """maximum length of a document in characters"""
    digits: Annotated[int, Range(2, 9)] = 6
    """digits of a passkey, all different; few digits give too few keys to generalize from"""

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

    def mean_tokens(self, bytes_per_token: float) -> float:
        # By the law of the lengths: to draw some would mean to read the whole library for filler.
        growth = math.log(self.max_chars / self.min_chars)
        return ((self.max_chars - self.min_chars) / growth if growth else self.min_chars) / bytes_per_token

    def files(self, source: str) -> Files:
        return python_stdlib.library_files()

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document | Unreadable]:
        texts = []
        for docstring in python_stdlib.read(files, "docstring"):
            if isinstance(docstring, Unreadable):
                yield docstring
            # The others have license terms of their own.
            elif isinstance(docstring, Document) and docstring.license is None:
                texts.append((docstring.text, docstring.location))
        rng = random.Random(seed_of(f"{self.reader}/{source}", seed))
        drawn = passkeys.draw(passkeys.fillers(texts), self.count, (self.min_chars, self.max_chars), self.digits, rng)
        for i, (text, prompt_chars, location) in enumerate(drawn):
            yield Document(f"{i:07d}", text, location, prompt_chars)
