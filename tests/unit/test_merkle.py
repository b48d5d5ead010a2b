"""Merkle trees against the recursive definition of RFC 9162, and proofs of the rows of a release."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import AtomError
from pipeline.core.merkle_tree import Tree, leaf_hash, verify_inclusion
from pipeline.core.store import canonical
from release import merkle
from release.facts.published_tables import read_rows
from stages.data.order.order_stage import merkle_root
from tests.fixtures import parts_fixtures, release_fixtures

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
    assert Tree.of([]).root.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert Tree.of(leaves[:1]).root.hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert Tree.of(leaves).root.hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


@given(st.lists(st.binary(max_size=9), max_size=70))
def test_root_and_proofs_are_those_of_the_rfc(leaves: list[bytes]) -> None:
    tree = Tree.of(iter(leaves))
    assert tree == Tree(len(leaves), mth(leaves), b"", [])
    for index, leaf in enumerate(leaves):
        proof = Tree.of(iter(leaves), index).proof
        assert Tree.of(leaves, index) == Tree(len(leaves), tree.root, leaf, path(index, leaves))
        assert verify_inclusion(leaf, index, len(leaves), proof, tree.root)


def test_the_root_of_an_order_is_that_of_the_same_tree() -> None:
    digests = [sha256(leaf).hexdigest() for leaf in make_leaves(70)]
    for size in range(71):
        assert merkle_root(iter(digests[:size])) == mth([bytes.fromhex(digest) for digest in digests[:size]]).hex()


@given(SIZES, st.data())
def test_what_was_changed_is_refused(size: int, data: st.DataObject) -> None:
    leaves, index = make_leaves(size), data.draw(st.integers(0, size - 1))
    tree = Tree.of(leaves, index)
    proof = tree.proof

    def verifies(**changed: Any) -> bool:
        return verify_inclusion(
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
        pair = [leaf_hash(leaf) for leaf in leaves[index & ~1 : (index & ~1) + 2]]
        assert not verify_inclusion(b"".join(pair), index >> 1, (size + 1) // 2, proof[1:], tree.root)


@pytest.mark.parametrize("index", [-1, 3])
def test_there_is_no_proof_of_no_leaf(index: int) -> None:
    with pytest.raises(IndexError):
        Tree.of(make_leaves(3), index)


def test_a_large_tree_holds_one_node_for_each_level() -> None:
    """The root, and the proof of one leaf, of leaves that no list holds."""
    import tracemalloc

    size, index = 40_003, 7_777
    tracemalloc.start()
    tree = Tree.of((b"%d" % n for n in range(size)), index)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000 and tree.size == size and len(tree.proof) == len(turns(index, size))
    assert verify_inclusion(b"%d" % index, index, size, tree.proof, tree.root)


@pytest.fixture(scope="module", params=[1, 3], ids=["one part", "parts"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a release's dataset folder holds of curation and tokens."""
    folder = tmp_path_factory.mktemp("dataset")
    release_fixtures.make_node("tokenize", folder / "tokens")
    release_fixtures.make_dedup(folder)
    if request.param > 1:
        parts_fixtures.divide_dataset(folder, request.param)
    return folder


def tables_of(dataset: Path) -> dict[str, list[Path]]:
    """The files of each table that has a root."""
    folders = {"dispositions": "dispositions", "tokens": "tokens/documents", "kept": "kept"}
    return {
        f"{table}/{source}": sorted((dataset / folder / source).glob("part-*.parquet"))
        for table, folder in folders.items()
        for source in release_fixtures.SOURCES
    }


def leaves_of(files: list[Path], columns: list[str]) -> list[bytes]:
    rows = [{name: row[name] for name in columns} for file in files for row in read_rows(file)]
    return [json.dumps(r, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() for r in rows]


def test_the_roots_of_a_dataset_are_over_its_rows(dataset: Path) -> None:
    tables, roots = tables_of(dataset), merkle.roots(dataset)
    assert set(roots) == set(tables) and json.loads(json.dumps(roots)) == roots
    for name, files in tables.items():
        if name.startswith("dispositions"):
            assert roots[name]["leaf"] == list(read_rows(files[0])[0])
        leaves = leaves_of(files, roots[name]["leaf"])
        assert (roots[name]["root"], roots[name]["size"]) == (mth(leaves).hex(), len(leaves))
        assert ("part" in roots[name]["leaf"]) == name.startswith("tokens/")


def test_the_roots_of_a_dataset_never_change(tmp_path: Path) -> None:
    """They are published."""
    release_fixtures.make_node("tokenize", tmp_path / "tokens")
    release_fixtures.make_dedup(tmp_path)
    roots = {name: table["root"][:16] for name, table in merkle.roots(tmp_path).items()}
    assert roots == {
        "dispositions/prose": "f05f77dec829aaf5", "dispositions/sums": "83e31624872231e9",
        "kept/prose": "5c0ec0807ca27434", "kept/sums": "a7bb5ae55ceb26f0",
        "tokens/prose": "aeabd8cf3998d4ee", "tokens/sums": "113f4c66d285b572",
    }  # fmt: skip


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.text("ab\"\n", max_size=3), max_size=3),
)  # fmt: skip


@given(VALUES)
def test_the_text_of_a_value_is_that_of_canonical_json(value: Any) -> None:
    assert merkle._json_text(value) == canonical(value).decode()


@pytest.mark.parametrize("name", ["a", '100% "x"', "%s", "é\n"])
def test_a_leaf_is_canonical_json_of_its_row(name: str, tmp_path: Path) -> None:
    rows = [{"b": None, name: text, "Z": number} for number, text in enumerate(("", '"\\', "%s %", "é\u2028\x7f\n🦊"))]
    release_fixtures.table(tmp_path / "a.parquet", rows)
    assert list(merkle._leaves([tmp_path / "a.parquet"], ["b", name, "Z"])) == [canonical(row) for row in rows]


def proofs_of(dataset: Path, id: str) -> dict[str, dict[str, Any]]:
    """As `atom trace --doc ID --report --json` writes them."""
    proofs = {table: dataclasses.asdict(proof) for table, proof in merkle.prove(dataset, id).items()}
    return dict(json.loads(json.dumps(proofs, allow_nan=False)))


def test_every_document_is_proven_where_it_stands(dataset: Path) -> None:
    roots = merkle.roots(dataset)
    for rows in release_fixtures.corpus().values():
        for row in rows:
            proofs = proofs_of(dataset, row["id"])
            tables = {name.split("/")[0]: proof for name, proof in proofs.items()}
            assert set(tables) == ({"dispositions", "kept", "tokens"} if row["rule"] is None else {"dispositions"})
            assert all(proof["leaf"]["id"] == row["id"] for proof in proofs.values())
            assert tables["dispositions"]["leaf"]["rule"] == row["rule"]
            assert [merkle.check(proof, roots) for proof in proofs.values()] == [None] * len(proofs)


def test_a_changed_proof_is_reported(dataset: Path) -> None:
    roots, [good] = merkle.roots(dataset), proofs_of(dataset, "prose/003").values()
    table, size = good["table"], good["size"]
    bad = "0" * 64
    cases: list[tuple[dict[str, Any], str]] = [
        ({"leaf": {**good["leaf"], "rule": None}}, "to another root"),
        ({"leaf": {"id": "prose/003"}}, "other columns"),
        ({"index": 4}, f"from this row at place 4 of {table} to another root"),
        ({"index": True}, "its field index is missing or is no int"),
        ({"size": good["size"] + 1}, f"another table {table} than the published one: {size + 1} rows"),
        ({"root": bad}, f"under the root {bad}, not {size}"),
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
    copy = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    for path in copy.glob("dispositions/*/part-*.parquet"):
        rows = [{**row, "value": float("nan") if row["id"] == "prose/003" else row["value"]} for row in read_rows(path)]
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    [proof] = proofs_of(copy, "prose/003").values()
    assert proof["leaf"]["value"] == "nan"
    assert merkle.check(proof, merkle.roots(copy)) is None


def test_proofs_are_checked_against_the_roots_alone(dataset: Path, tmp_path: Path) -> None:
    proofs, roots = tmp_path / "report.json", tmp_path / "merkle.json"
    roots.write_text(json.dumps(merkle.roots(dataset)))
    proven = proofs_of(dataset, "prose/000")
    proofs.write_text(json.dumps({"proofs": proven}))
    assert merkle.check_file(proofs, roots) == dict.fromkeys(proven) and len(proven) == 3
    tokens = next(name for name in proven if name.startswith("tokens"))
    proven[tokens]["leaf"]["tokens"] += 1
    proofs.write_text(json.dumps(proven))
    assert {name for name, wrong in merkle.check_file(proofs, roots).items() if wrong} == {tokens}
    for content in ("[]", "{", '{"proofs": [1]}', "[" * 100_000, '{"proofs": {"a": 1, "a": 2}}'):
        proofs.write_text(content)
        with pytest.raises(AtomError, match="are not proofs and the roots"):
            merkle.check_file(proofs, roots)
    proofs.write_text(json.dumps({"proofs": {"a\x1b[2J": {**proven[tokens], "table": "\u202e"}}}))
    assert list(merkle.check_file(proofs, roots)) == ["a\\x1b[2J"]
    assert "the table \\u202e, of which" in (merkle.check_file(proofs, roots)["a\\x1b[2J"] or "")
    proofs.unlink()
    os.mkfifo(proofs)
    with pytest.raises(AtomError, match="is not a regular file"):
        merkle.check_file(proofs, roots)


@pytest.mark.parametrize("lost", ["size", "root"])
def test_roots_without_a_field_are_malformed(lost: str, dataset: Path, tmp_path: Path) -> None:
    proofs, roots = tmp_path / "report.json", tmp_path / "merkle.json"
    proofs.write_text(json.dumps({"proofs": proofs_of(dataset, "prose/000")}))
    stated = merkle.roots(dataset)
    for table in stated.values():
        del table[lost]
    roots.write_text(json.dumps(stated))
    with pytest.raises(AtomError, match="are not proofs and the roots"):
        merkle.check_file(proofs, roots)
