"""Filter `fineweb`: line punctuation, short lines, duplicate lines and newlines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.core.bounds import Share
from stages.data.filters.base import Amount, Filter, FilterFunction, Removal


class FineWeb(Filter):
    """Remove documents by line punctuation, short lines, duplicate lines and newlines (Penedo et al. 2024)."""

    step: Literal["fineweb"] = Field(description="selects this step")
    line_punct_thr: Share = Field(0.12, description="minimum share of lines that end with terminal punctuation")
    short_line_thr: Share = Field(0.67, description="maximum share of short lines")
    short_line_length: Amount = Field(30, description="characters up to which a line is short")
    char_duplicates_ratio: Share = Field(0.01, description="maximum share of characters in duplicate lines")
    new_line_ratio: Share = Field(0.3, description="maximum ratio of newlines to words")

    def function(self) -> FilterFunction:
        """The rules in datatrove's order."""
        return self._apply

    def _apply(self, text: str) -> str | Removal:
        from datatrove.utils.text import TERMINAL_PUNCTUATION

        from stages.data.curation.ngrams import duplicates
        from stages.data.curation.words import words_of

        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            return Removal("empty", 0.0, 1.0)
        share = sum(line[-1] in TERMINAL_PUNCTUATION for line in lines) / len(lines)
        if share < self.line_punct_thr:
            return Removal("line_punct_ratio", share, self.line_punct_thr)
        share = sum(len(line) <= self.short_line_length for line in lines) / len(lines)
        if share > self.short_line_thr:
            return Removal("short_line_ratio", share, self.short_line_thr)
        newlines = text.count("\n")
        share = duplicates(lines)[1] / (len(text) - newlines)
        if share > self.char_duplicates_ratio:
            return Removal("char_dup_ratio", share, self.char_duplicates_ratio)
        ratio = newlines / len(words_of(text))
        if ratio > self.new_line_ratio:
            return Removal("list_ratio", ratio, self.new_line_ratio)
        return text


FILTER = FineWeb
