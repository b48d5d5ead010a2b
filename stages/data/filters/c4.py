"""Filter `c4`: the rules of C4 for whole documents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.core.bounds import Flag
from stages.data.filters.base import Amount, Filter, FilterFunction, Removal


class C4(Filter):
    """Rules of C4 that remove whole documents (Raffel et al. 2020). Its rules that remove lines are not applied."""

    step: Literal["c4"] = Field(description="selects this step")
    min_num_sentences: Amount = Field(5, description="minimum number of sentences")
    filter_lorem_ipsum: Flag = Field(True, description="remove documents that contain the phrase lorem ipsum")
    filter_curly_bracket: Flag = Field(True, description="remove documents that contain an opening curly bracket")

    def function(self) -> FilterFunction:
        """The rules in datatrove's order, without those that remove lines: they strip indentation and drop lines that
        do not end a sentence, which are most lines of hard-wrapped prose. The text of a kept document is unchanged."""
        return self._apply

    def _apply(self, text: str) -> str | Removal:
        from stages.data.curation.words import count_sentences

        lorem = (text.lower().count("lorem ipsum") if self.filter_lorem_ipsum else 0, "lorem_ipsum")
        curly = (text.count("{") if self.filter_curly_bracket else 0, "curly_bracket")
        lines = text.splitlines()
        if lorem[0] and curly[0]:  # the first line that has one decides
            first = next(line for line in lines if "{" in line or "lorem ipsum" in line.lower())
            return _occurrences(*(lorem if "lorem ipsum" in first.lower() else curly))
        if lorem[0] or curly[0]:
            return _occurrences(*(lorem if lorem[0] else curly))
        if len(lines) < self.min_num_sentences:  # each line has a sentence at least
            sentences = sum(count_sentences(line) for line in lines)
            if sentences < self.min_num_sentences:
                return Removal("too_few_sentences", sentences, self.min_num_sentences)
        return text


def _occurrences(count: int, reason: str) -> Removal:
    return Removal(reason, count, 0.0)


FILTER = C4
