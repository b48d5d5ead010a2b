"""Procedural tasks in long texts that need more than one key: statements spread over real text, and a question.

    …text… The pass key of the lamp is 482913. …text… The pass key of the drum is 120457. …text… The pass key of the
    lamp is 482913

The kinds measure what a passkey does not, after the categories of RULER (Hsieh et al. 2024, arXiv:2404.06654); grammar,
words and program are this project's:

| kind | statements | answer |
|---|---|---|
| multi_key | a key for each of six things | the key of one of them |
| multi_value | three keys for one thing, one for each of three others | its three keys, in the order of the text |
| variables | two chains of four things, of which each has the key of the one before | the key at a chain's end |
| most_common | deliveries of five things, one of them more often | what was delivered most often |
| sum | a number of coins for each of six things | the coins of two of them together |

An answer is one string and is right or wrong as a whole. A tenth of all keys, and of all pairs of things that
`most_common` and `sum` decide between, is for evaluation alone and in no training data, by hash as in `passkeys`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from stages.data.synthetic import passkeys
from stages.data.synthetic.courtesy_notes import THINGS

Kind = Literal["multi_key", "multi_value", "variables", "most_common", "sum"]
THINGS_SHOWN, VALUES, CHAIN, DIGITS = 6, 3, 4, 6
COUNTS = (6, 3, 3, 2, 2)
"""Deliveries of each thing of `most_common`."""
KEY = "\nThe pass key of the {} is {}.\n"


@dataclass(frozen=True)
class Task:
    """statements: in the order of the text; needed: those that the answer follows from. answer: with the space before
    it, as in training text."""

    statements: tuple[str, ...]
    needed: tuple[int, ...]
    question: str
    answer: str


def _multi_key(rng: random.Random, evaluation: bool) -> Task:
    things = rng.sample(THINGS, THINGS_SHOWN)
    keys = [passkeys.draw_key(rng, DIGITS, evaluation) for _ in things]
    chosen = rng.randrange(len(things))
    statements = tuple(KEY.format(thing, key) for thing, key in zip(things, keys, strict=True))
    return Task(statements, (chosen,), f"\nThe pass key of the {things[chosen]} is", f" {keys[chosen]}")


def _multi_value(rng: random.Random, evaluation: bool) -> Task:
    thing, *others = rng.sample(THINGS, 1 + VALUES)
    names = [thing] * VALUES + others
    rng.shuffle(names)
    rows = [(name, passkeys.draw_key(rng, DIGITS, evaluation)) for name in names]
    needed = tuple(n for n, name in enumerate(names) if name == thing)
    answer = ", ".join(rows[n][1] for n in needed)
    question = f"\nThe pass keys of the {thing}, in the order of the text, are"
    return Task(tuple(KEY.format(*row) for row in rows), needed, question, f" {answer}")


def _variables(rng: random.Random, evaluation: bool) -> Task:
    things = rng.sample(THINGS, 2 * CHAIN)
    chains = [things[:CHAIN], things[CHAIN:]]
    keys = [passkeys.draw_key(rng, DIGITS, evaluation) for _ in chains]
    links = []
    for chain, key in zip(chains, keys, strict=True):
        followers = [f"\nThe {name} has the pass key of the {before}.\n" for before, name in pairwise(chain)]
        links.append([KEY.format(chain[0], key), *followers])
    turns = [0] * CHAIN + [1] * CHAIN
    rng.shuffle(turns)
    statements = tuple(links[turn].pop(0) for turn in turns)
    chosen = rng.randrange(2)
    needed = tuple(n for n, turn in enumerate(turns) if turn == chosen)
    return Task(statements, needed, f"\nThe pass key of the {chains[chosen][-1]} is", f" {keys[chosen]}")


def _most_common(rng: random.Random, evaluation: bool) -> Task:
    things = _reserved(rng, len(COUNTS), evaluation)
    names = [thing for thing, count in zip(things, COUNTS, strict=True) for _ in range(count)]
    rng.shuffle(names)
    needed = tuple(n for n, name in enumerate(names) if name == things[0])
    statements = tuple(f"\nOne {name} was delivered.\n" for name in names)
    return Task(statements, needed, "\nWhat was delivered most often is the", f" {things[0]}")


def _sum(rng: random.Random, evaluation: bool) -> Task:
    things = _reserved(rng, THINGS_SHOWN, evaluation)
    coins = [rng.randint(2, 9) for _ in things]
    order = rng.sample(range(len(things)), len(things))
    statements = tuple(f"\nUnder the {things[n]} are {coins[n]} coins.\n" for n in order)
    needed = tuple(place for place, n in enumerate(order) if n < 2)
    question = f"\nThe coins under the {things[0]} and under the {things[1]} are together"
    return Task(statements, needed, question, f" {coins[0] + coins[1]}")


def _reserved(rng: random.Random, count: int, evaluation: bool) -> list[str]:
    """Things of which the first two are a pair for evaluation, or one of the others."""
    while True:
        things = rng.sample(THINGS, count)
        if is_pair_for_evaluation(things[0], things[1]) == evaluation:
            return things


def is_pair_for_evaluation(first: str, second: str) -> bool:
    """Whether a pair of things, in any order, is reserved for evaluation."""
    return passkeys.is_for_evaluation("/".join(sorted((first, second))))


KINDS: dict[Kind, Callable[[random.Random, bool], Task]] = {
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "variables": _variables,
    "most_common": _most_common,
    "sum": _sum,
}


def draw_task(kind: Kind, rng: random.Random, evaluation: bool = False) -> Task:
    """A task of those for evaluation, or of the others."""
    return KINDS[kind](rng, evaluation)


def draw_places(rng: random.Random, count: int, room: int) -> list[int]:
    """Where in `room` units of text each of the statements begins, in order."""
    return sorted(rng.randint(0, room) for _ in range(count))


def min_characters(kinds: Sequence[Kind]) -> int:
    """Characters that hold a task of each kind, without any text: those of the longest of a hundred, and a tenth."""
    rng = random.Random(0)
    tasks = [draw_task(kind, rng) for kind in kinds for _ in range(100)]
    return max(sum(map(len, (*task.statements, task.question, task.answer))) for task in tasks) * 11 // 10


def draw(
    texts: Sequence[tuple[str, str]], count: int, chars: tuple[int, int], kinds: Sequence[Kind], rng: random.Random
) -> Iterator[tuple[str, int, str]]:
    """`count` training documents as (text, characters without loss, place of the first text), of the kinds in turn.

    texts, chars: as in `passkeys.draw`. A statement is before a line or a word.
    """
    for n in range(count):
        task = draw_task(kinds[n % len(kinds)], rng)
        size = passkeys.draw_size(chars, rng)
        start = rng.randrange(len(texts))
        room = max(0, size - sum(map(len, (*task.statements, task.question, task.answer))))
        filler = passkeys.cut_filler(texts, start, room)
        parts, last = [], 0
        for statement, place in zip(task.statements, draw_places(rng, len(task.statements), len(filler)), strict=True):
            place = max(last, passkeys.word_start(filler, place))
            parts += [filler[last:place], statement]
            last = place
        prompt = "".join(parts) + filler[last:] + task.question
        yield prompt + task.answer, len(prompt), texts[start][1]
