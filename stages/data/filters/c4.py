"""Filter `c4`: the rules of C4 for whole documents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.core.bounds import Flag
from stages.data.filters.base import Amount, Filter, FilterFunction, datatrove_function


class C4(Filter):
    """Rules of C4 that remove whole documents (Raffel et al. 2020). Its rules that remove lines are not applied."""

    step: Literal["c4"] = Field(description="selects this step")
    min_num_sentences: Amount = Field(5, description="minimum number of sentences")
    filter_lorem_ipsum: Flag = Field(True, description="remove documents that contain the phrase lorem ipsum")
    filter_curly_bracket: Flag = Field(True, description="remove documents that contain an opening curly bracket")

    def function(self) -> FilterFunction:
        """The block's line rules strip indentation and drop lines that do not end a sentence, which are most lines of
        hard-wrapped prose. They are turned off, and the text of a kept document is unchanged."""
        from datatrove.pipeline.filters import C4QualityFilter
        from datatrove.utils.text import split_into_sentences

        from stages.data.curation.words import WORDS

        block = C4QualityFilter(
            remove_citations=False,
            filter_no_terminal_punct=False,
            min_words_per_line=-1,
            max_word_length=-1,
            filter_javascript=False,
            filter_policy=False,
            language=WORDS,
            **self.parameters(),
        )

        def count_sentences(text: str) -> int:
            return sum(len(split_into_sentences(line.strip(), WORDS)) for line in text.splitlines())

        return datatrove_function(
            block,
            {
                "too_few_sentences": lambda text: (count_sentences(text), self.min_num_sentences),
                "lorem_ipsum": lambda text: (text.lower().count("lorem ipsum"), 0.0),
                "curly_bracket": lambda text: (text.count("{"), 0.0),
            },
        )


FILTER = C4
