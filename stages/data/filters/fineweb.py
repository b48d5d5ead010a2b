"""Filter `fineweb`: line punctuation, short lines, duplicate lines and newlines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.core.bounds import Share
from stages.data.filters.base import Amount, Filter, FilterFunction, Score, datatrove_function


class FineWeb(Filter):
    """Remove documents by line punctuation, short lines, duplicate lines and newlines (Penedo et al. 2024)."""

    step: Literal["fineweb"] = Field(description="selects this step")
    line_punct_thr: Share = Field(0.12, description="minimum share of lines that end with terminal punctuation")
    short_line_thr: Share = Field(0.67, description="maximum share of short lines")
    short_line_length: Amount = Field(30, description="characters up to which a line is short")
    char_duplicates_ratio: Share = Field(0.01, description="maximum share of characters in duplicate lines")
    new_line_ratio: Share = Field(0.3, description="maximum ratio of newlines to words")

    def function(self) -> FilterFunction:
        from datatrove.pipeline.filters import FineWebQualityFilter

        from stages.data.curation.words import WORDS

        return datatrove_function(FineWebQualityFilter(language=WORDS, **self.parameters()), self._scores())

    def _scores(self) -> dict[str, Score]:
        from datatrove.pipeline.filters.gopher_repetition_filter import find_duplicates
        from datatrove.utils.text import TERMINAL_PUNCTUATION

        from stages.data.curation.words import WORDS

        def visible_lines(text: str) -> list[str]:
            return [line for line in text.split("\n") if line.strip()]

        def punctuated(text: str) -> tuple[float, float]:
            lines = visible_lines(text)
            return sum(line.endswith(tuple(TERMINAL_PUNCTUATION)) for line in lines) / len(lines), self.line_punct_thr

        def short(text: str) -> tuple[float, float]:
            lines = visible_lines(text)
            return sum(len(line) <= self.short_line_length for line in lines) / len(lines), self.short_line_thr

        def duplicate(text: str) -> tuple[float, float]:
            characters = find_duplicates(visible_lines(text))[1]
            return characters / len(text.replace("\n", "")), self.char_duplicates_ratio

        def newlines(text: str) -> tuple[float, float]:
            return text.count("\n") / len(WORDS.word_tokenize(text)), self.new_line_ratio

        return {
            "empty": lambda text: (0.0, 1.0),
            "line_punct_ratio": punctuated,
            "short_line_ratio": short,
            "char_dup_ratio": duplicate,
            "list_ratio": newlines,
        }


FILTER = FineWeb
