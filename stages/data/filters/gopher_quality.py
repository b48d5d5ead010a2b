"""Filter `gopher_quality`: lengths, symbols, bullets and stop words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import Share
from stages.data.filters.base import Amount, Filter, FilterFunction, Length, Score, datatrove_function


class GopherQuality(Filter):
    """Remove documents by length, word length, symbols, bullets and stop words (Rae et al. 2021).

    A limit of 0 turns its rule off.
    """

    step: Literal["gopher_quality"] = Field(description="selects this step")
    min_doc_words: Amount = Field(50, description="minimum number of words")
    max_doc_words: Amount = Field(100_000, description="maximum number of words")
    min_avg_word_length: Length = Field(3, description="minimum average word length in characters")
    max_avg_word_length: Length = Field(10, description="maximum average word length in characters")
    max_symbol_word_ratio: Length = Field(
        0.1, description="maximum ratio of hash signs to words, and of ellipses to words"
    )
    max_bullet_lines_ratio: Share = Field(0.9, description="maximum share of lines that start with a bullet or hyphen")
    max_ellipsis_lines_ratio: Share = Field(0.3, description="maximum share of lines that end with an ellipsis")
    max_non_alpha_words_ratio: Share = Field(
        0.8, description="minimum share of words with a letter, despite the name (datatrove's)"
    )
    min_stop_words: Amount = Field(2, description="minimum number of different English stop words, of eight")

    @model_validator(mode="after")
    def _check_ranges(self) -> GopherQuality:
        self._require_order("doc_words", "avg_word_length")
        return self

    def function(self) -> FilterFunction:
        from datatrove.pipeline.filters import GopherQualityFilter

        from stages.data.curation.words import WORDS

        return datatrove_function(GopherQualityFilter(language=WORDS, **self.parameters()), self._scores())

    def _scores(self) -> dict[str, Score]:
        import numpy as np
        from datatrove.pipeline.filters.gopher_quality_filter import STOP_WORDS
        from datatrove.utils.text import PUNCTUATION_SET

        from stages.data.curation.words import WORDS

        words = WORDS.word_tokenize

        def word_lengths(text: str) -> list[int]:
            return [len(word) for word in words(text) if any(c not in PUNCTUATION_SET for c in word)]

        def average_word_length(text: str) -> float:
            lengths = word_lengths(text)
            return float(np.mean(lengths)) if lengths else 0.0

        def share_of_lines(text: str, test: Callable[[str], bool]) -> float:
            lines = text.splitlines()
            return sum(map(test, lines)) / len(lines)

        def starts_with_bullet(line: str) -> bool:
            return line.lstrip().startswith(("•", "-"))

        def ends_with_ellipsis(line: str) -> bool:
            return line.rstrip().endswith(("...", "…"))

        def share_of_words_with_letter(text: str) -> float:
            return sum(any(c.isalpha() for c in word) for word in words(text)) / len(words(text))

        return {
            "gopher_short_doc": lambda text: (len(word_lengths(text)), self.min_doc_words),
            "gopher_long_doc": lambda text: (len(word_lengths(text)), self.max_doc_words),
            "gopher_below_avg_threshold": lambda text: (average_word_length(text), self.min_avg_word_length),
            "gopher_above_avg_threshold": lambda text: (average_word_length(text), self.max_avg_word_length),
            "gopher_too_many_hashes": lambda text: (text.count("#") / len(words(text)), self.max_symbol_word_ratio),
            "gopher_too_many_ellipsis": lambda text: (
                (text.count("...") + text.count("…")) / len(words(text)),
                self.max_symbol_word_ratio,
            ),
            "gopher_too_many_bullets": lambda text: (
                share_of_lines(text, starts_with_bullet),
                self.max_bullet_lines_ratio,
            ),
            "gopher_too_many_end_ellipsis": lambda text: (
                share_of_lines(text, ends_with_ellipsis),
                self.max_ellipsis_lines_ratio,
            ),
            "gopher_below_alpha_threshold": lambda text: (
                share_of_words_with_letter(text),
                self.max_non_alpha_words_ratio,
            ),
            "gopher_enough_stop_words": lambda text: (len(set(STOP_WORDS) & set(words(text))), self.min_stop_words),
        }


FILTER = GopherQuality
