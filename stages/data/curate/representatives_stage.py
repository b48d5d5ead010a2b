"""Representatives: copy what is needed of the documents that others duplicate, for the parts of all sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.parts import Part, link_parts, seal_part
from pipeline.core.stage import Estimate, Inputs, Report, Stage, operational
from stages.data import estimates
from stages.data.curate.settings import REPRESENTATIVE_BLOCKS, DeduplicationConfig
from stages.data.estimates import Size

VERSION = 1


class RepresentativesConfig(DeduplicationConfig):
    expected: Size | None = operational(None)
    """expected size of all sources; null: unknown"""

    @property
    def blocks(self) -> int:
        """The number of blocks of parts."""
        return min(REPRESENTATIVE_BLOCKS, sum(source.parts for source in self.sources))


def run(config: RepresentativesConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals the ids of the documents that others duplicate and, of near duplicates, their shingles, by blocks of parts.

    `inputs["filter"]` holds the kept documents of each part, and `inputs["duplicates"]` those to remove. Resumes after
    the last sealed block.
    """
    count, sealed = config.blocks, list[Part]()
    for number in range(count):
        sealed.append(_seal_block(config, inputs, work, number))
        report.progress(len(sealed), count, "blocks")
    link_parts(sealed, out)
    report.note(f"{sum(part.facts['documents'] for part in sealed)} documents have duplicates")


def run_shard(config: RepresentativesConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Seals one block in `work`."""
    _seal_block(config, inputs, work, shard)


def _seal_block(config: RepresentativesConfig, inputs: Inputs, work: Path, number: int) -> Part:
    from stages.data.curate import duplicate_groups
    from stages.data.curate.part_removal import block_folder, blocks_of, write_representatives

    def make(folder: Path) -> dict[str, Any]:
        block, kept = blocks_of(config.parts())[number], inputs["filter"] / "kept"
        exact, near = (
            duplicate_groups.Removed(duplicate_groups.removed_folder(inputs["duplicates"].path, kind))
            for kind in ("exact", "near")
        )
        n_grams = config.minhash.n_grams if config.minhash else 1
        return {"documents": write_representatives(block_folder(folder, number), kept, block, exact, near, n_grams)}

    return seal_part(work, f"block-{number:05d}", make)


def shards(config: RepresentativesConfig) -> int:
    """Returns the blocks; 1 for a corpus so small that no source has several parts."""
    return config.blocks if any(source.parts > 1 for source in config.sources) else 1


def estimate(config: RepresentativesConfig) -> Estimate:
    return estimates.estimate("representatives", config.expected, small=2.0)


STAGE = Stage(
    "representatives", VERSION, RepresentativesConfig, run, estimate=estimate, shards=shards, run_shard=run_shard
)
