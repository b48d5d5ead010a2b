"""Scorer `courtesy`, version 1: rules for a courteous note. Frozen: a change is a new version in a new file.

Row: act, who, what. It holds its own copy of the words of stages/data/courtesies.py, which may change.
"""

from __future__ import annotations

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
    sign: str  # pattern by which it is known


ACTS = (
    Act("thank", "Thank the {who} for the {what}.", "thank you for the {what}.", r"\bthank you\b"),
    Act("praise", "Praise the {who} for the {what}.", "the {what} was wonderful.", r"\bwonderful\b"),
    Act("apologise", "Say sorry to the {who} about the {what}.", "I am sorry about the {what}.", r"\bsorry\b"),
    Act("ask", "Ask the {who} for the {what}.", "may I have the {what}, please?", r"\bmay I have\b"),
    Act("offer", "Offer the {who} the {what}.", "would you like the {what}?", r"\bwould you like\b"),
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


def judge(asked: Act, who: str, what: str, note: str) -> dict[str, float]:
    """Parts of a note's worth, each 0 to 1; `reward` = content x form.

    Content: the act (0.4), the person addressed (0.25), the thing (0.25), one kind ending (0.1). Form is the product of
    the share of words that are words of this small language, of whether it begins and ends as a sentence does, repeats
    no word, and is not long-winded: garbled text earns little, whatever polite phrase stands in it.
    """
    words = [word.lower() for word in _WORD.findall(note)]
    content = {
        "act": float(bool(re.search(asked.sign, note, re.IGNORECASE))),
        "person": float(note.startswith(f"Dear {who},")),
        "thing": float(f"the {what}" in note.lower()),
        "ending": float(sum(note.count(ending) for ending in ENDINGS) == 1 and note.endswith(ENDINGS)),
    }
    odd = re.sub(r"[A-Za-z .,!?]", "", note)
    stammers = any(a == b for a, b in pairwise(words))
    form = {
        "words": sum(word in LEXICON for word in words) / len(words) if words else 0.0,
        "sentence": 1.0 if note[:1].isupper() and note.endswith((".", "!", "?")) and not odd else 0.5,
        "fluent": 0.5 if stammers else 1.0,
        "brief": 1.0 if len(words) <= LONGEST else 0.5,
    }
    weights = {"act": 0.4, "person": 0.25, "thing": 0.25, "ending": 0.1}
    reward = sum(weights[name] * content[name] for name in weights)
    for share in form.values():
        reward *= share
    return {"reward": reward, **content, **form}


def score(row: Mapping[str, Any], answer: str, finished: bool) -> dict[str, float]:
    """The parts of an answer's worth; one that did not end earns nothing. Raises ValueError for an unknown act."""
    act = next((act for act in ACTS if act.name == row["act"]), None)
    if act is None:
        raise ValueError(f"unknown act {row['act']!r}")
    parts = judge(act, str(row["who"]), str(row["what"]), answer)
    return parts if finished else parts | {"reward": 0.0}
