"""Merkle trees over a release's tables, which prove the presence of one row with the table's root alone.

The tree is that of RFC 9162, section 2.1, with SHA-256: leaves and nodes are hashed with different first bytes, and a
tree of n leaves splits at the largest power of two below n. The root alone does not bind the number of leaves: the size
is published with the root, and `check` compares both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import canonical
from release import data_layout, untrusted
from stages.data.table import column_names, stream_part_batches

KEPT = ("id", "source", "content_hash", "license", "split")
PART = "part"
"""A column of tokens since format 4."""
TOKENS = ("id", "source", "split", PART, "ordinal", "content_hash", "tokens")
"""The columns of a row that a leaf contains; a leaf of dispositions contains all."""
LEAVES = 4096
"""Rows that are read together."""
FIELDS = {"table": str, "leaf": dict, "index": int, "size": int, "proof": list, "root": str}


@dataclass(frozen=True)
class Proof:
    """A row of a table under the table's root. leaf: the row's columns that are hashed; index: of the row; size: rows
    of the table; proof: hex of the siblings, from the leaf up; root: hex."""

    table: str
    leaf: dict[str, Any]
    index: int
    size: int
    proof: list[str]
    root: str


@dataclass
class _Node:
    """A subtree. height: of a perfect one; holds: whether the leaf of a proof is in it."""

    height: int
    hash: bytes
    holds: bool


@dataclass(frozen=True)
class Tree:
    """The size and the root of a tree. leaf, proof: a leaf and the siblings on its way up, if they were asked for."""

    size: int
    root: bytes
    leaf: bytes
    proof: list[bytes]

    @classmethod
    def of(cls, leaves: Iterable[bytes], index: int | None = None) -> Tree:
        """Reads the leaves once, with at most one node for each level in memory. index: of the leaf to prove.

        The root of no leaves is the hash of nothing. Raises IndexError if there is no such leaf.
        """
        nodes: list[_Node] = []  # perfect trees over the leaves so far, the largest first
        proof: list[bytes] = []
        size, proven = 0, b""
        for leaf in leaves:
            proven = leaf if size == index else proven
            node = _Node(0, leaf_hash(leaf), size == index)
            while nodes and nodes[-1].height == node.height:
                node = _join(nodes.pop(), node, proof)
            nodes.append(node)
            size += 1
        if index is not None and not 0 <= index < size:
            raise IndexError(f"leaf {index} of a tree of {size} leaves")
        while len(nodes) > 1:
            right = nodes.pop()
            nodes.append(_join(nodes.pop(), right, proof))
        return cls(size, nodes[0].hash if nodes else sha256(b"").digest(), proven, proof)


def _join(left: _Node, right: _Node, proof: list[bytes]) -> _Node:
    """The parent of two nodes. Adds the sibling of the one that holds the leaf to the proof."""
    if left.holds or right.holds:
        proof.append(right.hash if left.holds else left.hash)
    return _Node(left.height + 1, node_hash(left.hash, right.hash), left.holds or right.holds)


def leaf_hash(leaf: bytes) -> bytes:
    return sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether the proof leads from this leaf, at this place among `size` leaves, to the root (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    node, last_index = leaf_hash(leaf), size - 1
    for sibling in proof:
        if last_index == 0:
            return False
        if index & 1 or index == last_index:
            node = node_hash(sibling, node)
            while index and not index & 1:
                index, last_index = index >> 1, last_index >> 1
        else:
            node = node_hash(node, sibling)
        index, last_index = index >> 1, last_index >> 1
    return last_index == 0 and node == root


def roots(dataset: Path) -> dict[str, dict[str, Any]]:
    """{table: {root (hex), size (rows), leaf (the columns of a row that are hashed)}} of a release's dataset folder.

    Tables: `dispositions/<source>`, `kept/<source>`, `tokens/<source>`; `dispositions` and `tokens` are of all sources
    in releases before format 4. Leaf i is the canonical JSON of row i, in the order of the parts. Raises AtomError if a
    table is missing or damaged.
    """
    table_roots = {}
    for name, (files, columns) in _tables(dataset).items():
        tree = Tree.of(_leaves(files, columns))
        table_roots[name] = {"root": tree.root.hex(), "size": tree.size, "leaf": columns}
    return table_roots


def prove(dataset: Path, doc_id: str) -> dict[str, Proof]:
    """{table: proof} for each table of `roots` that has the document.

    Raises AtomError for a document that no table has, or if a table is missing or damaged.
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
    """The number of the first row of a document."""
    import pyarrow.compute as pc

    first = 0
    for batch in stream_part_batches(files, ["id"]):
        index: int = pc.index(batch["id"], doc_id).as_py()
        if index >= 0:
            return first + index
        first += len(batch)
    return None


def check(proof: Mapping[str, Any], roots: Mapping[str, Any]) -> str | None:
    """The problem with a proof, in a sentence; None if it is valid. roots: those of `roots`, from a trusted source."""
    for name, kind in FIELDS.items():
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
    """{table: the problem with its proof, or None} of a file that `atom trace --doc ID --report --json` wrote.

    roots: a merkle.json from a trusted source. Raises AtomError if a file is malformed.
    """
    try:
        stated, trusted = untrusted.read_json(proofs, follow=True), untrusted.read_json(roots, follow=True)
        table_proofs = stated.get("proofs", stated)
        problems: dict[str, str | None] = untrusted.cleaned(
            {name: check(proof, trusted) for name, proof in table_proofs.items()}
        )
        return problems
    except (CheckFailed, ValueError, AttributeError, TypeError) as error:
        raise AtomError(f"{proofs} and {roots} are not proofs and the roots that they lead to: {error}") from None


def _tables(dataset: Path) -> dict[str, tuple[list[Path], list[str]]]:
    """{table: (its files, the columns of its leaves)}"""
    tables: dict[str, tuple[list[Path], list[str]]] = {}
    for source, files in data_layout.disposition_files(dataset).items():
        tables[f"dispositions/{source}".rstrip("/")] = files, column_names(files[0])
    for source, files in data_layout.kept_files(dataset).items():
        tables[f"kept/{source}"] = files, list(KEPT)
    for source, files in data_layout.token_files(dataset).items():
        columns = [name for name in TOKENS if name != PART or source != data_layout.ALL]
        tables[f"tokens/{source}".rstrip("/")] = files, columns
    return tables


def _leaves(files: Iterable[Path], columns: list[str]) -> Iterator[bytes]:
    """The canonical JSON of each row. NaN and infinities are strings, since JSON has no such numbers.

    A row is joined from the texts of its values, column by column, in half the time of a row at a time.
    """
    names = sorted(columns)
    row = "{" + ",".join(encode_basestring(name).replace("%", "%%") + ":%s" for name in names) + "}"
    for batch in stream_part_batches(files, columns, LEAVES):
        texts = [map(_json_text, batch[name].to_pylist()) for name in names]
        yield from ((row % values).encode() for values in zip(*texts, strict=True))


def _json_text(value: Any) -> str:
    """A value as in canonical JSON."""
    if isinstance(value, str):
        return encode_basestring(value)
    if value is None:
        return "null"
    if type(value) is int:
        return int.__repr__(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'"{value}"'
    return canonical(value).decode()
