"""Decontamination: finds the evaluation item that occurs in a document."""

from __future__ import annotations

from collections.abc import Iterable

from stages.data.curate.words import searched_words


class ContaminationIndex:
    """Word n-grams of the evaluation items, by their length, to the first item that has them.

    An item of fewer than `ngram` words is one n-gram of its own length; a longer one has an n-gram for every run of
    `ngram` words.
    """

    def __init__(self, items: Iterable[tuple[str, str]], ngram: int) -> None:
        self.ngram = ngram
        self.by_length: dict[int, dict[tuple[str, ...], str]] = {}
        for item_id, text in items:
            words = searched_words(text)
            n = min(len(words), ngram)
            for i in range(len(words) - n + 1 if n else 0):
                self.by_length.setdefault(n, {}).setdefault(tuple(words[i : i + n]), item_id)

    def find(self, text: str) -> tuple[str, int] | None:
        """(item id, length of the match in words) of the longest kind of match, else None."""
        words = searched_words(text)
        for n in sorted(self.by_length, reverse=True):
            table = self.by_length[n]
            for gram in zip(*(words[i:] for i in range(n)), strict=False):
                if gram in table:
                    return table[gram], n
        return None
