"""Merkle trees against the recursive definition of RFC 9162, and proofs of the rows of a release."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import AtomError
from release.assembly.published_tables import read_rows
from release.audit import merkle
from tests.fixtures import release_fixtures

SIZES = st.integers(1, 70)


def split(size: int) -> int:
    """The largest power of two below the size."""
    half = 1
    while half * 2 < size:
        half *= 2
    return half


def mth(leaves: list[bytes]) -> bytes:
    """MTH(D[n]) of section 2.1.1."""
    if len(leaves) == 0:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return sha256(b"\x00" + leaves[0]).digest()
    k = split(len(leaves))
    return sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def path(m: int, leaves: list[bytes]) -> list[bytes]:
    """PATH(m, D[n]) of section 2.1.3.1."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if m < k:
        return [*path(m, leaves[:k]), mth(leaves[k:])]
    return [*path(m - k, leaves[k:]), mth(leaves[:k])]


def turns(m: int, size: int) -> str:
    """On which side of the way from leaf m up each sibling stands."""
    if size == 1:
        return ""
    k = split(size)
    return turns(m, k) + "r" if m < k else turns(m - k, size - k) + "l"


def make_leaves(size: int) -> list[bytes]:
    return [b"leaf %d" % n for n in range(size)]


def test_the_roots_of_a_known_tree() -> None:
    """The first inputs and roots of the reference implementation of RFC 6962."""
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    leaves = [bytes.fromhex(text) for text in inputs]
    assert merkle.Tree([]).root.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert merkle.Tree(leaves[:1]).root.hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert merkle.Tree(leaves).root.hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


@given(st.lists(st.binary(max_size=9), max_size=70))
def test_root_and_proofs_are_those_of_the_rfc(leaves: list[bytes]) -> None:
    tree = merkle.Tree(leaves)
    assert tree.root == mth(leaves)
    for index, leaf in enumerate(leaves):
        proof = tree.proof(index)
        assert proof == path(index, leaves)
        assert merkle.verify_inclusion(leaf, index, len(leaves), proof, tree.root)
    assert not leaves or merkle.Tree(leaves).proof(len(leaves) - 1) == path(len(leaves) - 1, leaves)


@given(SIZES, st.data())
def test_what_was_changed_is_refused(size: int, data: st.DataObject) -> None:
    leaves, index = make_leaves(size), data.draw(st.integers(0, size - 1))
    tree = merkle.Tree(leaves)
    proof = tree.proof(index)

    def verifies(**changed: Any) -> bool:
        return merkle.verify_inclusion(
            **{"leaf": leaves[index], "index": index, "size": size, "proof": proof, "root": tree.root, **changed}
        )

    assert verifies()
    assert not verifies(leaf=leaves[index] + b"x") and not verifies(root=sha256(tree.root).digest())
    assert not any(verifies(index=other) for other in range(-2, size + 2) if other != index)
    for n, sibling in enumerate(proof):
        assert not verifies(proof=[*proof[:n], sha256(sibling).digest(), *proof[n + 1 :]])
        assert not verifies(proof=proof[:n] + proof[n + 1 :])
        assert not verifies(proof=[*proof[:n], leaves[0], *proof[n:]])
    assert not verifies(proof=[*proof, tree.root])
    for other in range(1, 75):
        # A root does not bind the size: another one is refused where the way from the leaf up is another.
        assert verifies(size=other) == (index < other and turns(index, other) == turns(index, size))
    # A node is no leaf: the proof of a parent cannot be passed off as that of a leaf.
    if size > 1:
        pair = tree.levels[0][index & ~1 : (index & ~1) + 2]
        assert not merkle.verify_inclusion(b"".join(pair), index >> 1, len(tree.levels[1]), proof[1:], tree.root)


@pytest.mark.parametrize("index", [-1, 3])
def test_there_is_no_proof_of_no_leaf(index: int) -> None:
    with pytest.raises(IndexError):
        merkle.Tree(make_leaves(3)).proof(index)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a release's dataset folder holds of curation and tokens."""
    folder = tmp_path_factory.mktemp("dataset")
    release_fixtures.make_node("tokenize", folder / "tokens")
    release_fixtures.make_dedup(folder)
    return folder


def leaves_of(file: Path, columns: list[str]) -> list[bytes]:
    rows = [{name: row[name] for name in columns} for row in read_rows(file)]
    return [json.dumps(r, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() for r in rows]


def test_the_roots_of_a_dataset_are_over_its_rows(dataset: Path) -> None:
    files = {"dispositions": "dispositions.parquet", "tokens": "tokens/documents.parquet"}
    files |= {f"kept/{source}": f"kept/{source}.parquet" for source in release_fixtures.SOURCES}
    roots = merkle.roots(dataset)
    assert set(roots) == set(files) and json.loads(json.dumps(roots)) == roots
    assert roots["dispositions"]["leaf"] == list(read_rows(dataset / files["dispositions"])[0])
    for name, file in files.items():
        leaves = leaves_of(dataset / file, roots[name]["leaf"])
        assert (roots[name]["root"], roots[name]["size"]) == (mth(leaves).hex(), len(leaves))


def proofs_of(dataset: Path, id: str) -> dict[str, dict[str, Any]]:
    """As `atom trace --doc ID --report --json` writes them."""
    proofs = {table: dataclasses.asdict(proof) for table, proof in merkle.prove(dataset, id).items()}
    return dict(json.loads(json.dumps(proofs, allow_nan=False)))


def test_every_document_is_proven_where_it_stands(dataset: Path) -> None:
    roots = merkle.roots(dataset)
    for rows in release_fixtures.corpus().values():
        for row in rows:
            proofs = proofs_of(dataset, row["id"])
            everywhere = {"dispositions", f"kept/{row['source']}", "tokens"}
            assert set(proofs) == (everywhere if row["rule"] is None else {"dispositions"})
            assert all(proof["leaf"]["id"] == row["id"] for proof in proofs.values())
            assert proofs["dispositions"]["leaf"]["rule"] == row["rule"]
            assert [merkle.check(proof, roots) for proof in proofs.values()] == [None] * len(proofs)


def test_a_changed_proof_is_reported(dataset: Path) -> None:
    roots, good = merkle.roots(dataset), proofs_of(dataset, "prose/003")["dispositions"]
    bad = "0" * 64
    cases: list[tuple[dict[str, Any], str]] = [
        ({"leaf": {**good["leaf"], "rule": None}}, "to another root"),
        ({"leaf": {"id": "prose/003"}}, "other columns"),
        ({"index": 4}, "from this row at place 4 of dispositions to another root"),
        ({"index": True}, "its field index is missing or is no int"),
        ({"size": good["size"] + 1}, "another table dispositions than the published one: 25 rows"),
        ({"root": bad}, f"under the root {bad}, not 24"),
        ({"proof": [bad, *good["proof"][1:]]}, "to another root"),
        ({"proof": good["proof"][:-1]}, "to another root"),
        ({"proof": ["xy"]}, "malformed: non-hexadecimal"),
        ({"proof": [7]}, "malformed: fromhex"),
        ({"leaf": {**good["leaf"], "value": float("nan")}}, "malformed: Out of range float"),
        ({"table": "kept/prose"}, "another table kept/prose"),
        ({"table": "kept/none"}, "of which no root is published"),
    ]
    assert merkle.check(good, roots) is None
    for changed, text in cases:
        assert text in str(merkle.check({**good, **changed}, roots)), changed
    for name in good:
        less = copy.deepcopy(good)
        del less[name]
        assert f"its field {name} is missing" in str(merkle.check(less, roots))


def test_an_unknown_document_has_no_proof(dataset: Path) -> None:
    with pytest.raises(AtomError, match="no table of .* has the document prose/999; look it up"):
        merkle.prove(dataset, "prose/999")


def test_a_measure_that_is_no_number_has_a_leaf(dataset: Path, tmp_path: Path) -> None:
    dispositions = read_rows(dataset / "dispositions.parquet")
    dispositions[3]["value"] = float("nan")
    release_fixtures.table(tmp_path / "dispositions.parquet", dispositions)
    (tmp_path / "tokens").symlink_to(dataset / "tokens")
    proof = proofs_of(tmp_path, "prose/003")["dispositions"]
    assert proof["leaf"]["value"] == "nan"
    assert merkle.check(proof, merkle.roots(tmp_path)) is None


def test_a_missing_table_is_reported_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(AtomError, match=r"dispositions.parquet is missing"):
        merkle.roots(tmp_path)


def test_proofs_are_checked_against_the_roots_alone(dataset: Path, tmp_path: Path) -> None:
    proofs, roots = tmp_path / "report.json", tmp_path / "merkle.json"
    roots.write_text(json.dumps(merkle.roots(dataset)))
    proven = proofs_of(dataset, read_rows(dataset / "kept/prose.parquet", ["id"])[0]["id"])
    proofs.write_text(json.dumps({"proofs": proven}))
    assert merkle.check_file(proofs, roots) == dict.fromkeys(proven) and len(proven) == 3
    proven["tokens"]["leaf"]["tokens"] += 1
    proofs.write_text(json.dumps(proven))
    assert {name for name, wrong in merkle.check_file(proofs, roots).items() if wrong} == {"tokens"}
    for content in ("[]", "{", '{"proofs": [1]}', "[" * 100_000, '{"proofs": {"a": 1, "a": 2}}'):
        proofs.write_text(content)
        with pytest.raises(AtomError, match="are not proofs and the roots"):
            merkle.check_file(proofs, roots)
    proofs.write_text(json.dumps({"proofs": {"a\x1b[2J": {**proven["tokens"], "table": "\u202e"}}}))
    assert list(merkle.check_file(proofs, roots)) == ["a\\x1b[2J"]
    assert "the table \\u202e, of which" in (merkle.check_file(proofs, roots)["a\\x1b[2J"] or "")
    proofs.unlink()
    os.mkfifo(proofs)
    with pytest.raises(AtomError, match="is not a regular file"):
        merkle.check_file(proofs, roots)
