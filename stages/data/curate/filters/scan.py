"""Filter `scan`: words that a line break divides are joined, and text in which few words are words is removed."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Literal

from pipeline.core.bounds import Share
from stages.data.curate.filters.base import Document, Filter, FilterFunction, Removal

_DIVIDED = re.compile(r"([A-Za-z]{2,})[-¬]\n[ \t]*([a-z]{2,})")
_WORD = re.compile(r"[^\W\d_]+")
_SPACE = re.compile(r"\s+")


@cache
def english_words() -> frozenset[str]:
    """Returns the list of symspellpy: 82,765 English words, in lower case."""
    file = resources.files("symspellpy") / "frequency_dictionary_en_82_765.txt"
    return frozenset(line.split()[0] for line in file.read_text("utf-8-sig").splitlines())


class Scan(Filter):
    """Joins the parts of English words that a line break divides, and removes text that was recognized badly.

    The parts are joined if the result is in the dictionary. Names, foreign words and old spellings are in none, so the
    least share of known words is far below one.
    """

    step: Literal["scan"]
    """selects this step"""
    min_letters: Share = 0.75
    """minimum share of letters, whitespace not counted"""
    max_single_letters: Share = 0.1
    """maximum share of words of one letter, `a` and `I` not counted"""
    min_known_words: Share = 0.7
    """minimum share of words of two letters or more that the dictionary has"""

    def function(self) -> FilterFunction:
        known = english_words()

        def join(parts: re.Match[str]) -> str:
            word = parts[1] + parts[2]
            return f"{word}\n" if word.lower() in known else parts[0]

        def function(document: Document) -> str | Removal:
            text = _DIVIDED.sub(join, document.text)
            words = _WORD.findall(text)
            # Of an empty text every share is 0.
            letters = sum(map(len, words)) / max(1, len(_SPACE.sub("", text)))
            if letters < self.min_letters:
                return Removal("few_letters", letters, self.min_letters)
            longer = [word.lower() for word in words if len(word) > 1]
            single = sum(len(word) == 1 and word not in "aAI" for word in words) / max(1, len(words))
            if single > self.max_single_letters:
                return Removal("single_letters", single, self.max_single_letters)
            share = sum(word in known for word in longer) / max(1, len(longer))
            return text if share >= self.min_known_words else Removal("unknown_words", share, self.min_known_words)

        return function
