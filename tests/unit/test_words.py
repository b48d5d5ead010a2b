"""Words, sentences and repeated n-grams of documents."""

from __future__ import annotations

import random
from itertools import pairwise, product

import pytest
from datatrove.pipeline.filters.gopher_repetition_filter import (
    find_all_duplicate,
    find_duplicates,
    find_top_duplicate,
    get_n_grams,
)
from hypothesis import given
from hypothesis import strategies as st

from stages.data.curate import words as words_module
from stages.data.curate.ngrams import NGrams, duplicates
from stages.data.curate.words import WORDS, Words, split_words, words_of

EXAMPLES = {
    '"Hello," she said.': '" Hello , " she said .',
    "Don't — I can’t!": "Do n't — I ca n’t !",
    "Smith's 10km run (in 9am heat)...": "Smith 's 10 km run ( in 9 am heat ) ...",
    "well-known a--b x=y 5+3 10-20": "well - known a -- b x = y 5 + 3 10 - 20",
    "e.g., Mr. Ng and/or U.S. firms.": "e.g. , Mr. Ng and/or U.S. firms .",
    "see https://example.org/a-b.html, or me@example.org": "see https://example.org/a-b.html , or me@example.org",
    "__init__() costs $5 or 50%": "_ _ init _ _ ( ) costs $ 5 or 50 %",
    "==== ---- numpy.linalg -x /usr/bin": "= = = = ---- numpy.linalg -x /usr / bin",
    "she'd've gone :-) its end": "she 'd 've gone :-) its end",
    "1,000 3.14 a,b": "1,000 3.14 a , b",
}
"""{text: its words, as spaCy's English tokenizer divides them}"""


@pytest.mark.parametrize("text", EXAMPLES)
def test_words_of_examples(text: str) -> None:
    assert split_words(text) == EXAMPLES[text].split()


@given(st.text(st.sampled_from("ab'’I.,:;-)(=/@$%0 9\nmé…\u2028\x1c"), max_size=60) | st.text(max_size=60))
def test_no_character_is_lost(text: str) -> None:
    words = split_words(text)
    assert "".join(words) == "".join(text.split()) and all(words)
    spans = WORDS.span_tokenize(text)
    assert all(a[1] == b[0] for a, b in pairwise(spans))


@pytest.mark.parametrize("blob", ["=" * 300_000, "a" * 300_000, "@." * 150_000, "..+" * 100_000, "x,-" * 100_000])
def test_long_runs_take_no_time(blob: str) -> None:
    assert "".join(split_words(blob)) == blob  # quadratic work would take minutes


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "MAX_CACHED", 50)
    text = " ".join(f"w{n}," for n in range(200))
    words = Words(text)
    assert len(words.hashes) == len(words.kinds) == len(words) == 400
    tables = (words_module._CHUNKS, words_module._HASHES, words_module._KINDS)
    assert all(len(table) <= 50 for table in tables)
    assert len(set(words.hashes.tolist())) == 201


def test_words_are_shared_between_the_filters_of_a_document() -> None:
    text = "A document is split once."
    assert words_of(text) is words_of("".join(text))


@pytest.mark.parametrize(
    ("text", "sentences"),
    [("No end", 1), ("One. Two! Three?", 3), ('He said "stop." Then e.g. left.', 2), ("Wait... what", 1)],
)
def test_sentences_begin_after_the_end_of_one(text: str, sentences: int) -> None:
    assert len(WORDS.sent_tokenize(text)) == sentences


def reference_top(words: list[str], n: int) -> int:
    grams = get_n_grams(words, n)
    return find_top_duplicate(grams) if grams else 0


def random_texts(count: int) -> list[str]:
    """Texts with repetition at every scale; words such as "a ab b" give equal strings when joined."""
    rng = random.Random(7)
    texts = []
    for _ in range(count):
        vocabulary = rng.choice([["a", "b", "ab", "aba"], [f"w{n}" for n in range(rng.randrange(1, 400))]])
        words = [rng.choice(vocabulary) for _ in range(rng.randrange(0, 400))]
        for _ in range(rng.randrange(4)):
            start = rng.randrange(len(words) + 1)
            at = rng.randrange(len(words) + 1)
            words[at:at] = words[start : start + rng.randrange(40)]
        texts.append(" ".join(words) + rng.choice(["", " " + "x" * 400]))
    return texts


def test_ngrams_have_the_values_of_the_definition() -> None:
    for text in random_texts(300):
        words = Words(text)
        ngrams = NGrams(words)
        for n in (2, 3, 4):
            assert ngrams.most_frequent(n) == reference_top(words.words, n)
        bounded = NGrams(words)
        for n, above in product((2, 3, 4), (0, 20, 60, 100)):
            value = bounded.most_frequent(n, 1, above)
            assert value == reference_top(words.words, n) or (value == 0 and reference_top(words.words, n) <= above)
        for n in (5, 6, 7, 8, 9, 10, 1, 2):
            assert ngrams.repeated(n) == find_all_duplicate(words.words, n), (text, n)


@given(st.lists(st.sampled_from(["a", "b", "ab", "ba", "c"]), max_size=80), st.integers(1, 6))
def test_joined_words_count_as_equal(parts: list[str], n: int) -> None:
    words = Words(" ".join(parts))
    assert NGrams(words).repeated(n) == find_all_duplicate(parts, n)
    assert NGrams(words).most_frequent(n) == reference_top(parts, n)


def test_a_rare_top_ngram_does_not_count() -> None:
    words = Words("one two three one two four")
    assert (NGrams(words).most_frequent(2, 2), NGrams(words).most_frequent(2, 3)) == (14, 0)


@given(st.lists(st.sampled_from(["", "a", "bb", "ccc"]), max_size=20))
def test_duplicates_of_lines(parts: list[str]) -> None:
    assert duplicates(parts) == find_duplicates(parts)
