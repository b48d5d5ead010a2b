"""Filter `gopher_repetition`: repeated lines, paragraphs and n-grams."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.bounds import Range, Share
from stages.data.filters.base import Filter, FilterFunction, Positive, Removal, Score, datatrove_function

NGrams = Annotated[tuple[tuple[Annotated[int, Range(1, 100)], Share], ...], Field(max_length=100)]


class GopherRepetition(Filter):
    """Remove documents with many repeated lines, paragraphs or n-grams (Rae et al. 2021, table A1)."""

    step: Literal["gopher_repetition"] = Field(description="selects this step")
    dup_line_frac: Share = Field(0.3, description="maximum share of duplicate lines; 0: no limit")
    dup_para_frac: Share = Field(0.3, description="maximum share of duplicate paragraphs; 0: no limit")
    dup_line_char_frac: Share = Field(0.2, description="maximum share of characters in duplicate lines; 0: no limit")
    dup_para_char_frac: Share = Field(
        0.2, description="maximum share of characters in duplicate paragraphs; 0: no limit"
    )
    min_top_count: Positive = Field(
        3, description="occurrences from which the top n-gram counts as repeated (datatrove: 1)"
    )
    top_n_grams: NGrams = Field(
        ((2, 0.2), (3, 0.18), (4, 0.16)),
        description="(n, maximum share of characters in the most frequent n-gram of words)",
    )
    dup_n_grams: NGrams = Field(
        ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)),
        description="(n, maximum share of characters in repeated n-grams of words)",
    )

    def function(self) -> FilterFunction:
        """datatrove's block for all but the top n-grams: it counts an n-gram that occurs once as repeated, and so
        removes any text of about ten words. The published rules were meant for documents of fifty words or more."""
        from datatrove.pipeline.filters import GopherRepetitionFilter

        from stages.data.curation.words import WORDS

        parameters = self.model_dump(exclude={"step", "min_top_count", "top_n_grams"})
        without_top = datatrove_function(
            GopherRepetitionFilter(top_n_grams=(), language=WORDS, **parameters), self._scores()
        )

        def function(text: str) -> str | Removal:
            for n, threshold in self.top_n_grams:
                if text and (share := self._top_share(text, n)) > threshold:
                    return Removal(f"top_{n}_gram", share, threshold)
            return without_top(text)

        return function

    def _top_share(self, text: str, n: int) -> float:
        """Share of the text's characters in its most frequent word n-gram; 0 if that occurs less than min_top_count."""
        from datatrove.pipeline.filters.gopher_repetition_filter import get_n_grams

        from stages.data.curation.words import WORDS

        counts = Counter(get_n_grams(WORDS.word_tokenize(text), n))
        gram, count = counts.most_common(1)[0] if counts else ("", 0)
        return len(gram) * count / len(text) if count >= self.min_top_count else 0.0

    def _scores(self) -> dict[str, Score]:
        from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate, find_duplicates

        from stages.data.curation.words import WORDS

        def elements(parts: list[str], threshold: float) -> tuple[float, float]:
            return find_duplicates(parts)[0] / len(parts), threshold

        def characters(parts: list[str], threshold: float, text: str) -> tuple[float, float]:
            return find_duplicates(parts)[1] / len(text), threshold

        def of_n_grams(n: int, threshold: float, text: str) -> tuple[float, float]:
            return find_all_duplicate(WORDS.word_tokenize(text), n) / len(text), threshold

        def paragraphs(text: str) -> list[str]:
            return re.split(r"\n{2,}", text.strip())

        def lines(text: str) -> list[str]:
            return re.split(r"\n+", text)

        return {
            "empty": lambda text: (0.0, 1.0),
            "dup_para_frac": lambda text: elements(paragraphs(text), self.dup_para_frac),
            "dup_para_char_frac": lambda text: characters(paragraphs(text), self.dup_para_char_frac, text),
            "dup_line_frac": lambda text: elements(lines(text), self.dup_line_frac),
            "dup_line_char_frac": lambda text: characters(lines(text), self.dup_line_char_frac, text),
            **{f"duplicated_{n}_n_grams": partial(of_n_grams, n, threshold) for n, threshold in self.dup_n_grams},
        }


FILTER = GopherRepetition
