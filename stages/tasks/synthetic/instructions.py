"""Requests for a courteous note of a given form, which a program can check: the data of instruction following.

`Thank the baker for the bread. Use fewer than 4 words. Do not use commas.` The constraints are those of IFEval (arXiv
2311.07911), and the verifier `instructions` scores them; whether the note fulfills the request is not scored. All
constraints of a request can be met at once. An untrained model meets some by chance, so there is a signal at any model
size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from stages.tasks.synthetic.courtesy_notes import draw_distinct

Constraint = tuple[str, str, dict[str, Any]]
"""(sentence of the constraint, IFEval's name of it, its arguments)."""


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
    """`count` different requests with as many constraints as the level: the user's message, and the fields of the row.

    level: one of LEVELS. Raises ValueError for more requests than there are.
    """
    rows = []
    for request in draw_distinct(count, rng, heldout=False):
        constraints = [KINDS[index](rng) for index in sorted(rng.sample(range(len(KINDS)), level))]
        sentences, names, arguments = zip(*constraints, strict=True)
        fields = {"instruction_id_list": list(names), "kwargs": list(arguments)}
        rows.append((" ".join([request.text, *sentences]), fields))
    return rows
