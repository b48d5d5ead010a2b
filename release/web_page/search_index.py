"""The search in the kept documents: an inverted index and the beginnings of the documents, in parts for a browser.

`search/about` states counts. `search/terms-N` has {word: [weight, documents]} of the words whose CRC-32 leaves N when
divided by the number of these parts. `search/documents-N` has the rows of PER_PART documents. A query loads the parts
of its words and of the hits that it shows.

Documents are streamed once, in the order of the tables. Their postings go to bins on the disk, and so do the rows of
the orders; a bin holds what one part needs. In memory are 4 bytes for each document, one bin, and the ids of one part.
"""

from __future__ import annotations

import math
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.core.parts import part_number
from release import data_layout, scratch
from release.assembly.published_tables import TEXT_BATCH, stream_batches, stream_rows
from release.audit.tracing.release_data import ReleaseData
from release.web_page.script_parts import PartWriter
from release.web_page.spill import Spill
from stages.data.table import order_files, row_count

MOST_DOCUMENTS = 100_000
"""Documents that are searchable; of more, those with the smallest hashes, about as many."""
PER_PART, PER_TERM_PART = 100, 400
"""Documents of a part with documents; documents of the index for each part with words."""
BEGINNING = 600
"""Characters of a document that are shown."""
SHOWN_STEPS = 6
"""Steps of a phase that are named for a document; all are counted."""
LONGEST_WORD = 40
SCRIPTS = "\u3040-\u30ff\u3400-\u9fff"
"""Scripts without spaces, of which each character is a word."""
WORD = re.compile(rf"[{SCRIPTS}]|[^\W_{SCRIPTS}]+")
IMPACTS, SATURATION, LENGTH = 15, 1.2, 0.75
"""The levels of a word's weight in a document, and the constants k1 and b of BM25."""
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
"""Of a number: five bits each, the lowest first, and 32 more in every digit but the last."""


def words(text: str) -> list[str]:
    """The words of a text, in its order; the page splits a query in the same way."""
    return [word[:LONGEST_WORD] for word in WORD.findall(text.lower())]


def write(release: Path, parts: PartWriter, most: int = MOST_DOCUMENTS) -> None:
    """Writes the parts of the index of a release."""
    dataset = release / "dataset"
    total = sum(row_count(path) for path in data_layout.all_files(data_layout.kept_files(dataset)))
    with scratch.folder() as folder:
        for name in ("orders", "postings"):
            (folder / name).mkdir()
        orders = Orders(release, Spill(folder / "orders"))
        bins = max(1, min(total, most) // PER_TERM_PART)
        postings = Postings(bins, Spill(folder / "postings"))
        rows: list[list[Any]] = []
        number = 0
        for document, seen in _documents(dataset, orders, total, most):
            postings.add(number, words(searched_text(document)))
            rows.append(_row(document, seen))
            number += 1
            if len(rows) == PER_PART:
                parts.write(f"search/documents-{number // PER_PART - 1}", rows)
                rows = []
        if rows:
            parts.write(f"search/documents-{number // PER_PART}", rows)
        for each in range(bins):
            parts.write(f"search/terms-{each}", postings.part(each))
    about = {"documents": number, "of": total, "bins": bins, "perPart": PER_PART, "phases": orders.phases}
    parts.write("search/about", about)


def searched_text(document: dict[str, Any]) -> str:
    """What is searched of a document: id, source and license, and the text if it is published."""
    return "\n".join(filter(None, (document[name] for name in ("id", "source", "license", "text"))))


def is_chosen(content_hash: str, total: int, most: int) -> bool:
    """Whether a document is among the searchable ones."""
    return total <= most or int(content_hash[:8], 16) * total < most << 32


class Orders:
    """The steps that read each training document, by phase. phases: in the order of training.

    Orders of earlier runs, from which a phase went on, are left out: they are about tables of their own.
    """

    def __init__(self, release: Path, spill: Spill) -> None:
        data = ReleaseData.locate(release)
        folders = {phase: parts[-1].folder for phase, parts in data.orders().items()}
        self.phases = list(folders)
        self.spill = spill
        self.bins: dict[tuple[str, int], int] = {}
        for number, folder in enumerate(folders.values()):
            self._read(number, folder, data.weight_updates(folder))

    def _read(self, phase: int, folder: Path, moved: Any) -> None:
        """Puts the rows of an order into the bins of the parts of documents, as int32: phase, ordinal, step; the step
        is negative if it moved no weight."""
        import numpy as np

        for batch in stream_batches(order_files(folder), ["source", "part", "ordinal", "step"], 65536):
            sources = batch.column("source").dictionary_encode()
            names, codes = sources.dictionary.to_pylist(), sources.indices.to_numpy()
            steps, part_numbers = batch.column("step").to_numpy(), batch.column("part").to_numpy()
            still = np.array([step for step in np.unique(steps).tolist() if moved(step) is False], dtype="int32")
            signed = np.where(np.isin(steps, still), -steps, steps)
            columns = [np.full(len(batch), phase), batch.column("ordinal").to_numpy(), signed]
            records = np.stack(columns, axis=1).astype("<i4")
            places = codes.astype("int64") << 32 | part_numbers
            for place in np.unique(places).tolist():
                key = names[place >> 32], place & 0xFFFFFFFF
                self.spill.add(self.bins.setdefault(key, len(self.bins)), records[places == place].tobytes())

    def take(self, source: str, part: int) -> dict[int, list[list[Any]]]:
        """{ordinal: [[phase, number of steps, the first steps], …]} of the documents of one part."""
        import numpy as np

        if (source, part) not in self.bins:
            return {}
        records = np.frombuffer(self.spill.take(self.bins[source, part]), "<i4").reshape(-1, 3)
        records = np.unique(records, axis=0)
        seen: dict[int, dict[int, list[int]]] = {}
        for phase, ordinal, step in records.tolist():
            seen.setdefault(ordinal, {}).setdefault(phase, []).append(step)
        return {
            ordinal: [
                [phase, len(steps), sorted(steps, key=abs)[:SHOWN_STEPS]] for phase, steps in sorted(phases.items())
            ]
            for ordinal, phases in seen.items()
        }


def _documents(dataset: Path, orders: Orders, total: int, most: int) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """The chosen documents, each with the steps that read it."""
    columns = ["id", "text", "source", "license", "origin", "content_hash", "split"]
    for part in data_layout.document_parts(dataset):
        if not part.kept.exists():
            continue
        seen = orders.take(part.source, part_number(part.kept) or 0)
        ordinals = _ordinals(part.tokens) if seen else {}
        for row in stream_rows(part.kept, columns, TEXT_BATCH):
            if is_chosen(row["content_hash"], total, most):
                yield row, seen.get(ordinals.get(row["id"], -1), [])


def _ordinals(tokens: Path) -> dict[str, int]:
    """Returns {id: the place in the shard} of the training documents of one part of a source."""
    rows = stream_rows(tokens, ["id", "split", "ordinal"])
    return {row["id"]: row["ordinal"] for row in rows if row["split"] == "train"}


def _row(document: dict[str, Any], seen: list[Any]) -> list[Any]:
    """[id, source, license, origin, 1 if it is held out, the beginning of its text or null, 1 if that is the whole,
    what saw it]"""
    text = document["text"]
    beginning = None if text is None else text[:BEGINNING]
    is_whole = text is not None and len(text) <= BEGINNING
    return [
        *(document[name] for name in ("id", "source", "license", "origin")),
        int(document["split"] == "heldout"), beginning, int(is_whole), seen,
    ]  # fmt: skip


class Postings:
    """The words of all documents, in bins by word. lengths: words of each document."""

    def __init__(self, bins: int, spill: Spill) -> None:
        self.spill = spill
        self.lengths = array("I")
        self.bin_of = lru_cache(1 << 16)(lambda word: zlib.crc32(word.encode()) % bins)

    def add(self, number: int, document: list[str]) -> None:
        """number: of the document, which are added in order."""
        self.lengths.append(len(document))
        lines: dict[int, list[str]] = {}
        for word, times in Counter(document).items():
            lines.setdefault(self.bin_of(word), []).append(f"{word}\t{number}\t{times}\n")
        for each, texts in lines.items():
            self.spill.add(each, "".join(texts).encode())

    def part(self, number: int) -> dict[str, list[Any]]:
        """{word: [weight, documents]} of a bin. The documents are numbers: of each the distance from the one before,
        times 16, plus the word's impact in it."""
        documents = len(self.lengths)
        mean = sum(self.lengths) / documents if documents else 1.0
        rows: dict[str, list[tuple[int, int]]] = {}
        for line in self.spill.take(number).decode().splitlines():
            word, document, times = line.split("\t")
            rows.setdefault(word, []).append((int(document), int(times)))
        return {word: [weight(len(rows[word]), documents), self._encoded(rows[word], mean)] for word in sorted(rows)}

    def _encoded(self, rows: list[tuple[int, int]], mean: float) -> str:
        digits, before = [], 0
        for document, times in rows:
            value = (document - before) << 4 | impact(times, self.lengths[document] / mean)
            before = document
            while value >= 32:
                digits.append(DIGITS[32 | value & 31])
                value >>= 5
            digits.append(DIGITS[value])
        return "".join(digits)


def weight(documents_with_word: int, documents: int) -> int:
    """The weight of a word: the inverse document frequency of BM25 in hundredths, at least 1."""
    rare = math.log(1 + (documents - documents_with_word + 0.5) / (documents_with_word + 0.5))
    return max(1, round(100 * rare))


def impact(times: int, length: float) -> int:
    """The weight of a word in a document: the saturated frequency of BM25, from 1 to IMPACTS. length: of the document,
    over the mean."""
    frequency = times / (times + SATURATION * (1 - LENGTH + LENGTH * length))
    return max(1, round(IMPACTS * frequency))
