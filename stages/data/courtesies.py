"""Requests for a courteous note, with answers of mixed quality: what preferences are learnt on.

The user asks for one of five acts toward somebody about something: `Thank the baker for the bread.` A full answer does
this act toward this person about this thing, ends kindly and is well-formed English. Answers in training data are drawn
with flaws, each by itself, as people's answers have them, so that there is something to prefer.

A tenth of the requests, by their hash, is held out: no training data and no RL prompt has one of them.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from dataclasses import dataclass
from itertools import pairwise

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


@dataclass(frozen=True)
class Request:
    """One request of the grammar."""

    act: Act
    who: str
    what: str

    @property
    def text(self) -> str:
        return self.act.request.format(who=self.who, what=self.what)

    @property
    def heldout(self) -> bool:
        return hashlib.sha256(self.text.encode()).digest()[0] % 10 == 0


def request(rng: random.Random, heldout: bool = False) -> Request:
    """One of the training requests, or of the held-out ones, each equally likely."""
    while True:
        found = Request(rng.choice(ACTS), rng.choice(PEOPLE), rng.choice(THINGS))
        if found.heldout == heldout:
            return found


def distinct(count: int, rng: random.Random, heldout: bool) -> list[Request]:
    """`count` different requests. Raises ValueError if the grammar has too few."""
    every = [Request(act, who, what) for act in ACTS for who in PEOPLE for what in THINGS]
    those = [found for found in every if found.heldout == heldout]
    if count > len(those):
        raise ValueError(f"there are only {len(those)} {'held-out' if heldout else 'training'} requests, not {count}")
    return rng.sample(those, count)


def answer(asked: Request, rng: random.Random) -> str:
    """An answer with flaws, each with its own chance."""
    done = asked.act.done.format(who=asked.who, what=asked.what)
    if rng.random() < 0.3:
        done = done.replace(f"the {asked.what}", "it")
    note = f"Dear {asked.who}, {done}" if rng.random() < 0.6 else done[0].upper() + done[1:]
    if rng.random() < 0.2:
        note += f" {rng.choice(FILLER)} {rng.choice(FILLER)}"
    if rng.random() < 0.5:
        note += f" {rng.choice(ENDINGS)}"
    if rng.random() < 0.15:  # a stammer
        words = note.split()
        at = rng.randrange(len(words))
        note = " ".join([*words[:at], words[at], *words[at:]])
    if rng.random() < 0.2:
        note = note.lower().rstrip(".!?")
    return note


def messages(asked: Request, rng: random.Random) -> list[dict[str, str]]:
    """A conversation of one request and one answer."""
    return [{"role": "user", "content": asked.text}, {"role": "assistant", "content": answer(asked, rng)}]


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


def judge(asked: Request, note: str) -> dict[str, float]:
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
    about = rf"\b{asked.act.phrase.format(what=f'the {asked.what}')}\b"
    parts = {
        "act": float(done == {asked.act.name}),
        "person": float(note.startswith(f"Dear {asked.who},") and named.isdisjoint({*PEOPLE} - {asked.who})),
        "thing": float(bool(re.search(about, note, re.IGNORECASE)) and named.isdisjoint({*THINGS} - {asked.what})),
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
