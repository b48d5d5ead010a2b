"""The figures that `atom pin` takes from a sample: the entry `probe` of a lock file, which `atom plan` reads.

Figures of the sample are counts. Figures of the whole source are estimates, with an interval at a confidence of 95 %
where the sample has several pieces.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Range, Sha256, SourceName, Words
from pipeline.core.stage import Config

# Bytes of text in a token.
LEAST_BYTES, MOST_BYTES = 0.5, 100.0
# Documents or bytes of a source.
MOST = 1e17
Count = Annotated[int, Range(0, MOST)]
Portion = Annotated[float, Range(0, 1)]
BytesPerToken = Annotated[float, Range(LEAST_BYTES, MOST_BYTES, "English prose by 50,000 entries or more: 4 to 5")]
Name = Annotated[str, Words(200, empty=True)]
# Rows of a list in a probe, the most frequent ones. Of rules there are as many as a source has, since alarms are taken
# from them.
LISTED, MOST_RULES = 20, 200
# Ways in which tokens were counted; the digest of tokenizer.json follows the second one.
BY_SETTING, BY_TOKENIZER = "bytes_per_token", "tokenizer "
# The rule of copies within a sample, which are not those of the source.
DUPLICATE = "exact_duplicate"
# Tokens above which a document is long.
LONG = (4096, 32_768, 131_072)


class LicenseString(Config):
    """A string by which documents of the sample state their license."""

    string: Name
    """as the row has it, cut to 200 characters; empty: it states none"""
    license: Name
    """SPDX expression by the reader's map; empty: the map does not know the string, and the documents are removed"""
    share: Portion
    """share of the sampled rows"""


class RuleShare(Config):
    """The sampled documents that a rule removed."""

    documents: Count
    """number of documents"""
    low: Portion
    """share of the documents of the source, lower end"""
    high: Portion
    """upper end"""


class Probe(Config):
    """A sample of a source, read by its reader and curated by its steps."""

    settings: Sha256
    """digest of the settings of reader and steps and of the versions of their stages; with others it counts as none"""
    sampled: Literal["heads", "row groups", "files"]
    """heads: the beginnings of files, which are compressed as a whole; row groups: first rows of random row groups;
    files: documents of random files on this machine"""
    pieces: Count
    """heads, row groups or files that were read"""
    bytes_per_token: BytesPerToken
    """bytes of text in a token"""
    tokens_by: Annotated[
        str,
        Words(90, "bytes_per_token, or tokenizer and its digest", rf"{BY_SETTING}|{BY_TOKENIZER}sha256:[0-9a-f]{{64}}"),
    ]
    """what that number is from: `bytes_per_token` of the source in the data recipe, if no tokenizer was sealed; or
    `tokenizer sha256:…`, the recipe's, by its tokenizer.json and on the kept texts of the sample"""
    problem: Annotated[str, Words(1000, empty=True)] = ""
    """why the sample is no more, or the source cannot be used as it is; empty: nothing is wrong"""
    sampled_documents: Count = 0
    """documents of the sample"""
    sampled_bytes: Count = 0
    """bytes of their text"""
    kept_documents: Count = 0
    """documents of the sample that curation leaves"""
    documents: Count = 0
    """documents of the source, estimated"""
    bytes: Count = 0
    """bytes of their text, estimated"""
    kept_bytes: Count = 0
    """bytes of text that curation leaves, estimated; near duplicates and evaluation items are not searched for"""
    kept_low: Count | None = None
    """lower end of its interval; null: unknown, as all of the sample is from one place"""
    kept_high: Count | None = None
    """upper end"""
    kept_tokens: Count = 0
    """kept_bytes divided by bytes_per_token"""
    secrets: Count = 0
    """sampled documents that were removed for a secret"""
    duplicates: Count = 0
    """sampled documents that are copies of earlier ones of the sample; more of the source are"""
    fields: dict[Name, Name] = Field(default={}, max_length=200)
    """type of each field of the rows; several where files differ"""
    licenses: tuple[LicenseString, ...] = ()
    """most frequent license strings of the sample"""
    languages: dict[Name, Portion] = Field(default={}, max_length=LISTED)
    """share of the sampled bytes by most probable language of lid.176; none of code"""
    removed: dict[Name, RuleShare] = Field(default={}, max_length=MOST_RULES)
    """removed documents by rule; `atom pin` and `atom plan` compare their shares with today's `curation.alarm_share`"""
    long_documents: dict[Name, Portion] = Field(default={}, max_length=LISTED)
    """share of the kept bytes in documents of more tokens than the key"""
    shared: dict[SourceName, Count] = Field(default={}, max_length=MOST_SOURCES)
    """kept documents of the sample that the sample of an earlier source has as well; more of the sources are"""
