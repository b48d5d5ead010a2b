"""Merkle trees over a release's tables, which prove the presence of one row with the table's root alone.

The root alone does not bind the number of leaves: the size is published with the root, and `check` compares both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.merkle_tree import Tree, verify_inclusion
from pipeline.core.store import canonical
from release import layout, untrusted
from stages.formats.table import column_names, stream_part_batches

KEPT = ("id", "source", "content_hash", "license", "split")
TOKENS = ("id", "source", "split", "part", "ordinal", "content_hash", "tokens")
"""The columns of a row that a leaf contains; a leaf of dispositions contains all."""
LEAVES = 4096
"""Rows that are read together."""
FIELDS = {"table": str, "leaf": dict, "index": int, "size": int, "proof": list, "root": str}
"""{field of a proof: its type}."""


@dataclass(frozen=True)
class Proof:
    """A row of a table under the table's root.

    Attributes:
        table: The table.
        leaf: The row's columns that are hashed.
        index: The number of the row.
        size: The number of rows of the table.
        proof: The siblings in hex, from the leaf up.
        root: The root in hex.
    """

    table: str
    leaf: dict[str, Any]
    index: int
    size: int
    proof: list[str]
    root: str


def roots(dataset: Path) -> dict[str, dict[str, Any]]:
    """Returns {table: {root (hex), size (rows), leaf}} of a release's dataset folder.

    `leaf` lists the columns of a row that are hashed.
    """
    table_roots = {}
    for name, (files, columns) in _tables(dataset).items():
        tree = Tree.of(_leaves(files, columns))
        table_roots[name] = {"root": tree.root.hex(), "size": tree.size, "leaf": columns}
    return table_roots


def prove(dataset: Path, doc_id: str) -> dict[str, Proof]:
    """Returns {table: proof} for each table of `roots` that has the document.

    Raises AtomError for a document that no table has, or if a table is damaged.
    """
    proofs = {}
    for name, (files, columns) in _tables(dataset).items():
        if (index := _index_of(files, doc_id)) is not None:
            tree = Tree.of(_leaves(files, columns), index)
            siblings = [sibling.hex() for sibling in tree.proof]
            proofs[name] = Proof(name, json.loads(tree.leaf), index, tree.size, siblings, tree.root.hex())
    if not proofs:
        raise AtomError(f"no table of {dataset} has the document {doc_id}; look it up in the dispositions")
    return proofs


def _index_of(files: Iterable[Path], doc_id: str) -> int | None:
    """Returns the number of the first row of a document."""
    import pyarrow.compute as pc

    first = 0
    for batch in stream_part_batches(files, ["id"]):
        index: int = pc.index(batch["id"], doc_id).as_py()
        if index >= 0:
            return first + index
        first += len(batch)
    return None


def check(proof: Mapping[str, Any], roots: Mapping[str, Any]) -> str | None:
    """Returns the problem with a proof, in a sentence; None if it is valid.

    `roots` is a result of the function `roots`, from a trusted source.
    """
    for name, kind in FIELDS.items():
        # A bool is an int in Python, and no field is one.
        if not isinstance(proof.get(name), kind) or isinstance(proof[name], bool):
            return f"the proof is malformed: its field {name} is missing or is no {kind.__name__}"
    table, index, size = proof["table"], proof["index"], proof["size"]
    if (published := roots.get(table)) is None:
        return f"the proof is about the table {table}, of which no root is published"
    if (size, proof["root"]) != (published["size"], published["root"]):
        return (
            f"the proof is about another table {table} than the published one: {size} rows under the root "
            f"{proof['root']}, not {published['size']} under {published['root']}"
        )
    if set(proof["leaf"]) != set(published["leaf"]):
        return f"the proof is malformed: its leaf has other columns than the leaves of {table}"
    try:
        siblings = [bytes.fromhex(text) for text in proof["proof"]]
        leaf = canonical(proof["leaf"])
    except (TypeError, ValueError) as error:
        return f"the proof is malformed: {error}"
    if not verify_inclusion(leaf, index, size, siblings, bytes.fromhex(published["root"])):
        return f"the proof does not hold: it leads from this row at place {index} of {table} to another root"
    return None


def check_file(proofs: Path, roots: Path) -> dict[str, str | None]:
    """Returns {table: the problem with its proof, or None} of a file that `atom trace --doc ID --report --json` wrote.

    `roots` is a merkle.json from a trusted source. Raises AtomError if a file is malformed.
    """
    try:
        stated, trusted = untrusted.read_json(proofs, follow=True), untrusted.read_json(roots, follow=True)
        table_proofs = stated.get("proofs", stated)
        problems: dict[str, str | None] = untrusted.cleaned(
            {name: check(proof, trusted) for name, proof in table_proofs.items()}
        )
        return problems
    except (CheckFailed, ValueError, AttributeError, TypeError, KeyError) as error:
        raise AtomError(f"{proofs} and {roots} are not proofs and the roots that they lead to: {error}") from None


def _tables(dataset: Path) -> dict[str, tuple[list[Path], list[str]]]:
    """Returns {table: (its files, the columns of its leaves)}."""
    tables: dict[str, tuple[list[Path], list[str]]] = {}
    for source, files in layout.disposition_files(dataset).items():
        tables[f"dispositions/{source}"] = files, column_names(files[0])
    for source, files in layout.kept_files(dataset).items():
        tables[f"kept/{source}"] = files, list(KEPT)
    for source, files in layout.token_files(dataset).items():
        tables[f"tokens/{source}"] = files, list(TOKENS)
    return tables


def _leaves(files: Iterable[Path], columns: list[str]) -> Iterator[bytes]:
    """Yields the canonical JSON of each row. NaN and infinities are strings, since JSON has no such numbers.

    The values are written column by column, which takes half the time of a row at a time.
    """
    names = sorted(columns)
    # One `%s` stands for each value, so a percent sign in a name is doubled.
    fields = [encode_basestring(name).replace("%", "%%") + ":%s" for name in names]
    template = "{" + ",".join(fields) + "}"

    for batch in stream_part_batches(files, columns, LEAVES):
        column_texts = [map(_json_text, batch[name].to_pylist()) for name in names]
        # From columns to rows.
        for row_texts in zip(*column_texts, strict=True):
            yield (template % row_texts).encode()


def _json_text(value: Any) -> str:
    """Returns a value as in canonical JSON, but NaN and infinities as strings."""
    if isinstance(value, str):
        return encode_basestring(value)
    if value is None:
        return "null"
    # Not `isinstance`: a bool is an int as well, and JSON writes it in another way.
    if type(value) is int:
        return repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'"{value}"'
    return canonical(value).decode()
