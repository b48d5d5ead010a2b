"""Documents read, kept, removed and trained on, from the files of the dataset repository alone."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from release import layout, references
from release.facts import message_tables
from release.facts.document_facts import DocumentFacts, OptOut, read_document_facts, read_opt_outs
from release.facts.published_tables import read_json, stream_batches, stream_rows
from release.facts.score_facts import ChatScores, compute_chat_scores, compute_scores
from release.layout import numbered, when
from stages.evaluation.scores import ModelScores
from stages.formats.table import order_files, row_count

BATCH = 65536
"""Rows without text that are read together."""
EXAMPLES, EXAMPLE_ROWS, EXAMPLE_CHARACTERS = 8, 64, 1_000
"""Sources with an example document, as many of prompts, rows of a table in which it is looked for, characters."""


@dataclass
class Example:
    """The beginning of a training document.

    Attributes:
        id: Id of the document.
        text: The text with loss, all of it but the prompt.
        prompt: The text before, without loss, as of a conversation; "" for other documents.
    """

    id: str
    text: str
    prompt: str

    @property
    def beginning(self) -> str:
        """The beginning of the document, prompt included."""
        return (self.prompt + self.text)[:EXAMPLE_CHARACTERS]


@dataclass
class SourceFacts:
    """The dispositions of the documents of one source.

    Attributes:
        documents_in: Documents that were read.
        kept: Documents that were kept.
        removed: {rule: documents that it removed}
        by_split: {split: kept documents}
        bytes_in: Bytes of all texts.
        bytes_kept: Bytes of the kept ones.
        licenses: SPDX expressions of all documents.
        origin: The origin that the source declares.
        license_evidence: The evidence for its license that it declares.
        tokens: {split: tokens}
        generated: Settings of a source that a generator wrote, and the generator's `digest`; None for another one.
    """

    documents_in: int
    kept: int
    removed: dict[str, int]
    by_split: dict[str, int]
    bytes_in: int
    bytes_kept: int
    licenses: list[str]
    origin: str
    license_evidence: str
    tokens: dict[str, int] = field(default_factory=dict)
    generated: dict[str, Any] | None = None


@dataclass
class SourceInOrder:
    """The share of a source in an order.

    Attributes:
        rows: Rows with any of its tokens; several sources can share a packed row.
        tokens: Predicted tokens.
        documents: Distinct documents.
    """

    rows: int
    tokens: int
    documents: int


@dataclass
class OrderPart:
    """The data that a phase read from its first to its last step.

    Attributes:
        first_step: The first step.
        last_step: The last step.
        by_source: The share of each source.
    """

    first_step: int
    last_step: int
    by_source: dict[str, SourceInOrder]


@dataclass
class OrderFacts:
    """The steps of a phase and the data of each part of them.

    Attributes:
        steps: The last step.
        parts: One part, unless the phase resumed from an earlier run.
    """

    steps: int
    parts: list[OrderPart]

    def tokens(self) -> dict[str, int]:
        """Returns {source: predicted tokens}."""
        tokens: Counter[str] = Counter()
        for part in self.parts:
            tokens.update({source: row.tokens for source, row in part.by_source.items()})
        return dict(tokens)


@dataclass
class DataFacts:
    """The facts that the dataset repository proves. Phases and models are in the order of training.

    Attributes:
        sources: By name.
        order: By phase.
        chat: Scores by benchmark and model; empty without a chat model.
        evaluation: Scores by model.
        opt_outs: Requests of the deny-list.
        documents: Licenses, lengths and measures after curation.
        by_reference: {source without published texts: where its files are}
        messages: {source: splits} of the tables of conversations.
        published_reasons: {source that a model wrote from one by reference: why its texts are published}
        curation: The notice, the steps of each source and what classifiers measured; empty if none is stated.
        first_documents: {source: first training document} of some sources.
        preferences: {source of pairs that others ordered: what was counted of it}
    """

    sources: dict[str, SourceFacts] = field(default_factory=dict)
    order: dict[str, OrderFacts] = field(default_factory=dict)
    chat: dict[str, ChatScores] = field(default_factory=dict)
    evaluation: dict[str, ModelScores] = field(default_factory=dict)
    opt_outs: list[OptOut] = field(default_factory=list)
    documents: DocumentFacts = field(default_factory=DocumentFacts)
    by_reference: dict[str, str] = field(default_factory=dict)
    messages: dict[str, list[str]] = field(default_factory=dict)
    published_reasons: dict[str, str] = field(default_factory=dict)
    curation: dict[str, Any] = field(default_factory=dict)
    first_documents: dict[str, Example] = field(default_factory=dict)
    preferences: dict[str, dict[str, Any]] = field(default_factory=dict)

    def sources_read(self, phase: str) -> set[str]:
        """Returns the sources of a phase's order; none for a phase without an order."""
        return set(self.tokens_read(phase))

    def tokens_read(self, phase: str) -> dict[str, int]:
        """Returns {source: tokens that a phase predicted}; none for a phase without an order."""
        return self.order[phase].tokens() if phase in self.order else {}


def read_data_facts(dataset: Path) -> DataFacts:
    """Reads the facts from the dataset repository alone."""
    evaluation = dataset / "evaluation"
    orders = _by_name(layout.orders(dataset))
    # Smaller models are no step on the way to the final one.
    scored = _by_name(
        scores.parent for scores in evaluation.glob("*/scores.json") if numbered(scores.parent.name)[0] != layout.SIZE
    )
    return DataFacts(
        _read_sources(dataset),
        {phase: order_facts([*earlier_orders(dataset, phase), folder]) for phase, folder in orders},
        compute_chat_scores(evaluation),
        {model: compute_scores(folder) for model, folder in scored},
        read_opt_outs(dataset),
        read_document_facts(dataset),
        {name: reference.origin for name, reference in references.read(dataset).items()},
        message_tables.published(dataset),
        dict(references.published_reasons(dataset)),
        read_json(path) if (path := dataset / layout.CURATION).exists() else {},
        dict(_first_documents(dataset)),
        read_json(path)["sources"] if (path := dataset / layout.PREFERENCES).exists() else {},
    )


def _first_documents(dataset: Path) -> Iterator[tuple[str, Example]]:
    """Yields an example document of each of the first sources of texts, and of those with prompts.

    It is the first training document near the start of the source's table; a source without one is left out.
    """
    shown = Counter[bool]()
    for source, files in layout.kept_files(dataset).items():
        rows = islice(stream_rows(files, ["id", "text", "split", "prompt_chars"], EXAMPLE_ROWS), EXAMPLE_ROWS)
        first = next((row for row in rows if row["split"] == "train" and row["text"]), None)
        if first is None:
            continue
        length = first["prompt_chars"]
        shown[length > 0] += 1
        if shown[length > 0] <= EXAMPLES:
            prompt, text = first["text"][:length], first["text"][length:]
            yield source, Example(first["id"], text[:EXAMPLE_CHARACTERS], prompt[:EXAMPLE_CHARACTERS])


def _read_sources(dataset: Path) -> dict[str, SourceFacts]:
    fates: dict[str, _Fates] = {}
    columns = ["source", "license", "disposition", "split", "rule"]
    disposition_files = layout.all_files(layout.disposition_files(dataset))
    for keys, documents, size in _totals(disposition_files, columns, "bytes"):
        source, license, disposition, split, rule = keys
        fates.setdefault(source, _Fates()).add(license, disposition, split, rule, documents, size)
    sources = {}
    for name, source_fates in sorted(fates.items()):
        path = dataset / "sources" / f"{name}.json"
        declared = read_json(path) if path.exists() else {}
        sources[name] = source_fates.facts(declared.get("origin", ""), declared.get("license_evidence", ""))
        if "generated" in declared:
            sources[name].generated = {**declared["generated"], "digest": declared["tree_digest"]}
            records = sum(map(row_count, layout.generated_files(dataset).get(name, [])))
            # Each text of a model must say how it was made.
            if records != sources[name].documents_in:
                raise CheckFailed(
                    f"{layout.GENERATED}/{name} has records of {records} texts, and {sources[name].documents_in} "
                    "documents of the source have dispositions"
                )
    tokens: dict[str, Counter[str]] = {name: Counter() for name in sources}
    token_files = layout.all_files(layout.token_files(dataset))
    for (source, split), _, count in _totals(token_files, ["source", "split"], "tokens"):
        tokens[source][split] += count
    for name, by_split in tokens.items():
        sources[name].tokens = dict(sorted(by_split.items()))
    return sources


def _totals(files: list[Path], columns: list[str], summed: str) -> Iterator[tuple[tuple[Any, ...], int, int]]:
    """Yields (values of columns, rows, sum of another column) of each combination of values.

    A combination comes several times if it occurs in several batches.
    """
    import pyarrow as pa

    for batch in stream_batches(files, [*columns, summed], BATCH):
        groups = pa.Table.from_batches([batch]).group_by(columns).aggregate([([], "count_all"), (summed, "sum")])
        totals = (groups[name].to_pylist() for name in ("count_all", f"{summed}_sum"))
        yield from zip(zip(*(groups[name].to_pylist() for name in columns), strict=True), *totals, strict=True)


@dataclass
class _Fates:
    """The dispositions of the documents of one source, while they are counted.

    Attributes:
        documents: All documents.
        bytes: Their bytes.
        kept_bytes: The bytes of the kept ones.
        splits: {split: kept documents}
        rules: {rule: removed documents}
        licenses: Of all documents.
    """

    documents: int = 0
    bytes: int = 0
    kept_bytes: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    licenses: set[str] = field(default_factory=set)

    def add(self, license: str, disposition: str, split: str, rule: str, documents: int, size: int) -> None:
        """Adds documents of equal dispositions, which have `size` bytes together."""
        self.documents += documents
        self.bytes += size
        self.licenses.add(license)
        if disposition == "kept":
            self.kept_bytes += size
            self.splits[split] += documents
        elif disposition == "removed":
            self.rules[rule] += documents

    def facts(self, origin: str, license_evidence: str) -> SourceFacts:
        return SourceFacts(
            documents_in=self.documents,
            kept=self.splits.total(),
            removed=dict(sorted(self.rules.items())),
            by_split=dict(sorted(self.splits.items())),
            bytes_in=self.bytes,
            bytes_kept=self.kept_bytes,
            licenses=sorted(self.licenses),
            origin=origin,
            license_evidence=license_evidence,
        )


def _by_name(folders: Iterable[Path]) -> list[tuple[str, Path]]:
    """Pairs folders that are named after phases or models with their names, in the order of training."""
    return sorted(((folder.name, folder) for folder in folders), key=lambda pair: when(pair[0]))


def earlier_orders(dataset: Path, phase: str) -> list[Path]:
    """Returns the orders of earlier runs that a phase followed before its own, the first one first."""
    metas = {p.parent: read_json(p) for p in (dataset / "earlier").glob("order-*/meta.json")}
    phase_orders = [folder for folder, meta in metas.items() if meta["phase"] == phase]
    return sorted(phase_orders, key=lambda folder: int(metas[folder].get("first_step", 1)))


def order_facts(folders: list[Path]) -> OrderFacts:
    """Returns the steps of one phase and the data of each part of them.

    There is one part, unless the phase resumed from an earlier run. `folders` are the order indices that the phase
    followed in sequence, each up to the start of the next.
    """
    first_steps = [int(read_json(folder / "meta.json").get("first_step", 1)) for folder in folders]
    ends: list[int | None] = [step - 1 for step in first_steps[1:]] + [None]
    parts = [_part(folder, end) for folder, end in zip(folders, ends, strict=True)]
    return OrderFacts(parts[-1].last_step, parts)


def _part(folder: Path, end: int | None) -> OrderPart:
    """Returns the data that the steps of an order index up to `end` read.

    A segment of n tokens predicts n - 1 of them. Documents are counted by their places in token shards. Raises
    CheckFailed if the order is not by step and row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    tokens: Counter[str] = Counter()
    rows, rows_of = _Rows(), dict[str, _Rows]()
    documents: dict[str, Distinct] = {}
    # More than any step, so that the first batch sets it.
    first, last = 1 << 62, 0
    columns = ["step", "row", "source", "part", "ordinal", "length"]
    for batch in stream_batches(order_files(folder), columns, BATCH):
        table = pa.Table.from_batches([batch])
        # The steps after a resumption followed the next order.
        if end is not None:
            table = table.filter(pc.field("step") <= end)
        if not table.num_rows:
            continue
        steps = pc.min_max(table["step"]).as_py()
        first, last = min(first, steps["min"]), max(last, steps["max"])
        row_numbers, places = _joined(table, "step", "row"), _joined(table, "part", "ordinal")
        rows.add(row_numbers, folder)
        codes = table["source"].combine_chunks().dictionary_encode()
        code_of_row = codes.indices.to_numpy()
        lengths = table["length"].to_numpy().astype("int64")
        for code, source in enumerate(codes.dictionary.to_pylist()):
            # A segment of n tokens predicts n - 1 of them: its first token has nothing before it in the row.
            mask = code_of_row == code
            tokens[source] += int(lengths[mask].sum()) - int(mask.sum())
            rows_of.setdefault(source, _Rows()).add(row_numbers[mask], folder)
            documents.setdefault(source, Distinct()).add(places[mask])
    by_source = {
        name: SourceInOrder(rows_of[name].count, tokens[name], documents[name].count()) for name in sorted(rows_of)
    }
    return OrderPart(first, last, by_source)


@dataclass
class _Rows:
    """Counts the distinct rows of an order, which is sorted by them."""

    count: int = 0
    last: int = -1

    def add(self, rows: Any, folder: Path) -> None:
        """Adds the next numbers of rows, an array. Raises CheckFailed if they are not in order."""
        steps = rows[1:] - rows[:-1]
        if rows[0] < self.last or (steps < 0).any():
            raise CheckFailed(f"{folder.name}: the order is not sorted by step and row")
        # The rows are in order, so a row is new where its number rises.
        self.count += int((steps > 0).sum()) + int(rows[0] > self.last)
        self.last = int(rows[-1])


def _joined(table: Any, high: str, low: str) -> Any:
    """Returns two columns of int32 as one array of int64."""
    return table[high].to_numpy().astype("int64") << 32 | table[low].to_numpy().astype("int64")


def canary_of(items: str) -> dict[str, str]:
    """Returns a string that identifies evaluation items in a training corpus; its GUID follows from their digest."""
    guid = uuid.uuid5(uuid.NAMESPACE_URL, f"sha256:{items}")
    return {"canary": f"Evaluation data; it should never appear in a training corpus. canary GUID {guid}"}


BLOCK_BITS = 12
"""Numbers whose bits stand together: 2 to this power."""
BYTES = (1 << BLOCK_BITS) // 8


class Distinct:
    """A counter of distinct integers from 0 to 2^62.

    A number takes one bit if its neighbors occur too, else at most 800 bytes.
    """

    def __init__(self) -> None:
        import numpy as np

        self._blocks = np.empty(0, np.int64)
        """The first number of each block that is present, shifted by BLOCK_BITS, in order."""
        self._rows = np.empty(0, np.int64)
        """The row of `_bits` of each block."""
        self._bits = np.zeros((0, BYTES), np.uint8)

    def add(self, numbers: Any) -> None:
        """Adds an array of int64."""
        import numpy as np

        numbers = np.unique(numbers)
        blocks = numbers >> BLOCK_BITS
        self._insert(np.setdiff1d(blocks, self._blocks))
        bit = (numbers & ((1 << BLOCK_BITS) - 1)).astype(np.int64)
        byte = self._rows[np.searchsorted(self._blocks, blocks)] * BYTES + (bit >> 3)
        np.bitwise_or.at(self._bits.reshape(-1), byte, (1 << (bit & 7)).astype(np.uint8))

    def count(self) -> int:
        import numpy as np

        slices = (self._bits[start : start + 4096] for start in range(0, len(self._bits), 4096))
        return sum(int(np.bitwise_count(bits).sum(dtype=np.int64)) for bits in slices)

    def _insert(self, blocks: Any) -> None:
        """Adds new blocks."""
        import numpy as np

        size = len(self._blocks)
        if size + len(blocks) > len(self._bits):
            # Grows by half, so that adding one block at a time copies each bit only a few times.
            bits = np.zeros((max(size + len(blocks), len(self._bits) * 3 // 2), BYTES), np.uint8)
            bits[:size] = self._bits[:size]
            self._bits = bits
        # New blocks get the next free rows of bits; only the small arrays are kept in order.
        places = np.searchsorted(self._blocks, blocks)
        self._rows = np.insert(self._rows, places, np.arange(size, size + len(blocks)))
        self._blocks = np.insert(self._blocks, places, blocks)
