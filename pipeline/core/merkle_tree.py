"""The Merkle tree of RFC 9162, section 2.1, with SHA-256.

Leaves and nodes are hashed with different first bytes, and a tree of n leaves splits at the largest power of two below
n. The root alone does not bind the number of leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256


@dataclass
class _Node:
    """A perfect subtree of that height. `holds` is True if the leaf of a proof is in it."""

    height: int
    hash: bytes
    holds: bool


@dataclass(frozen=True)
class Tree:
    """The size and the root of a tree.

    If a proof was asked for, `leaf` is the proven leaf, and `proof` has the siblings on its way up.
    """

    size: int
    root: bytes
    leaf: bytes
    proof: list[bytes]

    @classmethod
    def of(cls, leaves: Iterable[bytes], index: int | None = None) -> Tree:
        """Reads the leaves once, with at most one node for each level in memory.

        The root of no leaves is the hash of nothing.

        Args:
            leaves: The leaves in order.
            index: The number of the leaf to prove.

        Raises:
            IndexError: There is no such leaf.
        """
        nodes: list[_Node] = []  # perfect trees over the leaves so far, the largest first
        proof: list[bytes] = []
        size, proven = 0, b""
        for leaf in leaves:
            proven = leaf if size == index else proven
            node = _Node(0, leaf_hash(leaf), size == index)
            # Two perfect trees of one height become one, as with a carry in binary addition.
            while nodes and nodes[-1].height == node.height:
                node = _join(nodes.pop(), node, proof)
            nodes.append(node)
            size += 1
        if index is not None and not 0 <= index < size:
            raise IndexError(f"leaf {index} of a tree of {size} leaves")
        # The heights of the remaining trees fall. RFC 9162 joins them from the right.
        while len(nodes) > 1:
            right = nodes.pop()
            nodes.append(_join(nodes.pop(), right, proof))
        return cls(size, nodes[0].hash if nodes else sha256(b"").digest(), proven, proof)


def _join(left: _Node, right: _Node, proof: list[bytes]) -> _Node:
    """Returns the parent of two nodes. Adds the sibling of the one that holds the leaf to the proof."""
    if left.holds or right.holds:
        proof.append(right.hash if left.holds else left.hash)
    return _Node(left.height + 1, node_hash(left.hash, right.hash), left.holds or right.holds)


def leaf_hash(leaf: bytes) -> bytes:
    return sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Returns True if the proof leads from this leaf to the root.

    The algorithm is that of RFC 9162, section 2.1.3.2.

    Args:
        leaf: The leaf.
        index: Its place among the leaves, from 0 on.
        size: The number of leaves.
        proof: The siblings on the way up, the lowest first.
        root: The root of the tree.
    """
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
