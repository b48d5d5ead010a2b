"""Licenses and lengths of the tokenized documents, from the tables of the dataset repository."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from release import data_layout
from release.assembly.published_tables import read_json, stream_batches

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

BATCH = 65536
LENGTHS = (256, 1024, 4096, 16384, 65536, 262144)
"""Upper bounds of the ranges of lengths, in tokens; a last range has no bound."""


@dataclass
class LicenseFacts:
    """The documents of one license after curation. found: acquired documents by how the license was found: `field` of
    a row, `file` of a package, `page`, `none`, or empty where it is the source's declaration."""

    documents: int = 0
    tokens: int = 0
    found: Counter[str] = field(default_factory=Counter)


@dataclass
class LengthFacts:
    """Documents and tokens of a source in each range of lengths; the ranges are those of LENGTHS."""

    documents: list[int]
    tokens: list[int]


@dataclass
class DocumentFacts:
    """licenses: by SPDX expression, that of most tokens first; lengths: by source."""

    licenses: dict[str, LicenseFacts] = field(default_factory=dict)
    lengths: dict[str, LengthFacts] = field(default_factory=dict)


def read_document_facts(dataset: Path) -> DocumentFacts:
    """Reads the tables of documents once, some thousand rows at a time."""
    import numpy as np

    facts = DocumentFacts()
    files = data_layout.all_files(data_layout.token_files(dataset))
    for batch in stream_batches(files, ["source", "license", "tokens"], BATCH):
        tokens = batch["tokens"].to_numpy()
        ranges = np.searchsorted(LENGTHS, tokens)
        for license, rows in _rows_by_value(batch["license"]):
            row = facts.licenses.setdefault(license, LicenseFacts())
            row.documents += len(rows)
            row.tokens += int(tokens[rows].sum())
        for source, rows in _rows_by_value(batch["source"]):
            lengths = facts.lengths.setdefault(source, LengthFacts([0] * (len(LENGTHS) + 1), [0] * (len(LENGTHS) + 1)))
            counts = np.bincount(ranges[rows], minlength=len(LENGTHS) + 1)
            sums = np.bincount(ranges[rows], tokens[rows], minlength=len(LENGTHS) + 1)
            lengths.documents = [a + int(b) for a, b in zip(lengths.documents, counts, strict=True)]
            lengths.tokens = [a + int(b) for a, b in zip(lengths.tokens, sums, strict=True)]
    for path in sorted((dataset / "sources").glob("*.json")):
        declared = read_json(path)
        everything = {"license": declared.get("license"), "found": "", "documents": declared.get("documents", 0)}
        for row in declared.get("licenses", [everything]):
            if row["license"] in facts.licenses:
                facts.licenses[row["license"]].found[row["found"]] += row["documents"]
    facts.licenses = dict(sorted(facts.licenses.items(), key=lambda item: (-item[1].tokens, item[0])))
    facts.lengths = dict(sorted(facts.lengths.items()))
    return facts


def _rows_by_value(column: pa.Array) -> list[tuple[str, NDArray[np.int64]]]:
    """(value, numbers of the rows that have it) of each value of an Arrow column."""
    import numpy as np

    encoded = column.dictionary_encode()
    codes = encoded.indices.to_numpy()
    return [(value, np.flatnonzero(codes == code)) for code, value in enumerate(encoded.dictionary.to_pylist())]
