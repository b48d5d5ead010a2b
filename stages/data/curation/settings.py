"""The curation steps that a data recipe can name, with their parameters.

Parameters carry the names of the datatrove block that runs them, so that datatrove's documentation holds; a rule's
defaults are the published ones (Gopher, C4, FineWeb), and what a recipe changes stands in the recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.stage import Config, operational

Kind = Literal["prose", "code", "problems", "chat"]
"""What a source's documents are."""


class Step(Config):
    """One named step of a source. Every parameter but `step` goes to the block as it is."""

    step: str

    def parameters(self) -> dict[str, Any]:
        return self.model_dump(exclude={"step"})


class Language(Step):
    """Keep documents whose fastText language score for one of `languages` exceeds the threshold."""

    step: Literal["language"]
    languages: tuple[str, ...] = ("en",)
    language_threshold: float = 0.65


class GopherRepetition(Step):
    """Repeated lines, paragraphs and n-grams (Rae et al. 2021, table A1)."""

    step: Literal["gopher_repetition"]
    dup_line_frac: float = 0.3
    dup_para_frac: float = 0.3
    dup_line_char_frac: float = 0.2
    dup_para_char_frac: float = 0.2
    min_top_count: int = Field(3, ge=1, description="an n-gram that occurs less often is no repetition (datatrove: 1)")
    top_n_grams: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
    dup_n_grams: tuple[tuple[int, float], ...] = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


class GopherQuality(Step):
    """Length, word shape, symbols, bullets and stop words (Rae et al. 2021)."""

    step: Literal["gopher_quality"]
    min_doc_words: int = 50
    max_doc_words: int = 100_000
    min_avg_word_length: float = 3
    max_avg_word_length: float = 10
    max_symbol_word_ratio: float = 0.1
    max_bullet_lines_ratio: float = 0.9
    max_ellipsis_lines_ratio: float = 0.3
    max_non_alpha_words_ratio: float = Field(0.8, description="least share of words with a letter (datatrove's name)")
    min_stop_words: int = 2


class C4(Step):
    """C4's rules that remove whole documents (Raffel et al. 2020); its rules that cut lines are not applied."""

    step: Literal["c4"]
    min_num_sentences: int = 5
    filter_lorem_ipsum: bool = True
    filter_curly_bracket: bool = True


class FineWeb(Step):
    """Line punctuation, short lines, duplicated lines and list-likeness (Penedo et al. 2024)."""

    step: Literal["fineweb"]
    line_punct_thr: float = 0.12
    short_line_thr: float = 0.67
    short_line_length: int = 30
    char_duplicates_ratio: float = 0.01
    new_line_ratio: float = 0.3


class CodeShape(Step):
    """Length, line length and share of letters and digits: generated tables and data blobs look unlike code."""

    step: Literal["code_shape"]
    min_lines: int = 3
    max_lines: int = 400
    max_line_length: int = 120
    max_average_line_length: float = 80
    min_alphanumeric_fraction: float = 0.5
    max_digit_fraction: float = 0.2


class PythonSyntax(Step):
    """Keep documents that Python's own parser accepts."""

    step: Literal["python_syntax"]


class Pii(Step):
    """Replace e-mail and public IP addresses by addresses reserved for documentation (RFC 2606, RFC 5737)."""

    step: Literal["pii"]
    remove_emails: bool = True
    remove_ips: bool = True


AnyStep = Annotated[
    Language | GopherRepetition | GopherQuality | C4 | FineWeb | CodeShape | PythonSyntax | Pii,
    Field(discriminator="step"),
]


class MinHash(Config):
    """Near-duplicate removal by MinHash LSH over word n-grams; pairs above (1/buckets)^(1/hashes) are likely found."""

    kinds: tuple[Kind, ...] = ("prose", "code")
    n_grams: int = Field(default=5, ge=1)
    num_buckets: int = Field(default=14, ge=1)
    hashes_per_bucket: int = Field(default=8, ge=1)

    @property
    def threshold(self) -> float:
        """The similarity at which the LSH curve is steepest."""
        return float((1 / self.num_buckets) ** (1 / self.hashes_per_bucket))


class Decontamination(Config):
    """An evaluation item shorter than `ngram` words matches as a whole, a longer one by any run of `ngram` words."""

    ngram: int = Field(default=13, ge=1)


class CurationSettings(Config):
    """What happens to all sources together, after the steps of each."""

    decontamination: Decontamination = Decontamination()
    minhash: MinHash | None = MinHash()
    shards: int = operational(
        1,
        "pieces that each source is cut into; with more than one, curation and tokenizing have arrays on a cluster",
        ge=1,
    )
