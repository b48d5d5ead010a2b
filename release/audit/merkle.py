"""Merkle trees over a release's tables, which prove the presence of one row with the table's root alone.

The tree is that of RFC 9162, section 2.1, with SHA-256: leaves and nodes are hashed with different first bytes, and a
tree of n leaves splits at the largest power of two below n. The root alone does not bind the number of leaves: the size
is published with the root, and `check` compares both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import canonical
from release import untrusted
from stages.data.table import read_table, stream_rows

KEPT = ("id", "source", "content_hash", "license", "split")
TOKENS = ("id", "source", "split", "ordinal", "content_hash", "tokens")
"""The columns of a row that a leaf contains; a leaf of dispositions contains all."""
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


class Tree:
    """All hashes over the leaves, level by level: levels[0] are those of the leaves, the last level is the root's.

    A node without a right sibling is carried up unchanged, which produces the shape of the RFC.
    """

    def __init__(self, leaves: Iterable[bytes]) -> None:
        level = [leaf_hash(leaf) for leaf in leaves]
        self.size, self.levels = len(level), [level]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=False)
            level = [node_hash(left, right) for left, right in pairs] + level[len(level) & ~1 :]
            self.levels.append(level)

    @property
    def root(self) -> bytes:
        """32 bytes; of no leaves, the hash of nothing."""
        return self.levels[-1][0] if self.size else sha256(b"").digest()

    def proof(self, index: int) -> list[bytes]:
        """The siblings on the way from a leaf to the root. Raises IndexError if there is no such leaf."""
        if not 0 <= index < self.size:
            raise IndexError(f"leaf {index} of a tree of {self.size} leaves")
        siblings = []
        for level in self.levels:
            if index ^ 1 < len(level):
                siblings.append(level[index ^ 1])
            index >>= 1
        return siblings


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

    Tables: `dispositions`, `kept/<source>`, `tokens`. Leaf i is the canonical JSON of row i, in the order of the file.
    Raises AtomError if a table is missing or damaged.
    """
    table_roots = {}
    for name, (path, columns) in _tables(dataset).items():
        tree = Tree(_leaves(path, columns))
        table_roots[name] = {"root": tree.root.hex(), "size": tree.size, "leaf": columns}
    return table_roots


def prove(dataset: Path, doc_id: str) -> dict[str, Proof]:
    """{table: proof} for each table of `roots` that has the document.

    Raises AtomError for a document that no table has, or if a table is missing or damaged.
    """
    proofs = {}
    for name, (path, columns) in _tables(dataset).items():
        index = read_table(path, ["id"])["id"].index(doc_id).as_py()
        if index >= 0:
            row = _json_row(read_table(path, columns, [("id", "=", doc_id)]).to_pylist()[0])
            tree = Tree(_leaves(path, columns))
            siblings = [sibling.hex() for sibling in tree.proof(index)]
            proofs[name] = Proof(name, row, index, tree.size, siblings, tree.root.hex())
    if not proofs:
        raise AtomError(f"no table of {dataset} has the document {doc_id}; look it up in dispositions.parquet")
    return proofs


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


def _tables(dataset: Path) -> dict[str, tuple[Path, list[str]]]:
    """{table: (its file, the columns of its leaves)}"""
    dispositions, tokens = dataset / "dispositions.parquet", dataset / "tokens" / "documents.parquet"
    all_columns = read_table(dispositions, filters=[("id", "=", "")]).column_names  # of no row, since no id is empty
    tables = {"dispositions": (dispositions, list(all_columns))}
    tables |= {f"kept/{path.stem}": (path, list(KEPT)) for path in sorted((dataset / "kept").glob("*.parquet"))}
    return tables | {"tokens": (tokens, list(TOKENS))}


def _leaves(path: Path, columns: list[str]) -> Iterator[bytes]:
    return (canonical(_json_row(row)) for row in stream_rows(path, columns))


def _json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with NaN and infinities as strings, since JSON has no such numbers."""
    non_finite = {
        name: str(value) for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)
    }
    return {**row, **non_finite}
