"""Filter `gopher_repetition`: repeated lines, paragraphs and n-grams."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.bounds import Range, Share
from stages.data.filters.base import Filter, FilterFunction, Positive, Removal

_PARAGRAPHS, _LINES = re.compile(r"\n{2,}"), re.compile(r"\n+")
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
        """The rules in datatrove's order. At `min_top_count` 1 the results are datatrove's: it takes an n-gram that
        occurs once for repeated, and so removes any text of about ten words. The published rules were meant for
        documents of fifty words or more."""
        return self._apply

    def _apply(self, text: str) -> str | Removal:
        from stages.data.curation.ngrams import NGrams, duplicates
        from stages.data.curation.words import words_of

        if not text:
            return Removal("empty", 0.0, 1.0)
        for parts, name, limit, character_limit in (
            (_PARAGRAPHS.split(text.strip()), "dup_para", self.dup_para_frac, self.dup_para_char_frac),
            (_LINES.split(text), "dup_line", self.dup_line_frac, self.dup_line_char_frac),
        ):
            count, characters = duplicates(parts)
            if limit and (share := count / len(parts)) > limit:
                return Removal(f"{name}_frac", share, limit)
            if character_limit and (share := characters / len(text)) > character_limit:
                return Removal(f"{name}_char_frac", share, character_limit)
        ngrams = NGrams(words_of(text))
        for n, limit in self.top_n_grams:
            if (share := ngrams.most_frequent(n, self.min_top_count, limit * len(text) - 1) / len(text)) > limit:
                return Removal(f"top_{n}_gram", share, limit)
        for n, limit in self.dup_n_grams:
            if (share := ngrams.repeated(n) / len(text)) > limit:
                return Removal(f"duplicated_{n}_n_grams", share, limit)
        return text


FILTER = GopherRepetition
