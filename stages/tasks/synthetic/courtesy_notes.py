"""Requests for a courteous note, with answers of mixed quality: the data of preference learning.

The user asks for one of five acts toward a person about a thing: `Thank the baker for the bread.` A complete answer
does this act toward this person about this thing, ends kindly and is well-formed English. Answers in training data are
drawn with independent flaws, as people's answers have them, so that preferences exist.

A tenth of the requests, by their hash, is held out: no training data and no RL prompt contains one of them.

`requests` adds constraints on the form of the note, as IFEval has them, for a verifier of instructions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
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
ENDINGS = ("Have a nice day!", "With kind regards.", "All the best to you.")
FILLER = ("It is a long story.", "I do not know what to say.", "As I said before.")
# (sentence of the constraint, IFEval's name of it, its arguments).
Constraint = tuple[str, str, dict[str, Any]]


@dataclass(frozen=True)
class Act:
    """The request for an act, and its words; `{who}` and `{what}` are placeholders for person and thing."""

    name: str
    request: str
    done: str


ACTS = (
    Act("thank", "Thank the {who} for the {what}.", "thank you for the {what}."),
    Act("praise", "Praise the {who} for the {what}.", "the {what} was wonderful."),
    Act("apologise", "Say sorry to the {who} about the {what}.", "I am sorry about the {what}."),
    Act("ask", "Ask the {who} for the {what}.", "may I have the {what}, please?"),
    Act("offer", "Offer the {who} the {what}.", "would you like the {what}?"),
)


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


def draw_request(rng: random.Random) -> Request:
    """Returns a random training request, each equally likely."""
    while True:
        candidate = Request(rng.choice(ACTS), rng.choice(PEOPLE), rng.choice(THINGS))
        if not candidate.heldout:
            return candidate


def draw_distinct(count: int, rng: random.Random, heldout: bool) -> list[Request]:
    """Returns `count` different requests. Raises ValueError if the grammar has too few."""
    # The grammar is small enough to list.
    all_requests = [Request(act, who, what) for act in ACTS for who in PEOPLE for what in THINGS]
    candidates = [candidate for candidate in all_requests if candidate.heldout == heldout]
    if count > len(candidates):
        raise ValueError(
            f"there are only {len(candidates)} {'held-out' if heldout else 'training'} requests, not {count}"
        )
    return rng.sample(candidates, count)


def answer(request: Request, rng: random.Random) -> str:
    """Returns an answer with flaws, each with its own chance."""
    sentence = request.act.done.format(who=request.who, what=request.what)
    if rng.random() < 0.3:
        sentence = sentence.replace(f"the {request.what}", "it")
    note = f"Dear {request.who}, {sentence}" if rng.random() < 0.6 else sentence[0].upper() + sentence[1:]
    if rng.random() < 0.2:
        note += f" {rng.choice(FILLER)} {rng.choice(FILLER)}"
    if rng.random() < 0.5:
        note += f" {rng.choice(ENDINGS)}"
    if rng.random() < 0.15:  # a stammer
        words = note.split()
        position = rng.randrange(len(words))
        note = " ".join([*words[:position], words[position], *words[position:]])
    if rng.random() < 0.2:
        note = note.lower().rstrip(".!?")
    return note


def messages(request: Request, rng: random.Random) -> list[dict[str, str]]:
    """Returns a conversation of one request and one answer."""
    return [{"role": "user", "content": request.text}, {"role": "assistant", "content": answer(request, rng)}]


def _words(rng: random.Random) -> Constraint:
    count = rng.randint(3, 12)
    arguments = {"num_words": count, "relation": "less than"}
    return f"Use fewer than {count} words.", "length_constraints:number_words", arguments


def _letters(rng: random.Random) -> Constraint:
    letter, count = rng.choice("aeost"), rng.randint(1, 3)
    arguments = {"letter": letter, "let_frequency": count, "let_relation": "at least"}
    return (
        f"Use the letter {letter} at least {('once', 'twice', 'three times')[count - 1]}.",
        "keywords:letter_frequency",
        arguments,
    )


def _commas(rng: random.Random) -> Constraint:
    return "Do not use commas.", "punctuation:no_comma", {}


def _end(rng: random.Random) -> Constraint:
    phrase = rng.choice(("Goodbye!", "Cheers!", "Take care!"))
    return f'End with "{phrase}"', "startend:end_checker", {"end_phrase": phrase}


KINDS: tuple[Callable[[random.Random], Constraint], ...] = (_words, _letters, _commas, _end)
LEVELS = range(1, len(KINDS) + 1)


def requests(count: int, rng: random.Random, level: int) -> list[tuple[str, dict[str, Any]]]:
    """Returns `count` different requests with as many constraints as the level, each (message, fields of the row).

    `level` is one of LEVELS. Raises ValueError for more requests than there are.
    """
    rows = []
    for request in draw_distinct(count, rng, heldout=False):
        constraints = [KINDS[index](rng) for index in sorted(rng.sample(range(len(KINDS)), level))]
        sentences, names, arguments = zip(*constraints, strict=True)
        fields = {"instruction_id_list": list(names), "kwargs": list(arguments)}
        rows.append((" ".join([request.text, *sentences]), fields))
    return rows
