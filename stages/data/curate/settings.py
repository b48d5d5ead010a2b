"""Settings of the curation of all sources together."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field, model_validator

from pipeline.core.bounds import LongLine, Range, Sha256
from pipeline.core.stage import Config, added, operational
from stages.formats.table import Kind

Hashes = Annotated[int, Range(1, 1000, "FineWeb: 14 buckets of 8 hashes over 5 words")]

# Files that one process keeps open, however many parts there are.
REPRESENTATIVE_BLOCKS = 100


class MinHash(Config):
    """Near-duplicate removal by MinHash LSH over word n-grams.

    Pairs are likely found if their similarity is above (1 / num_buckets) ^ (1 / hashes_per_bucket).
    """

    kinds: tuple[Kind, ...] = Field(default=("prose", "code"), max_length=len(get_args(Kind)))
    """kinds of sources that are deduplicated"""
    n_grams: Hashes = Field(default=5)
    """words of an n-gram"""
    num_buckets: Hashes = Field(default=14)
    """number of LSH buckets"""
    hashes_per_bucket: Hashes = Field(default=8)
    """hashes in each bucket"""

    @property
    def threshold(self) -> float:
        """The similarity at which the LSH curve is steepest."""
        return float((1 / self.num_buckets) ** (1 / self.hashes_per_bucket))


# Consecutive words that make a match.
Ngram = Annotated[int, Range(1, 1000, "GPT-3: 13")]


class Decontamination(Config):
    """Removal of documents that contain `ngram` consecutive words of an evaluation item, or all of a shorter one."""

    ngram: Ngram = Field(default=13)
    """consecutive words of an item that make a match"""


class CurationSettings(Config):
    """Curation of all sources together, after the steps of each."""

    decontamination: Decontamination = Field(default=Decontamination())
    """removal of documents that contain evaluation items"""
    minhash: MinHash | None = Field(default=MinHash())
    """near-duplicate removal; null: none"""
    deny_list: LongLine | None = operational(None)
    """file of documents to remove on request (docs/opt-out.md); its digest, not the path, is part of the key"""
    deny_list_sha256: Sha256 | None = added(None)
    """expected digest of the deny-list; null: computed from the file present"""
    alarm_share: Annotated[float, Range(0, 1)] = operational(0.5)
    """a rule that removes a larger share of a source stops the run, unless acknowledged_removals of it allow that"""

    @model_validator(mode="after")
    def _check_lists(self) -> CurationSettings:
        if self.deny_list_sha256 is not None and self.deny_list is None:
            raise ValueError("deny_list_sha256 is the digest of a deny-list; name the file in deny_list")
        return self
