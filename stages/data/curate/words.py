"""Words and sentences of English text, and the normal form in which evaluation items are searched.

The published thresholds of Gopher (Rae et al. 2021), C4 (Raffel et al. 2020) and FineWeb (Penedo et al. 2024) count
words, and datatrove counts those of spaCy's English tokenizer. `split_words`, which a data recipe chooses by `words:
atom`, follows the same rules in an implementation of its own: text is divided at whitespace, then punctuation, units
and contractions are cut from both ends of each chunk, then the rest is cut at hyphens, commas and the like. The words
of a chunk depend on the chunk alone, so each is cut once and looked up afterwards.
`tests/integration/data/test_agreement.py` holds blocks with these words to their verdicts with spaCy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import chain, product
from typing import TypeVar

import numpy as np
import regex  # type: ignore[import-untyped]
from datatrove.utils.text import PUNCTUATION_SET
from datatrove.utils.word_tokenizers import WordTokenizer, strip_strings
from numpy.typing import NDArray

# Longer chunks, which are data and not words, are cut at every sign of punctuation and searched for nothing else.
MAX_CHUNK = 1000
# Entries of a table of chunks or words; a full table is emptied.
MAX_CACHED = 2**18
MAX_CACHED_LENGTH = 100
# Marks that are added up for each word (`_kind`).
NOT_PUNCTUATION, LETTER = 1, 2
# 2^64 divided by the golden ratio, an odd number whose powers spread over all 64 bits.
HASH_BASE = 0x9E3779B97F4A7C15
_UINT64 = 2**64 - 1
Value = TypeVar("Value")

# Words, or numbers, or one sign with a meaning in a problem ("347+586" is not "347, 586"); other punctuation and all
# spacing are ignored.
_SEARCHED = re.compile(r"\w+|[-+*/=<>%^]")

# Cut from both ends: punctuation, quotes, brackets and pictures, but no sign that is part of numbers, paths, addresses.
_EDGE = r"[\p{P}--[%\-./@\\§¶†‡•‰′″‐‑‒–—―]]\p{So}<>`´"
_ASCII_EDGE = frozenset("!\"#&'()*,:;<>?[]_`{}")
_LOWER, _UPPER, _QUOTE = r"\p{Ll}\p{Lo}", r"\p{Lu}\p{Lo}", r"[\p{Pi}\p{Pf}]'\"`´‚„,"
_UNIT = r"[kdcm]?m[²³]?|[µn]m|[kmµ]?g|[mkgt]b|[MKGT]B|[hk]?Pa|km/?h|m/s|mph|mbar|ha|yd|in|ft|t|lb|oz|[TGMK%]"
_PREFIX = regex.compile(rf"(?V1)[§%=—–]|\+(?![0-9])|[{_EDGE}]|\.\.+|(?:US|C|A)?\$|\p{{Sc}}")
_SUFFIX = regex.compile(
    rf"(?V1)(?:[{_EDGE}]|…{{2}}|\.\.+|['’][sS]|[—–]|(?<=[0-9])(?:\+|\p{{Sc}}|(?:US|C|A)\$|{_UNIT})"
    rf"|(?<=[0-9{_LOWER}²%+|\-{_EDGE}])\.|(?<=[{_UPPER}]{{2}})\.)$"
)
_INFIX = regex.compile(
    rf"(?V1)\.\.+|[…\p{{So}}]|(?<=[0-9])[+\-*^](?=[0-9-])|(?<=[{_LOWER}{_QUOTE}])\.(?=[{_UPPER}{_QUOTE}])"
    r"|(?<=\p{L}),(?=\p{L})|(?<=[\p{L}0-9])(?:-{1,3}|–|—{1,2}|~)(?=\p{L})|(?<=[\p{L}0-9])[:<>=/](?=\p{L})"
)
# Every infix has one of these.
_INSIDE = re.compile(r"[-.,+*^~:<>=/]|[^\x00-\x7f]")
_LABEL = r"[A-Za-z0-9\u00a1-\uffff]"
_ADDRESS = regex.compile(
    rf"(?V1)(?:[\w+.\-]{{2,}}://)?(?:\S+@)?(?:(?:{_LABEL}(?:[\w\-\u00a1-\uffff]{{0,62}}{_LABEL})?\.)+[{_LOWER}]{{2,63}}"
    r"|(?!(?:10|127)\.|192\.168\.|169\.254\.)[1-9]\d{0,2}(?:\.\d{1,3}){3})(?::\d{2,5})?(?:[/?#]\S*)?"
)
_DATA = regex.compile(rf"(?V1)[{_EDGE}]|[^{_EDGE}]+")
_EMOTICON = re.compile(
    r":'?-?(?:\){1,3}|\({1,3})|:-?[\]}/|*>1PpOo03XxD]|;-?[)D]|=[()\[\]/|D3]|8-?[)D]|[xX]DD?|\(-?[:=;]|\(-8|\[-?[:=]|\)-?:|\]="
    r"|:o\)|\(o:|[oO0][_.][oO0]|\^_+\^|-_+-|[vV][._][vV]|;_;|@_@|>[._]<|<3+|</3"
)
# Every emoticon and every contraction or abbreviation with a sign has one of these.
_REJOINED = re.compile(r"[.'’/\\+:;=8^_@<>-]")
_NUMBER_OR_POSSESSIVE = re.compile(r"[0-9'’]")
# A word in quotes, brackets or ordinary punctuation, as most chunks are. A capital before a stop can be initials.
_PLAIN = re.compile(r"([(\[{\"“]*)([A-Za-z]*[a-z])([)\]}\",!?”]*)(\.?)([)\]}\",!?”]*)")
_PUNCTUATION = regex.compile(r"\p{P}+")
_SENTENCE_END = regex.compile(r"[\p{Sentence_Terminal}]")


_PEOPLE, _QUESTIONS = "you we they i he she it", "who what when where why how there that this"
_MODAL = "ca could do does did had may might must need ought sha should wo would"
_ABBREVIATED = """
Mr. Mrs. Ms. Dr. Prof. St. Jr. Gen. Gov. Rep. Rev. Sen. Inc. Ltd. Co. co. Corp. Bros. Mt. vs. v.s. Ph.D.
e.g. E.g. i.e. I.e. a.m. p.m. D.C. Jan. Feb. Mar. Apr. Jun. Jul. Aug. Sep. Sept. Oct. Nov. Dec.
Calif. Mass. Mich. Minn. Miss. Ill. Ind. Pa. Va. Wash. Wis. La. Id. Mo. N.Y. N.J. N.C. S.C. Ga. Fla. Md.
and/or w/o ma'am o'clock O'clock 'em 'll 'd 're 'cause C++ '' 's 'S \\n \\t '
"""


def _contractions() -> dict[str, tuple[str, ...]]:
    """Returns English words that are written as one chunk, by their spelling, and their parts.

    Words that keep their full stop or apostrophe are among them.
    """
    parts: dict[str, tuple[str, ...]] = {}

    def add(*words: str) -> None:
        """Adds the parts as written, with a capital, with the other apostrophe, and all of these without apostrophe."""
        for first in (words[0], words[0].title()):
            for apostrophe in ("'", "’", ""):
                written = tuple(word.replace("'", apostrophe) for word in (first, *words[1:]))
                parts["".join(written)] = written

    people, questions, plural = _PEOPLE.split(), _QUESTIONS.split(), ["these", "those"]
    for word in people + questions + plural:
        for ending in (("'ll",), ("'d",), ("'ll", "'ve"), ("'d", "'ve")):
            add(word, *ending)
    for word in people[:4] + questions[:6] + plural + ["there"]:
        add(word, "'ve")
    for word in people[:3] + questions[:6] + plural + ["there"]:
        add(word, "'re")
    for word in people[4:] + questions:
        add(word, "'s")
    add("i", "'m")
    add("i", "'m", "a")
    for word in ["could", "might", "must", "should", "would"]:
        add(word, "'ve")
    modal = _MODAL.split()
    for word in [*modal, "ai", "are", "is", "was", "were", "have", "has", "dare"]:
        add(word, "n't")
    for word in modal:
        add(word, "n't", "'ve")
    # Contractions without their apostrophe that are words of their own.
    for word in ["Ill", "Its", "Hell", "Shell", "Shed", "Were", "Well"]:
        for written in (word, word.lower()):
            parts.pop(written, None)
    for joined in ("can not", "gon na", "got ta"):
        add(*joined.split())
    parts |= {"let's": ("let", "'s"), "Let's": ("Let", "'s"), "y'all": ("y'", "all"), "c'mon": ("c'm", "on")}
    for hour, half in product(range(1, 13), ("am", "pm", "a.m.", "p.m.")):
        parts[f"{hour}{half}"] = (str(hour), half)
    singles = chain(_ABBREVIATED.split(), (f"{letter}." for letter in "abcdefghijklmnopqrstuvwxyzäöü"))
    return parts | {word: (word,) for word in singles}


_SPECIAL = _contractions()
MAX_SPECIAL = max(map(len, _SPECIAL))
# Entries with a sign, which cutting at the ends may have split.
_SIGNED = {word: parts for word, parts in _SPECIAL.items() if not word.isalnum()}


def _whole(chunk: str) -> tuple[str, ...] | None:
    """Returns the words of a chunk that is a contraction or abbreviation, or is an emoticon and so one word."""
    if len(chunk) > MAX_SPECIAL:
        return None
    return _SPECIAL.get(chunk) or ((chunk,) if _EMOTICON.fullmatch(chunk) else None)


def _cut(chunk: str) -> tuple[str, ...]:
    """Returns the words of a chunk, which has no whitespace."""
    if chunk in _SPECIAL:
        return _SPECIAL[chunk]
    if chunk.isalpha():
        return (chunk,)
    # Most chunks end here: a word in quotes, brackets or ordinary punctuation.
    if plain := _PLAIN.fullmatch(chunk):
        before, word, after, stop, end = plain.groups()
        if not stop or (word not in _SPECIAL and f"{word}." not in _SPECIAL):
            return (*before, *_CHUNKS[word], *after, *stop, *end)
    if len(chunk) > MAX_CHUNK:
        return tuple(_DATA.findall(chunk))
    first: list[str] = []
    last: list[str] = []
    rest = chunk
    letters = not _NUMBER_OR_POSSESSIVE.search(chunk)
    # One sign is cut from each end at a time, as in spaCy: what is left may be an abbreviation that keeps its sign.
    while rest and not _whole(rest):
        start = _prefix_length(rest)
        if start and _whole(rest[start:]):
            first.append(rest[:start])
            rest = rest[start:]
            break
        cut = _suffix_length(rest[start:], letters)
        end = len(rest) - cut
        if cut and _whole(rest[:end]):
            last.append(rest[end:])
            rest = rest[:end]
            break
        if not start and not cut:
            break
        if start:
            first.append(rest[:start])
        if cut:
            last.append(rest[end:])
        rest = rest[start:end]
    if rest:
        first.extend(_inside(rest))
    words = first + last[::-1]
    return tuple(_rejoin(words) if len(words) > 1 and _REJOINED.search(chunk) else words)


def _prefix_length(rest: str) -> int:
    if rest[0] in _ASCII_EDGE:
        return 1
    if rest[0].isalnum() and "$" not in rest:
        return 0
    prefix = _PREFIX.match(rest)
    return prefix.end() if prefix else 0


def _suffix_length(rest: str, letters: bool) -> int:
    """Returns the length of the suffix to cut off.

    Args:
        rest: The chunk without its prefix.
        letters: True if it has neither a digit, which can come before a unit, nor an apostrophe.
    """
    last = rest[-1:]
    if last in _ASCII_EDGE and last:
        return 1
    if last.isdecimal() or (letters and last.isalpha()):
        return 0
    suffix = _SUFFIX.search(rest)
    return len(rest) - suffix.start() if suffix else 0


def _inside(rest: str) -> Iterable[str]:
    """Returns the words of a chunk whose ends are cut."""
    if whole := _whole(rest):
        return whole
    # An address is one word, whatever signs it has inside.
    if rest.isalnum() or ("." in rest and _ADDRESS.fullmatch(rest)):
        return (rest,)
    if not _INSIDE.search(rest):
        return (rest,)
    words, start = [], 0
    for match in _INFIX.finditer(rest):
        # A sign at the start belongs to the word after it, such as -5.
        if match.start() == 0:
            continue
        if match.start() > start:
            words.append(rest[start : match.start()])
        words.append(match.group())
        start = match.end()
    return [*words, rest[start:]] if start < len(rest) else words


def _rejoin(words: list[str]) -> Iterator[str]:
    """Yields the words, but abbreviations and emoticons whose signs were cut off are whole again."""
    position = 0
    while position < len(words):
        # The longest run of words first: `:-)` goes before `:`.
        for end in range(min(position + 5, len(words)), position + 1, -1):
            joined = "".join(words[position:end])
            if parts := _SIGNED.get(joined) or (_EMOTICON.fullmatch(joined) and (joined,)):
                yield from parts
                position = end
                break
        else:
            yield words[position]
            position += 1


class _Table(dict[str, Value]):
    """The values of the chunks or words seen, each computed once; a full table is emptied."""

    def __init__(self, compute: Callable[[str], Value]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, word: str) -> Value:
        value = self._compute(word)
        # Long chunks are data, which rarely occurs again.
        if len(word) <= MAX_CACHED_LENGTH:
            if len(self) >= MAX_CACHED:
                self.clear()
            self[word] = value
        return value


def _hash(word: str) -> int:
    """Returns a 64-bit polynomial hash; the hash of joined words follows from theirs (`ngrams`)."""
    value, power = 0, 1
    for character in word:
        value += (ord(character) + 1) * power
        power = power * HASH_BASE & _UINT64
    return value & _UINT64


def _kind(word: str) -> int:
    """Returns NOT_PUNCTUATION, LETTER or both, by the characters of a word."""
    kind = 0 if PUNCTUATION_SET.issuperset(word) else NOT_PUNCTUATION
    return kind | LETTER if any(map(str.isalpha, word)) else kind


_CHUNKS = _Table(_cut)
_HASHES = _Table(_hash)
_KINDS = _Table(_kind)


def split_words(text: str) -> list[str]:
    """Returns the words of a text, punctuation included."""
    return list(chain.from_iterable(map(_CHUNKS.__getitem__, text.split())))


class Words:
    """The words of a document, and what more than one filter needs of them."""

    def __init__(self, text: str) -> None:
        self.words = split_words(text)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each word."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def kinds(self) -> NDArray[np.uint8]:
        """The kind of each word, a sum of marks.

        NOT_PUNCTUATION marks a word with a character that is no punctuation, LETTER one with a letter.
        """
        return np.frombuffer(bytes(map(_KINDS.__getitem__, self.words)), np.uint8)

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """Σ (c_j + 1) · HASH_BASE^j modulo 2^64 over the characters c_j of each word."""
        return np.fromiter(map(_HASHES.__getitem__, self.words), np.uint64, len(self.words))


@lru_cache(maxsize=2)
def words_of(text: str) -> Words:
    """Returns the words of a document, shared by the filters that it goes through one after the other."""
    return Words(text)


def _sentence_starts(words: list[str]) -> list[int]:
    """Returns the numbers of the words that begin sentences.

    A sentence begins at the first word after a full stop, question mark or the like; further punctuation belongs to
    the sentence before.
    """
    starts, ended = [0] if words else [], False
    for number, word in enumerate(words):
        if _SENTENCE_END.fullmatch(word):
            ended = True
        # Closing quotes and brackets belong to the sentence before.
        elif ended and not _PUNCTUATION.fullmatch(word):
            starts.append(number)
            ended = False
    return starts


class EnglishWords(WordTokenizer):  # type: ignore[misc]
    """`split_words` for blocks of datatrove, in the place of spaCy: it needs no model."""

    def word_tokenize(self, text: str) -> list[str]:
        return words_of(text).words

    def sent_tokenize(self, text: str) -> list[str]:
        return strip_strings([text[start:end] for start, end in self.span_tokenize(text)])  # type: ignore[no-any-return]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        words, position, offsets = split_words(text), 0, []
        for word in words:
            # Words are pieces of the text in its order, so each is found after the one before.
            position = text.index(word, position)
            offsets.append(position)
            position += len(word)
        starts = [offsets[number] for number in _sentence_starts(words)]
        return list(zip(starts, [*starts[1:], len(text)][: len(starts)], strict=True))


WORDS = EnglishWords("en")


def searched_words(text: str) -> list[str]:
    """Returns lower-cased words, numbers and signs, as decontamination compares them."""
    return _SEARCHED.findall(text.lower())
