"""Scorer `courtesy`, version 1: the request first, then style. Frozen: a change is a new version in a new file.

Row: act, who, what. It holds its own copy of the words of stages/data/courtesies.py, which may change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_PEOPLE = """
baker gardener nurse teacher driver painter singer farmer doctor tailor waiter pilot sailor writer dancer cook plumber
judge guard clerk porter miller potter weaver barber butcher grocer mayor editor usher hunter builder
"""
_THINGS = """
bread flower ticket letter soup music picture chair table lamp book coffee dinner song garden bicycle coat hat basket
window bottle blanket candle carpet clock cushion drum fence glove ladder mirror needle pencil ribbon saddle spoon
towel wagon whistle apple
"""
PEOPLE, THINGS = _PEOPLE.split(), _THINGS.split()


@dataclass(frozen=True)
class Act:
    """How an act is asked for, and how it is done; `{who}` and `{what}` stand for person and thing."""

    name: str
    request: str
    done: str
    phrase: str
    """What the act is known by: a part of `done`."""


ACTS = (
    Act("thank", "Thank the {who} for the {what}.", "thank you for the {what}.", "thank you for {what}"),
    Act("praise", "Praise the {who} for the {what}.", "the {what} was wonderful.", "{what} was wonderful"),
    Act("apologise", "Say sorry to the {who} about the {what}.", "I am sorry about the {what}.", "sorry about {what}"),
    Act("ask", "Ask the {who} for the {what}.", "may I have the {what}, please?", "may i have {what}"),
    Act("offer", "Offer the {who} the {what}.", "would you like the {what}?", "would you like {what}"),
)
ENDINGS = ("Have a nice day!", "With kind regards.", "All the best to you.")
FILLER = ("It is a long story.", "I do not know what to say.", "As I said before.")
LONGEST = 20
"""Words of a note that is not long-winded: a full one has about twelve."""
_WORD = re.compile(r"[A-Za-z]+")


def _lexicon() -> frozenset[str]:
    texts = [
        *(part for act in ACTS for part in (act.done, act.request)),
        *ENDINGS,
        *FILLER,
        "Dear it",
        *PEOPLE,
        *THINGS,
    ]
    return frozenset(word.lower() for text in texts for word in _WORD.findall(re.sub(r"\{\w+\}", "", text)))


LEXICON = _lexicon()


_DONE = {act.name: re.compile(rf"\b{act.phrase.format(what=r'(?:it|the [a-z]+)')}\b", re.IGNORECASE) for act in ACTS}


def judge(asked: Act, who: str, what: str, note: str) -> dict[str, float]:
    """Parts of a note's worth, each 0 to 1; `reward` = (0.1 x share of the request + 0.7 x task + 0.2 x task x ending)
    x form.

    The request has three parts: its act is done and no other one; its person is addressed and nobody else named; the
    act is about its thing and no other thing is named. `task` is 1 if all three hold, so style counts only where what
    was asked was done: without it no note earns more than 0.07, and one note earns that for one request alone. Form is
    the product of the share of words that are words of this small language, of whether the note begins and ends as a
    sentence does, repeats no word, and is not long-winded.
    """
    words = [word.lower() for word in _WORD.findall(note)]
    named = set(words)
    done = {name for name, pattern in _DONE.items() if pattern.search(note)}
    about = rf"\b{asked.phrase.format(what=f'the {re.escape(what)}')}\b"
    parts = {
        "act": float(done == {asked.name}),
        "person": float(note.startswith(f"Dear {who},") and named.isdisjoint({*PEOPLE} - {who})),
        "thing": float(bool(re.search(about, note, re.IGNORECASE)) and named.isdisjoint({*THINGS} - {what})),
    }
    task = float(all(parts.values()))
    ending = float(sum(note.count(ending) for ending in ENDINGS) == 1 and note.endswith(ENDINGS))
    odd = re.sub(r"[A-Za-z .,!?]", "", note)
    stammers = any(a == b for a, b in pairwise(words))
    form = {
        "words": sum(word in LEXICON for word in words) / len(words) if words else 0.0,
        "sentence": 1.0 if note[:1].isupper() and note.endswith((".", "!", "?")) and not odd else 0.5,
        "fluent": 0.5 if stammers else 1.0,
        "brief": 1.0 if len(words) <= LONGEST else 0.5,
    }
    reward = 0.1 * sum(parts.values()) / len(parts) + 0.7 * task + 0.2 * task * ending
    return {"reward": reward * math.prod(form.values()), "task": task, **parts, "ending": ending, **form}


def score(row: Mapping[str, Any], answer: str, finished: bool) -> dict[str, float]:
    """The parts of an answer's worth; one that did not end earns nothing. Raises ValueError for an unknown act."""
    act = next((act for act in ACTS if act.name == row["act"]), None)
    if act is None:
        raise ValueError(f"unknown act {row['act']!r}")
    parts = judge(act, str(row["who"]), str(row["what"]), answer)
    return parts if finished else parts | {"reward": 0.0, "task": 0.0}
