"""Resources of the data stages by laws that `bench/data_scale.py` fits, for expected sizes in `atom plan`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pipeline.core.bounds import Range, Text
from pipeline.core.stage import Config, Estimate, Published

# Core seconds a MB of curation steps with atom's words, beside the law of `filter` (`bench/filters.py --steps`): of
# prose or code, and of settings that packaged data recipes have, those that take longer.
STEP_SECONDS = {
    "language": 0.18,
    "top_n_grams": 0.09,
    "GopherRepetitionFilter": 0.16,
    "GopherQualityFilter": 0.06,
    "FineWebQualityFilter": 0.035,
    "C4QualityFilter": 0.09,
    "PIIFormatter": 0.05,
    "RegexFilter": 0.02,
    "URLFilter": 0.011,
    "classifier": 0.05,
    "code_shape": 0.09,
    "personal_numbers": 0.1,
    "python_syntax": 0.28,
    "repeated_lines": 0.02,
    "scan": 0.14,
}
# Core seconds a MB that the words of spaCy add.
SPACY_SECONDS = 1.6
# Bytes on disk by those of the text, beside the artifact of any stage here; assumed, 0.8 was measured.
WORK = 1.0


class Size(Config):
    """The expected size of a source, for `atom plan` alone."""

    documents: Annotated[int, Range(1, 1e13)]
    """number of documents"""
    bytes: Annotated[int, Range(1, 1e17)]
    """bytes of their text in UTF-8"""


class Stated(Config):
    """The supply of a source as somebody states it, for a source that `atom pin` has not probed."""

    tokens: Annotated[int, Range(1, 1e16)]
    """tokens that training can read, after filters and deduplication"""
    where: Text
    """who states it, where, when, and by which tokenizer"""


@dataclass(frozen=True)
class Law:
    """The resources of a stage as a function of the size of the text.

    Attributes:
        seconds_per_mb: Core seconds for a MB of text, divided by tasks.
        serial_seconds_per_million: Seconds for a million documents, in the process that joins the parts.
        memory: Bytes of the largest process.
        memory_per_document: Bytes that each document adds to it.
        disk: Bytes of the artifact by those of the text.
    """

    seconds_per_mb: float
    serial_seconds_per_million: float
    memory: float
    memory_per_document: float
    disk: float


# Measured by `bench/data_scale.py`; `fresh` is assumed to need what `contamination` does. `filter` has the step pii
# and MinHash here, and `disk` of `tokenize` assumes token ids of four bytes, as in a large vocabulary.
LAWS = {
    "acquire": Law(0.012, 0.1, 0.4e9, 0.0, 0.42),
    "filter": Law(0.19, 0.1, 0.45e9, 0.0, 0.48),
    "duplicates": Law(0.003, 0.5, 0.3e9, 8.0, 0.01),
    "representatives": Law(0.005, 0.1, 0.35e9, 0.0, 0.02),
    "dedup": Law(0.01, 0.1, 0.5e9, 0.0, 0.46),
    "tokenize": Law(0.06, 0.1, 0.3e9, 0.0, 1.0),
    "baselines": Law(0.03, 0.1, 1.0e9, 0.0, 0.0),
    "contamination": Law(0.06, 0.5, 0.3e9, 0.0, 0.0),
    "fresh": Law(0.06, 0.5, 0.3e9, 0.0, 0.0),
}


def total(sizes: Iterable[Size | None]) -> Size | None:
    """Returns the size of several sources; None if that of one is unknown."""
    known = list(sizes)
    stated = [size for size in known if size is not None]
    if not stated or len(stated) < len(known):
        return None
    return Size(documents=sum(size.documents for size in stated), bytes=sum(size.bytes for size in stated))


def estimate(stage: str, size: Size | None, small: float | None = None, step_seconds: float = 0.0) -> Estimate:
    """Returns the resources of a data stage on text of that size.

    Args:
        stage: Name of the stage.
        size: Size of the text; None if it is unknown.
        small: Core seconds of a small corpus, for an unknown size; None: no estimate then.
        step_seconds: Core seconds of curation steps or a reader, beside the law.
    """
    law = LAWS[stage]
    if size is None:
        return Estimate(cpu_seconds=small, fixed=small is not None, memory_bytes=int(law.memory))
    # The serial part does not shrink with the number of tasks.
    parallel = law.seconds_per_mb * size.bytes / 1e6 + step_seconds
    serial = law.serial_seconds_per_million * size.documents / 1e6
    return Estimate(
        cpu_seconds=parallel + serial,
        serial_seconds=serial,
        memory_bytes=int(law.memory + law.memory_per_document * size.documents),
        disk_bytes=int(law.disk * size.bytes),
        work_bytes=int(WORK * size.bytes),
    )


def core_hours_per_billion(bytes_per_token: float, step_seconds_per_mb: float) -> float:
    """Returns the core hours that curation needs for a billion tokens that it reads, all tasks together.

    Args:
        bytes_per_token: Bytes of text in a token.
        step_seconds_per_mb: Core seconds of the steps of a source, beside the law of `filter`.
    """
    return (LAWS["filter"].seconds_per_mb + step_seconds_per_mb) * bytes_per_token * 1000 / 3600


def published(folder: str, parts: Mapping[str, int], sizes: Mapping[str, int] | None = None) -> tuple[Published, ...]:
    """Returns the files of a published table that has a file for each part of each source.

    `sizes` are the bytes of the table by source; a source without an entry counts as empty.
    """
    return tuple(
        Published(
            "dataset",
            f"{folder}/{source}",
            count,
            (sizes or {}).get(source, 0),
            f"raise sources.{source}.parts of the data recipe from {count} to at least {{files}}",
        )
        for source, count in parts.items()
    )
