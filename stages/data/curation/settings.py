"""Settings of the curation of all sources together."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Field, model_validator

from pipeline.core.bounds import Range
from pipeline.core.stage import Config
from stages.data.kinds import Kind

Hashes = Annotated[int, Range(1, 1000, "FineWeb: 14 buckets of 8 hashes over 5 words")]

REPRESENTATIVE_BLOCKS = 100
"""Files that one process keeps open, however many parts there are."""


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


class CurationSettings(Config):
    """Curation of all sources together, after the steps of each."""

    decontamination: Decontamination = Field(
        default=Decontamination(), description="removal of documents that contain evaluation items"
    )
    minhash: MinHash | None = Field(default=MinHash(), description="near-duplicate removal; null: none")

    @model_validator(mode="before")
    @classmethod
    def _refuse_shards(cls, values: Any) -> Any:
        if isinstance(values, dict) and "shards" in values:
            raise ValueError("shards is no setting any more; give each source of many files its own number of `parts`")
        return values
