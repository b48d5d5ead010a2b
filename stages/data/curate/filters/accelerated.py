"""Accelerators: faster functions with the results of blocks of datatrove.

An accelerator takes an instance of the block, with the block's own parameters, and gives the same text, verdict and
reason for every document, or raises the same exception. It also states the value and the threshold of a removal, which
the block does not. `tests/integration/data/test_blocks.py` compares each with its block. `bench/filters.py`
measures it: one that is not 1.5 times as fast is removed. docs/curation.md has the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from stages.data.curate.filters.base import Removal
from stages.data.curate.ngrams import NGrams, duplicates
from stages.data.curate.words import LETTER, NOT_PUNCTUATION, words_of

# A function from a text to the kept text, or to its removal.
Function = Callable[[str], str | Removal]
# Every IPv4 address has this, and few texts do.
_PART_OF_ADDRESS = re.compile(r"\.[0-9]{1,3}\.")


def gopher_quality(block: Any) -> Function:
    """Returns the function of Gopher's filter of quality, with the rules in the block's order."""

    def apply(text: str) -> str | Removal:
        words = words_of(text)
        lengths = words.lengths[(words.kinds & NOT_PUNCTUATION) > 0]
        word_count = len(lengths)  # without words of punctuation alone
        total_count = len(words)  # with them: the denominator of ratios to words

        # Document length in words. As in the block, a limit of 0 or None is no rule.
        if block.min_doc_words and word_count < block.min_doc_words:
            return Removal("gopher_short_doc", word_count, block.min_doc_words)
        if block.max_doc_words and word_count > block.max_doc_words:
            return Removal("gopher_long_doc", word_count, block.max_doc_words)

        # Average word length: NaN for no words, which no limit removes.
        average = float(lengths.mean()) if word_count else float("nan")
        if block.min_avg_word_length and average < block.min_avg_word_length:
            return Removal("gopher_below_avg_threshold", average, block.min_avg_word_length)
        if block.max_avg_word_length and average > block.max_avg_word_length:
            return Removal("gopher_above_avg_threshold", average, block.max_avg_word_length)

        # Hash signs and ellipses per word.
        if block.max_symbol_word_ratio:
            symbols = {"hashes": text.count("#"), "ellipsis": text.count("...") + text.count("…")}
            for name, symbol_count in symbols.items():
                ratio = symbol_count / total_count
                if ratio > block.max_symbol_word_ratio:
                    return Removal(f"gopher_too_many_{name}", ratio, block.max_symbol_word_ratio)

        # Lines that begin with a bullet point, or end in an ellipsis.
        lines = text.splitlines()
        if block.max_bullet_lines_ratio:
            share = sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines)
            if share > block.max_bullet_lines_ratio:
                return Removal("gopher_too_many_bullets", share, block.max_bullet_lines_ratio)
        if block.max_ellipsis_lines_ratio:
            share = sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines)
            if share > block.max_ellipsis_lines_ratio:
                return Removal("gopher_too_many_end_ellipsis", share, block.max_ellipsis_lines_ratio)

        # Words with a letter: the limit is a minimum, in spite of its name.
        if block.max_non_alpha_words_ratio:
            share = int((words.kinds & LETTER).astype(bool).sum()) / total_count
            if share < block.max_non_alpha_words_ratio:
                return Removal("gopher_below_alpha_threshold", share, block.max_non_alpha_words_ratio)

        # Different stop words.
        if block.min_stop_words:
            stop_words = len(block.stop_words.intersection(words.words))
            if stop_words < block.min_stop_words:
                return Removal("gopher_enough_stop_words", stop_words, block.min_stop_words)
        return text

    return apply


def gopher_repetition(block: Any) -> Function:
    """Returns the function of Gopher's filter of repetition, with the rules in the block's order."""

    def apply(text: str) -> str | Removal:
        if not text:
            return Removal("empty")
        # Repeated paragraphs, then repeated lines: by their number, then by their characters.
        for parts, name, limit, character_limit in (
            (block.paragraph_exp.split(text.strip()), "dup_para", block.dup_para_frac, block.dup_para_char_frac),
            (block._line_splitter.split(text), "dup_line", block.dup_line_frac, block.dup_line_char_frac),
        ):
            count, characters = duplicates(parts)
            if limit and (share := count / len(parts)) > limit:
                return Removal(f"{name}_frac", share, limit)
            if character_limit and (share := characters / len(text)) > character_limit:
                return Removal(f"{name}_char_frac", share, character_limit)
        ngrams = NGrams(words_of(text))
        # The most frequent n-gram of each length, then all repeated ones (Rae et al. 2021, table A1).
        for n, limit in block.top_n_grams:
            # One character less than the limit, so that rounding cannot end the search too early.
            if (share := ngrams.most_frequent(n, 1, limit * len(text) - 1) / len(text)) > limit:
                return Removal(f"top_{n}_gram", share, limit)
        for n, limit in block.dup_n_grams:
            if (share := ngrams.repeated(n) / len(text)) > limit:
                return Removal(f"duplicated_{n}_n_grams", share, limit)
        return text

    return apply


def pii(block: Any) -> Function:
    """Returns the function of the filter of personal data.

    The block's patterns take long to find nothing, so a text without a sign of an address is not searched.
    """

    def apply(text: str) -> str:
        if block.remove_emails and "@" in text:
            text = block.emails_replacer.replace(text)
        if block.remove_ips and _PART_OF_ADDRESS.search(text):
            text = block.ip_replacer.replace(text)
        return text

    return apply


# {class of datatrove: its accelerator}.
ACCELERATORS: dict[str, Callable[[Any], Function]] = {
    "GopherQualityFilter": gopher_quality,
    "GopherRepetitionFilter": gopher_repetition,
    "PIIFormatter": pii,
}
