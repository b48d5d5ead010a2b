"""Filter `repeated_lines`: lines or paragraphs that many documents have, such as menus, notices and letterheads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import PrivateAttr

from pipeline.core.stage import Inputs
from stages.data.curate.filters.base import Amount, Document, Filter, FilterFunction, Positive, Removal

SEPARATORS = {"line": "\n", "paragraph": "\n\n"}


class RepeatedLines(Filter):
    """Takes out lines that more documents of the same part of the source have than a maximum.

    They are counted by hash, in lower case and without surrounding space. As in CCNet (Wenzek et al. 2020), the count
    is that of a piece of the corpus and not of all of it. Each part is read twice, and memory holds eight bytes for
    each different line of each of its documents.
    """

    step: Literal["repeated_lines"]
    """selects this step"""
    unit: Literal["line", "paragraph"] = "line"
    """what is counted; paragraphs are divided by empty lines"""
    max_documents: Positive = 10
    """maximum number of documents of a part that have a line which is kept"""
    min_characters: Amount = 20
    """shorter lines are kept"""
    _repeated: frozenset[int] = PrivateAttr(frozenset())

    def prepared(self, inputs: Inputs, documents: Path) -> Self:
        import numpy as np

        from stages.formats.table import stream_batches

        hashes = [np.empty(0, np.uint64)]
        for batch in stream_batches(documents, ["text"]):
            hashes += [np.array([*{*self._hashes(text)}], np.uint64) for text in batch["text"].to_pylist()]
        values, counts = np.unique(np.concatenate(hashes), return_counts=True)
        step = self.model_copy()
        step._repeated = frozenset(values[counts > self.max_documents].tolist()) - {0}
        return step

    def function(self) -> FilterFunction:
        return self._apply

    def _apply(self, document: Document) -> str | Removal:
        separator, repeated = SEPARATORS[self.unit], self._repeated
        lines = zip(document.text.split(separator), self._hashes(document.text), strict=True)
        text = separator.join(line for line, hash in lines if hash not in repeated)
        return text if text.strip() or not document.text else Removal(f"only_repeated_{self.unit}s")

    def _hashes(self, text: str) -> list[int]:
        """Returns the hash of each line; 0 for one that is too short."""
        from xxhash import xxh3_64_intdigest

        lines = [line.strip().lower() for line in text.split(SEPARATORS[self.unit])]
        return [xxh3_64_intdigest(line) if len(line) >= self.min_characters else 0 for line in lines]
