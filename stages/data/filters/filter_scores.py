"""Rule scores: for each reason that a block gives, the value that the rule compared and its threshold.

datatrove's blocks report why they removed a document but not by how much. This module repeats the comparison, by the
same definition, for removed documents only; a test checks that value and threshold lie on the removing side.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate, find_duplicates
from datatrove.utils.text import PUNCTUATION_SET

from pipeline.core.errors import AtomError
from stages.data.filters.filters import CodeShape
from stages.data.filters.words import WORDS

Measure = Callable[[Document], float]


def measure_rule(step: str, block: Any, reason: str, doc: Document) -> tuple[float, float]:
    """(value, threshold) of the rule that removed `doc`. Raises AtomError for a reason that has no measure."""
    if reason == "empty":
        return 0.0, 1.0
    if step == "language":
        _, scores = block.model.predict(doc)
        return max(scores.values()), block.language_threshold
    if step == "gopher_repetition":
        return _repetition(block, reason, doc.text)
    if reason == "short_line_ratio":
        return _short_lines(doc, block.short_line_length), block.short_line_threshold
    if reason not in _MEASURES:
        raise AtomError(f"step {step} gave the reason {reason!r}, which has no measure; add it to curation/measures.py")
    measure, threshold = _MEASURES[reason]
    return float(measure(doc)), float(getattr(block, threshold) if isinstance(threshold, str) else threshold)


def _repetition(block: Any, reason: str, text: str) -> tuple[float, float]:
    words = WORDS.word_tokenize(text)
    if match := re.fullmatch(r"top_(\d+)_gram", reason):
        n = int(match[1])
        return float(block.top_share(text, n)), dict(block.top_n_grams)[n]
    if match := re.fullmatch(r"duplicated_(\d+)_n_grams", reason):
        n = int(match[1])
        return find_all_duplicate(words, n) / len(text), dict(block.dup_n_grams)[n]
    parts = re.split(r"\n{2,}", text.strip()) if "para" in reason else re.split(r"\n+", text)
    elements, chars = find_duplicates(parts)
    return (chars / len(text) if "char" in reason else elements / len(parts)), getattr(block, reason)


def _words(doc: Document) -> list[str]:
    return WORDS.word_tokenize(doc.text)


def _real_words(doc: Document) -> list[str]:
    return [w for w in _words(doc) if any(c not in PUNCTUATION_SET for c in w)]


def _word_length(doc: Document) -> float:
    words = _real_words(doc)
    return float(np.mean([len(w) for w in words])) if words else 0.0


def _share_of_lines(test: Callable[[str], bool]) -> Measure:
    def share(doc: Document) -> float:
        lines = doc.text.splitlines()
        return sum(map(test, lines)) / len(lines)

    return share


def _visible_lines(doc: Document) -> list[str]:
    return [line for line in doc.text.split("\n") if line.strip()]


def _short_lines(doc: Document, length: int) -> float:
    lines = _visible_lines(doc)
    return sum(len(line) <= length for line in lines) / len(lines)


def _punctuated(doc: Document) -> float:
    from datatrove.utils.text import TERMINAL_PUNCTUATION

    lines = _visible_lines(doc)
    return sum(line.endswith(tuple(TERMINAL_PUNCTUATION)) for line in lines) / len(lines)


def _stop_words(doc: Document) -> float:
    from datatrove.pipeline.filters.gopher_quality_filter import STOP_WORDS

    return len(set(STOP_WORDS) & set(_words(doc)))


def _sentences(doc: Document) -> float:
    from datatrove.utils.text import split_into_sentences

    return sum(len(split_into_sentences(line.strip(), WORDS)) for line in doc.text.splitlines())


def _shape(name: str) -> Measure:
    return lambda doc: CodeShape.shape(doc.text)[name]


# reason -> (measure, the block's attribute that it is compared with, or the constant)
_MEASURES: dict[str, tuple[Measure, str | float]] = {
    "gopher_short_doc": (lambda d: len(_real_words(d)), "min_doc_words"),
    "gopher_long_doc": (lambda d: len(_real_words(d)), "max_doc_words"),
    "gopher_below_avg_threshold": (_word_length, "min_avg_word_length"),
    "gopher_above_avg_threshold": (_word_length, "max_avg_word_length"),
    "gopher_too_many_hashes": (lambda d: d.text.count("#") / len(_words(d)), "max_symbol_word_ratio"),
    "gopher_too_many_ellipsis": (
        lambda d: (d.text.count("...") + d.text.count("…")) / len(_words(d)),
        "max_symbol_word_ratio",
    ),
    "gopher_too_many_bullets": (_share_of_lines(lambda s: s.lstrip().startswith(("•", "-"))), "max_bullet_lines_ratio"),
    "gopher_too_many_end_ellipsis": (
        _share_of_lines(lambda s: s.rstrip().endswith(("...", "…"))),
        "max_ellipsis_lines_ratio",
    ),
    "gopher_below_alpha_threshold": (
        lambda d: sum(any(c.isalpha() for c in w) for w in _words(d)) / len(_words(d)),
        "max_non_alpha_words_ratio",
    ),
    "gopher_enough_stop_words": (_stop_words, "min_stop_words"),
    "too_few_sentences": (_sentences, "min_num_sentences"),
    "lorem_ipsum": (lambda d: d.text.lower().count("lorem ipsum"), 0.0),
    "curly_bracket": (lambda d: d.text.count("{"), 0.0),
    "line_punct_ratio": (_punctuated, "line_punct_thr"),
    "char_dup_ratio": (
        lambda d: find_duplicates(_visible_lines(d))[1] / len(d.text.replace("\n", "")),
        "char_duplicates_ratio",
    ),
    "list_ratio": (lambda d: d.text.count("\n") / len(_words(d)), "new_line_ratio"),
    "too_few_lines": (_shape("lines"), "min_lines"),
    "too_many_lines": (_shape("lines"), "max_lines"),
    "long_line": (_shape("line_length"), "max_line_length"),
    "long_lines_on_average": (_shape("average_line_length"), "max_average_line_length"),
    "few_letters_and_digits": (_shape("alphanumeric_fraction"), "min_alphanumeric_fraction"),
    "many_digits": (_shape("digit_fraction"), "max_digit_fraction"),
    "does_not_parse": (lambda d: 0.0, 1.0),
}
