"""Dedup: remove the duplicates that stage `duplicates` found, and assign the held-out split, part by part."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES
from pipeline.core.errors import AtomError
from pipeline.core.parts import Part, link_parts, seal_part, shards_of
from pipeline.core.stage import Estimate, Inputs, Report, Stage, added, operational
from stages.data import estimates
from stages.data.curate.alarms import Acknowledged, AlarmShare, dedup_losses, require_acknowledged
from stages.data.curate.settings import DeduplicationConfig, SourceParts, WorkPattern, no_counts
from stages.data.estimates import Size
from stages.formats.table import HeldoutFraction, write_json

VERSION = 4
# Held-out works that the note names.
SHOWN_WORKS = 20


class DedupSource(SourceParts):
    """The settings of one source that deduplication uses."""

    heldout_fraction: HeldoutFraction
    """share of documents held out from training"""
    work: WorkPattern = added("")
    """searched in id and origin of a document; its first group names the work, which is held out as a whole; empty:
    each document by itself"""
    acknowledged_removals: Acknowledged = operational({})
    """by rule, the share of the source that it may remove"""
    expected: Size | None = operational(None)
    """expected size of the source; null: unknown"""


class DedupConfig(DeduplicationConfig):
    sources: tuple[DedupSource, ...] = Field(min_length=1, max_length=MOST_SOURCES)
    """sources of the corpus"""
    alarm_share: AlarmShare = operational(0.5)
    """share of a source above which a removal must be acknowledged"""


def run(config: DedupConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals kept documents and dispositions of every input document by part, and a summary.

    `inputs["filter"]` holds the filtered documents of each part, `inputs["duplicates"]` those to remove, and
    `inputs["representatives"]` the ids and shingles of the documents that they duplicate. Resumes after the last sealed
    part.

    Raises:
        AtomError: Counts do not balance, a source has a single held-out work, or it loses so large a share that the
            recipe must acknowledge it.
    """
    count, sealed = len(config.parts()), list[Part]()
    for number in range(count):
        sealed.append(_seal_part(config, inputs, work, number))
        report.progress(len(sealed), count, "parts")
    link_parts(sealed, out)
    facts = [part.facts for part in sealed]
    for source in (source for source in config.sources if source.work):
        rows = [row for part, row in zip(config.parts(), facts, strict=True) if part.source == source.name]
        works = sorted({work for row in rows for work in row["works"]})
        report.note(f"{source.name}: held out {len(works)} works: {', '.join(works[:SHOWN_WORKS])}")
        documents = sum(row["kept"].get("heldout", 0) for row in rows)
        # Told here and not after training, when evaluation could give no error bar.
        if len(works) == 1 and documents == sum(count for row in rows for count in row["works"].values()):
            raise AtomError(
                f"source {source.name} holds out the single work {works[0]}, and an error bar needs two; raise "
                "heldout_fraction, or let its pattern `work` name smaller works"
            )
    summary = _summarize(config, facts, inputs["filter"].json("edits.json"))
    write_json(out / "summary.json", summary)
    for name, counts in summary["sources"].items():
        rules = ", ".join(f"{rule} {n}" for rule, n in counts["removed"].most_common())
        report.note(f"{name}: {counts['documents_in']} in, {counts['kept'].total()} kept; removed: {rules or 'none'}")
    losses = [
        loss
        for name, counts in summary["sources"].items()
        for loss in dedup_losses(name, counts["documents_in"], counts["kept"].total(), counts["removed"])
    ]
    acknowledged = {source.name: source.acknowledged_removals for source in config.sources}
    require_acknowledged(losses, config.alarm_share, acknowledged, report)


def run_shard(config: DedupConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Seals one part in `work`."""
    _seal_part(config, inputs, work, shard)


def _seal_part(config: DedupConfig, inputs: Inputs, work: Path, shard: int) -> Part:
    from stages.data.curate import duplicate_groups
    from stages.data.curate.opt_out_copies import OptOuts
    from stages.data.curate.part_removal import PartRemoval, Representatives

    parts, decisions = config.parts(), inputs["duplicates"].path
    part, source = parts[shard], config.sources[parts[shard].number]

    def make(folder: Path) -> dict[str, Any]:
        exact, near = (
            duplicate_groups.Removed(duplicate_groups.removed_folder(decisions, name)) for name in ("exact", "near")
        )
        with Representatives(inputs["representatives"].path, parts) as representatives:
            removal = PartRemoval(
                inputs["filter"].path,
                part,
                source.heldout_fraction,
                source.work,
                exact,
                near,
                representatives,
                config.minhash,
                OptOuts(duplicate_groups.removed_folder(decisions, "opt_out")).of(part),
            )
            return removal.write(folder)

    return seal_part(work, f"{source.name}-{part.part:05d}", make)


def _summarize(config: DedupConfig, facts: list[dict[str, Any]], edits: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Returns documents and bytes, in, kept by split, and removed by rule; by source and in total.

    `facts` are those of each part. Raises AtomError if the counts of a source do not balance.
    """
    sources: dict[str, Any] = {source.name: no_counts() for source in config.sources}
    total = no_counts()
    for part, counts in zip(config.parts(), facts, strict=True):
        for sums in (sources[part.source], total):
            for name, value in counts.items():
                sums[name] += Counter(value) if isinstance(value, dict) else value
    for name, counts in sources.items():
        kept, removed = counts["kept"].total(), counts["removed"].total()
        # Every document must have exactly one disposition: an imbalance is a fault of this code, and nothing is
        # sealed.
        undecided = counts["documents_in"] - kept - removed
        if undecided or counts["written"] != kept:
            raise AtomError(
                f"source {name} does not balance: {counts['documents_in']} in, {kept} kept ({counts['written']} "
                f"written), {removed} removed, {undecided} without a disposition; this is a fault of curation"
            )
    for counts in (*sources.values(), total):
        del counts["written"], counts["works"]
    by_source = {name: {**counts, "edited": edits.get(name, {})} for name, counts in sorted(sources.items())}
    return {"sources": by_source, "total": total}


def estimate(config: DedupConfig) -> Estimate:
    """Returns the estimate, in which the bytes of the dispositions count as those of the kept documents."""
    parts = {source.name: source.parts for source in config.sources}
    sizes = {s.name: int(estimates.LAWS["dedup"].disk * s.expected.bytes) for s in config.sources if s.expected}
    tables = *estimates.published("kept", parts, sizes), *estimates.published("dispositions", parts)
    size = estimates.total(source.expected for source in config.sources)
    return replace(estimates.estimate("dedup", size, small=10.0), published=tables)


STAGE = Stage(
    "dedup",
    VERSION,
    DedupConfig,
    run,
    estimate=estimate,
    shards=lambda config: shards_of(source.parts for source in config.sources),
    run_shard=run_shard,
)
