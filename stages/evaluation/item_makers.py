"""Evaluation items that are made of one held-out document each.

An item of several choices is a beginning and four continuations of equal length in bytes, of which the first follows in
the text. The kinds differ in what continues:

- `words`: the text from the end of a word on, against that after other words of the same document;
- `lines`: the same from the end of a line or a sentence on;
- `options`: the description of an option of a manual, against those of other options of the same manual;
- `retrieval-<n>`: a key that is stated n bytes before, against three keys that are not
  (stages/tasks/synthetic/passkeys.py).

An item of `completion` is the beginning of a Python function up to the middle of a line. It counts as right if the text
parses with the line that a model writes; without any line it does not parse.
"""

from __future__ import annotations

import ast
import random
import re
import textwrap
import warnings
from difflib import SequenceMatcher

from stages.tasks.synthetic import passkeys

CHOICES = 4
# Documents are read up to here, so that the time for one is bounded.
MOST_BYTES = 2**16
# Bytes of the shortest beginning of an item.
MIN_PREFIX = 48
# Similarity of two texts, from 0 to 1, from which on one is a near copy of the other.
NEAR_COPY = 0.7
# Places of a document that are tried.
TRIES = 30
DIGITS = 6

# A beginning, and the continuations with the true one first; none for a line that is to be written.
Item = tuple[bytes, list[bytes]]

# What stands before a choice. A choice begins with white space, as tokens do: after `the `, no model expects `end`.
BEFORE = {
    "words": re.compile(rb"\w(?= \w)"),
    "lines": re.compile(rb"\S(?=\n[ \t]*\S)|[.!?](?= \S)"),
    # The name of an option, before a description in the same line or in the next one.
    "options": re.compile(
        rb"^[ \t]*--?[A-Za-z?]"
        rb"(?:[^\n]{0,40}?(?=(?:\t| {2,})[ \t]*[^\s-])|[^\n]{0,80}?(?=[ \t]*\n\s*[^\s-]))",
        re.MULTILINE,
    ),
}


def from_document(
    text: bytes, rng: random.Random, before: re.Pattern[bytes], prefix_bytes: int, choice_bytes: int
) -> Item | None:
    """Returns an item whose choices are of one document; None for a document that is too short.

    A wrong choice neither overlaps with another, nor is it a near copy of one, nor does it stand in the beginning.

    Args:
        text: The document.
        rng: Source of randomness.
        before: Matches what stands before a choice.
        prefix_bytes: Maximum bytes of the beginning.
        choice_bytes: Bytes of a choice.
    """
    pieces = {match.end(): text[match.end() : match.end() + choice_bytes] for match in before.finditer(text)}
    places = [place for place, piece in pieces.items() if _is_choice(piece, choice_bytes)]
    for true in rng.sample(places, min(TRIES, len(places))):
        if true < MIN_PREFIX:
            continue
        prefix, chosen = _whole(text[max(0, true - prefix_bytes) : true]), [true]
        for place in rng.sample(places, len(places)):
            if len(chosen) < CHOICES and pieces[place] not in prefix:
                far = all(abs(place - other) >= choice_bytes for other in chosen)
                if far and not any(is_near_copy(pieces[place], pieces[other]) for other in chosen):
                    chosen.append(place)
        if len(chosen) == CHOICES:
            return prefix, [pieces[place] for place in chosen]
    return None


def _is_choice(piece: bytes, size: int) -> bool:
    """Returns True for whole characters of one paragraph."""
    return len(piece) == size and b"\n\n" not in piece.lstrip() and _whole(piece) == piece


def _whole(text: bytes) -> bytes:
    """Returns the whole characters of a text."""
    return text.decode("utf-8", "ignore").encode()


def is_near_copy(one: bytes, other: bytes) -> bool:
    return SequenceMatcher(None, one, other, autojunk=False).ratio() >= NEAR_COPY


def retrieval(text: bytes, rng: random.Random, distance: int) -> Item | None:
    """Returns an item that asks for a key which is stated `distance` bytes before; None for a shorter document."""
    if len(text) < distance:
        return None
    keys = set[str]()
    while len(keys) < CHOICES:
        keys.add(passkeys.draw_key(rng, DIGITS, evaluation=True))
    # The order of a set differs between processes.
    first, *others = rng.sample(sorted(keys), CHOICES)
    prefix = passkeys.STATEMENT.format(first).encode() + _whole(text[:distance]) + passkeys.QUESTION.encode()
    return prefix, [passkeys.ANSWER.format(key).encode() for key in (first, *others)]


def completion(text: bytes, rng: random.Random, prefix_bytes: int) -> Item | None:
    """Returns the beginning of a function of a Python module; None if the text is no module with one that fits."""
    lines, tree = text.decode("utf-8", "ignore").split("\n"), _parsed(text.decode("utf-8", "ignore"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] if tree else []
    for function in rng.sample(functions, len(functions))[:TRIES]:
        body = textwrap.dedent("\n".join(lines[function.lineno - 1 : function.end_lineno])).split("\n")
        for number in rng.sample(range(1, len(body)), len(body) - 1)[:TRIES]:
            line = body[number]
            # Something of the line stands in the beginning, and something is left to write.
            cut = rng.randint(len(line) - len(line.lstrip()) + 1, max(1, len(line) - 1)) if len(line.strip()) > 1 else 0
            prefix = "\n".join([*body[:number], line[:cut]])
            if cut and len(prefix.encode()) <= prefix_bytes and not parses(prefix) and parses(prefix + line[cut:]):
                return prefix.encode(), []
    return None


def parses(source: str) -> bool:
    """Returns True for the beginning of a Python module that ends with a whole statement, or with the head of one."""
    last = source.rpartition("\n")[2]
    indent = last[: len(last) - len(last.lstrip())]
    return _parsed(source) is not None or _parsed(f"{source}\n{indent} pass") is not None


def _parsed(source: str) -> ast.Module | None:
    with warnings.catch_warnings(action="ignore"):
        try:
            return ast.parse(source)
        # A null byte, or brackets that are nested too deeply, are no Python either.
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
