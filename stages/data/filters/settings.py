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
NGrams = Annotated[
    tuple[tuple[Annotated[int, Range(1, 100)], Share], ...], Field(max_length=100, description="words, greatest share")
]


class Step(Config):
    """One named step of a source. Every parameter but `step` goes to the block as it is."""

    step: str

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

    step: Literal["language"]
    languages: tuple[Identified, ...] = Field(("en",), min_length=1, max_length=len(FASTTEXT))
    language_threshold: Share = 0.65


class GopherRepetition(Step):
    """Repeated lines, paragraphs and n-grams (Rae et al. 2021, table A1)."""

    step: Literal["gopher_repetition"]
    dup_line_frac: Share = 0.3
    dup_para_frac: Share = 0.3
    dup_line_char_frac: Share = 0.2
    dup_para_char_frac: Share = 0.2
    min_top_count: Positive = Field(3, description="an n-gram that occurs less often is no repetition (datatrove: 1)")
    top_n_grams: NGrams = ((2, 0.2), (3, 0.18), (4, 0.16))
    dup_n_grams: NGrams = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


class GopherQuality(Step):
    """Length, word shape, symbols, bullets and stop words (Rae et al. 2021)."""

    step: Literal["gopher_quality"]
    min_doc_words: Amount = 50
    max_doc_words: Amount = 100_000
    min_avg_word_length: Length = 3
    max_avg_word_length: Length = 10
    max_symbol_word_ratio: Length = 0.1
    max_bullet_lines_ratio: Share = 0.9
    max_ellipsis_lines_ratio: Share = 0.3
    max_non_alpha_words_ratio: Share = Field(0.8, description="least share of words with a letter (datatrove's name)")
    min_stop_words: Amount = 2

    @model_validator(mode="after")
    def _check_ranges(self) -> GopherQuality:
        _require_order(self, "doc_words", "avg_word_length")
        return self


class C4(Step):
    """C4's rules that remove whole documents (Raffel et al. 2020); its rules that cut lines are not applied."""

    step: Literal["c4"]
    min_num_sentences: Amount = 5
    filter_lorem_ipsum: Flag = True
    filter_curly_bracket: Flag = True


class FineWeb(Step):
    """Line punctuation, short lines, duplicated lines and list-likeness (Penedo et al. 2024)."""

    step: Literal["fineweb"]
    line_punct_thr: Share = 0.12
    short_line_thr: Share = 0.67
    short_line_length: Amount = 30
    char_duplicates_ratio: Share = 0.01
    new_line_ratio: Share = 0.3


class CodeShape(Step):
    """Length, line length and share of letters and digits: generated tables and data blobs look unlike code."""

    step: Literal["code_shape"]
    min_lines: Amount = 3
    max_lines: Amount = 400
    max_line_length: Amount = 120
    max_average_line_length: Length = 80
    min_alphanumeric_fraction: Share = 0.5
    max_digit_fraction: Share = 0.2

    @model_validator(mode="after")
    def _check_ranges(self) -> CodeShape:
        _require_order(self, "lines")
        return self


class PythonSyntax(Step):
    """Keep documents that Python's own parser accepts."""

    step: Literal["python_syntax"]


class Pii(Step):
    """Replace e-mail and public IP addresses by addresses reserved for documentation (RFC 2606, RFC 5737)."""

    step: Literal["pii"]
    remove_emails: Flag = True
    remove_ips: Flag = True


AnyStep = Annotated[
    Language | GopherRepetition | GopherQuality | C4 | FineWeb | CodeShape | PythonSyntax | Pii,
    Field(discriminator="step"),
]


Hashes = Annotated[int, Range(1, 1000, "FineWeb: 14 buckets of 8 hashes over 5 words")]


class MinHash(Config):
    """Near-duplicate removal by MinHash LSH over word n-grams; pairs above (1/buckets)^(1/hashes) are likely found."""

    kinds: tuple[Kind, ...] = Field(default=("prose", "code"), max_length=len(get_args(Kind)))
    n_grams: Hashes = 5
    num_buckets: Hashes = 14
    hashes_per_bucket: Hashes = 8

    @property
    def threshold(self) -> float:
        """The similarity at which the LSH curve is steepest."""
        return float((1 / self.num_buckets) ** (1 / self.hashes_per_bucket))


class Decontamination(Config):
    """An evaluation item shorter than `ngram` words matches as a whole, a longer one by any run of `ngram` words."""

    ngram: Annotated[int, Range(1, 1000, "GPT-3: 13")] = 13


Shards = Annotated[int, Range(1, 100_000)]


class CurationSettings(Config):
    """The curation of all sources together, after the steps of each."""

    decontamination: Decontamination = Decontamination()
    minhash: MinHash | None = MinHash()
    shards: Shards = operational(
        1, "pieces that each source is cut into; with more than one, curation and tokenizing have arrays on a cluster"
    )
