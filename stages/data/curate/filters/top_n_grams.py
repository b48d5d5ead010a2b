"""Filter `top_n_grams`: the most frequent n-grams of words, in texts that are too short for datatrove's rule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.bounds import Range, Share
from stages.data.curate.filters.base import Document, Filter, FilterFunction, Positive, Removal

NGrams = Annotated[tuple[tuple[Annotated[int, Range(1, 100)], Share], ...], Field(max_length=100)]


class TopNGrams(Filter):
    """Removes documents whose most frequent n-gram of words has a large share of the text.

    GopherRepetitionFilter has this rule, too, but counts an n-gram that occurs once, and so removes any text of about
    ten words. Give it `top_n_grams: []`, and use this step with short documents.
    """

    step: Literal["top_n_grams"]
    """selects this step"""
    min_top_count: Positive = 3
    """occurrences from which an n-gram counts"""
    top_n_grams: NGrams = ((2, 0.2), (3, 0.18), (4, 0.16))
    """(n, maximum share of characters in the most frequent n-gram of words)"""

    def function(self) -> FilterFunction:
        return self._apply

    def _apply(self, document: Document) -> str | Removal:
        from stages.data.curate.ngrams import NGrams
        from stages.data.curate.words import words_of

        text = document.text
        if not text:
            return text
        ngrams = NGrams(words_of(text))
        for n, limit in self.top_n_grams:
            if (share := ngrams.most_frequent(n, self.min_top_count, limit * len(text) - 1) / len(text)) > limit:
                return Removal(f"top_{n}_gram", share, limit)
        return text
