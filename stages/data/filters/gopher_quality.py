"""Filter `gopher_quality`: lengths, symbols, bullets and stop words."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import Share
from stages.data.filters.base import Amount, Filter, FilterFunction, Length, Removal


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
        """The rules in datatrove's order. Words of punctuation alone do not count for the length of a document or of
        its words."""
        return self._apply

    def _apply(self, text: str) -> str | Removal:
        from datatrove.pipeline.filters.gopher_quality_filter import STOP_WORDS

        from stages.data.curation.words import LETTER, NOT_PUNCTUATION, words_of

        words = words_of(text)
        lengths = words.lengths[(words.kinds & NOT_PUNCTUATION) > 0]
        count, total = len(lengths), len(words) or 1
        if self.min_doc_words and count < self.min_doc_words:
            return Removal("gopher_short_doc", count, self.min_doc_words)
        if self.max_doc_words and count > self.max_doc_words:
            return Removal("gopher_long_doc", count, self.max_doc_words)

        average = float(lengths.sum() / (count or 1))
        if count and self.min_avg_word_length and average < self.min_avg_word_length:
            return Removal("gopher_below_avg_threshold", average, self.min_avg_word_length)
        if count and self.max_avg_word_length and average > self.max_avg_word_length:
            return Removal("gopher_above_avg_threshold", average, self.max_avg_word_length)

        limit = self.max_symbol_word_ratio
        if limit and (ratio := text.count("#") / total) > limit:
            return Removal("gopher_too_many_hashes", ratio, limit)
        if limit and (ratio := (text.count("...") + text.count("…")) / total) > limit:
            return Removal("gopher_too_many_ellipsis", ratio, limit)

        lines = text.splitlines() or [""]
        limit = self.max_bullet_lines_ratio
        if limit and (share := sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines)) > limit:
            return Removal("gopher_too_many_bullets", share, limit)
        limit = self.max_ellipsis_lines_ratio
        if limit and (share := sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines)) > limit:
            return Removal("gopher_too_many_end_ellipsis", share, limit)

        limit = self.max_non_alpha_words_ratio
        if limit and (share := int((words.kinds & LETTER).astype(bool).sum()) / total) < limit:
            return Removal("gopher_below_alpha_threshold", share, limit)
        if self.min_stop_words and (stop_words := len(set(STOP_WORDS) & set(words.words))) < self.min_stop_words:
            return Removal("gopher_enough_stop_words", stop_words, self.min_stop_words)
        return text


FILTER = GopherQuality
