"""The curation steps that a data recipe can name, with their parameters.

Parameters carry the names of the datatrove block that runs them, so that datatrove's documentation holds; a rule's
defaults are the published ones (Gopher, C4, FineWeb), and a recipe lists its changes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from pipeline.core.bounds import Flag, Range, Share, Words
from pipeline.core.stage import Config, operational

Kind = Literal["prose", "code", "problems", "chat"]
"""The kind of a source's documents."""


MOST_STEPS = 100
"""Steps of one source."""
Amount = Annotated[int, Range(0, 1e9)]
"""A number of words, lines or other units in a document."""
Positive = Annotated[int, Range(1, 1e9)]
Length = Annotated[float, Range(0, 1e6)]
_FASTTEXT = """
af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da de diq
dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is it
ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv
mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl
so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo yue zh
"""
FASTTEXT = frozenset(_FASTTEXT.split())
"""The languages that lid.176 identifies (fasttext.cc/docs/en/language-identification.html)."""


def _language_error(language: str) -> str | None:
    return None if language in FASTTEXT else "is no language that lid.176 knows; use its codes, such as en, de or zh"


Identified = Annotated[str, Words(3, test=_language_error)]
NGrams = Annotated[tuple[tuple[Annotated[int, Range(1, 100)], Share], ...], Field(max_length=100)]


class Step(Config):
    """One named step of a source. Every parameter but `step` goes to the block as it is."""

    step: str = Field(description="name of the step")

    def parameters(self) -> dict[str, Any]:
        return self.model_dump(exclude={"step"})


def _require_order(step: Step, *names: str) -> None:
    """Raises ValueError if a least value is above the greatest: nothing would be kept."""
    for name in names:
        minimum, maximum = getattr(step, f"min_{name}"), getattr(step, f"max_{name}")
        if minimum > maximum:
            raise ValueError(f"min_{name} = {minimum} is above max_{name} = {maximum}; nothing would be kept")


class Language(Step):
    """Keep documents whose fastText language score for one of `languages` exceeds the threshold."""

    step: Literal["language"] = Field(description="selects this step")
    languages: tuple[Identified, ...] = Field(
        ("en",), min_length=1, max_length=len(FASTTEXT), description="codes of the languages to keep"
    )
    language_threshold: Share = Field(0.65, description="score that a document must exceed")


class GopherRepetition(Step):
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


class GopherQuality(Step):
    """Remove documents by length, word length, symbols, bullets and stop words (Rae et al. 2021).

    A limit of 0 turns its rule off.
    """

    step: Literal["gopher_quality"] = Field(description="selects this step")
    min_doc_words: Amount = Field(50, description="minimum number of words")
    max_doc_words: Amount = Field(100_000, description="maximum number of words")
    min_avg_word_length: Length = Field(3, description="minimum average word length in characters")
    max_avg_word_length: Length = Field(10, description="maximum average word length in characters")
    max_symbol_word_ratio: Length = Field(
        0.1, description="maximum ratio of hash signs to words, and of ellipses to words"
    )
    max_bullet_lines_ratio: Share = Field(0.9, description="maximum share of lines that start with a bullet or hyphen")
    max_ellipsis_lines_ratio: Share = Field(0.3, description="maximum share of lines that end with an ellipsis")
    max_non_alpha_words_ratio: Share = Field(
        0.8, description="minimum share of words with a letter, despite the name (datatrove's)"
    )
    min_stop_words: Amount = Field(2, description="minimum number of different English stop words, of eight")

    @model_validator(mode="after")
    def _check_ranges(self) -> GopherQuality:
        _require_order(self, "doc_words", "avg_word_length")
        return self


class C4(Step):
    """Rules of C4 that remove whole documents (Raffel et al. 2020). Its rules that remove lines are not applied."""

    step: Literal["c4"] = Field(description="selects this step")
    min_num_sentences: Amount = Field(5, description="minimum number of sentences")
    filter_lorem_ipsum: Flag = Field(True, description="remove documents that contain the phrase lorem ipsum")
    filter_curly_bracket: Flag = Field(True, description="remove documents that contain an opening curly bracket")


class FineWeb(Step):
    """Remove documents by line punctuation, short lines, duplicate lines and newlines (Penedo et al. 2024)."""

    step: Literal["fineweb"] = Field(description="selects this step")
    line_punct_thr: Share = Field(0.12, description="minimum share of lines that end with terminal punctuation")
    short_line_thr: Share = Field(0.67, description="maximum share of short lines")
    short_line_length: Amount = Field(30, description="characters up to which a line is short")
    char_duplicates_ratio: Share = Field(0.01, description="maximum share of characters in duplicate lines")
    new_line_ratio: Share = Field(0.3, description="maximum ratio of newlines to words")


class CodeShape(Step):
    """Remove code files by number and length of lines and by characters, such as generated tables and data blobs."""

    step: Literal["code_shape"] = Field(description="selects this step")
    min_lines: Amount = Field(3, description="minimum number of lines")
    max_lines: Amount = Field(400, description="maximum number of lines")
    max_line_length: Amount = Field(120, description="maximum length of any line in characters")
    max_average_line_length: Length = Field(80, description="maximum average line length in characters")
    min_alphanumeric_fraction: Share = Field(
        0.5, description="minimum share of letters and digits, whitespace not counted"
    )
    max_digit_fraction: Share = Field(0.2, description="maximum share of digits, whitespace not counted")

    @model_validator(mode="after")
    def _check_ranges(self) -> CodeShape:
        _require_order(self, "lines")
        return self


class PythonSyntax(Step):
    """Keep documents that the parser of Python accepts."""

    step: Literal["python_syntax"] = Field(description="selects this step")


class Pii(Step):
    """Replace email and public IPv4 addresses with ones reserved for documentation (RFC 2606, RFC 5737)."""

    step: Literal["pii"] = Field(description="selects this step")
    remove_emails: Flag = Field(True, description="replace email addresses")
    remove_ips: Flag = Field(True, description="replace public IPv4 addresses")


AnyStep = Annotated[
    Language | GopherRepetition | GopherQuality | C4 | FineWeb | CodeShape | PythonSyntax | Pii,
    Field(discriminator="step"),
]


Hashes = Annotated[int, Range(1, 1000, "FineWeb: 14 buckets of 8 hashes over 5 words")]


class MinHash(Config):
    """Near-duplicate removal by MinHash LSH over word n-grams.

    Pairs are likely found if their similarity is above (1 / num_buckets) ^ (1 / hashes_per_bucket).
    """

    kinds: tuple[Kind, ...] = Field(
        default=("prose", "code"), max_length=len(get_args(Kind)), description="kinds of sources that are deduplicated"
    )
    n_grams: Hashes = Field(default=5, description="words of an n-gram")
    num_buckets: Hashes = Field(default=14, description="number of LSH buckets")
    hashes_per_bucket: Hashes = Field(default=8, description="hashes in each bucket")

    @property
    def threshold(self) -> float:
        """The similarity at which the LSH curve is steepest."""
        return float((1 / self.num_buckets) ** (1 / self.hashes_per_bucket))


class Decontamination(Config):
    """Removal of documents that contain `ngram` consecutive words of an evaluation item, or all of a shorter one."""

    ngram: Annotated[int, Range(1, 1000, "GPT-3: 13")] = Field(
        default=13, description="consecutive words of an item that make a match"
    )


Shards = Annotated[int, Range(1, 100_000)]


class CurationSettings(Config):
    """Curation of all sources together, after the steps of each."""

    decontamination: Decontamination = Field(
        default=Decontamination(), description="removal of documents that contain evaluation items"
    )
    minhash: MinHash | None = Field(default=MinHash(), description="near-duplicate removal; null: none")
    shards: Shards = operational(1, "parts of each source; above 1, curation and tokenization run as job arrays")
