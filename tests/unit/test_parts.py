"""Parts of an artifact: sealed one by one, made again when damaged, joined by links without hashing again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import store
from pipeline.core.errors import AtomError
from pipeline.core.parts import (
    link_parts,
    part_file,
    part_number,
    part_slice,
    part_tables,
    require_sealed,
    seal_part,
    sealed_part,
)
from pipeline.core.store import digest_of, rows_of, write_manifest


def make(number: int) -> Any:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "kept").mkdir()
        (folder / "kept" / part_file(number)).write_text(f"text of {number}")
        return {"documents": number}

    return write


def test_a_sealed_part_is_not_made_again(tmp_path: Path) -> None:
    first = seal_part(tmp_path, "web-00003", make(3))
    again = seal_part(tmp_path, "web-00003", lambda folder: pytest.fail("it was made again"))
    assert (
        again == first
        and again.facts == {"documents": 3}
        and [row.path for row in again.rows] == ["kept/part-00003.parquet"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web-00003"], "no draft is left"


@pytest.mark.parametrize("damage", ["cut", "missing", "seal cut", "no seal"])
def test_a_damaged_part_is_made_again(tmp_path: Path, damage: str) -> None:
    part = seal_part(tmp_path, "web-00003", make(3))
    file, seal = part.folder / "kept/part-00003.parquet", part.folder / "part.json"
    {
        "cut": lambda: file.write_text("te"),
        "missing": file.unlink,
        "seal cut": lambda: seal.write_bytes(seal.read_bytes()[:9]),
        "no seal": seal.unlink,
    }[damage]()
    assert sealed_part(part.folder) is None
    assert seal_part(tmp_path, "web-00003", make(3)) == part and file.read_text() == "text of 3"


def test_a_part_that_fails_leaves_nothing_sealed(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        seal_part(tmp_path, "web-00000", fail)
    assert sealed_part(tmp_path / "web-00000") is None
    assert seal_part(tmp_path, "web-00000", make(0)).facts == {"documents": 0}


def test_joining_hashes_nothing_again_and_gives_the_same_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [seal_part(tmp_path / "work", f"web-{n:05d}", make(n)) for n in range(3)]
    link_parts(parts, tmp_path / "out")
    expected = digest_of(rows_of(tmp_path / "out"))
    hashed: list[Path] = []
    monkeypatch.setattr(store, "sha256_file", lambda path: hashed.append(path) or "0" * 64)
    assert write_manifest(tmp_path / "out", "filter-0").digest == expected and not hashed


def test_a_part_that_is_removed_while_it_is_joined_is_one_sentence(tmp_path: Path) -> None:
    parts = [seal_part(tmp_path / "work", f"web-{n:05d}", make(n)) for n in range(2)]
    shutil.rmtree(parts[1].folder)
    sentence = f"{parts[1].folder} was removed or damaged before it was joined; run again"
    with pytest.raises(AtomError, match=sentence):
        link_parts(parts, tmp_path / "out")
    with pytest.raises(AtomError, match=sentence):
        require_sealed(parts[1].folder)
    assert require_sealed(parts[0].folder) == parts[0]


def test_tables_of_parts_are_listed_in_order(tmp_path: Path) -> None:
    assert part_tables(tmp_path / "none") == []
    for name in ("part-00010.parquet", "part-00002.parquet", "part-2.parquet", "part-00001.parquet.part", "meta.json"):
        (tmp_path / name).touch()
    assert [path.name for path in part_tables(tmp_path)] == [part_file(2), part_file(10)]
    assert [part_number(Path(part_file(number))) for number in (0, 12345)] == [0, 12345]
    assert part_number(Path("part-00001.bin")) is None


def test_a_file_that_changed_after_the_join_is_hashed_again(tmp_path: Path) -> None:
    link_parts([seal_part(tmp_path / "work", "web-00000", make(0))], tmp_path / "out")
    file = tmp_path / "out/kept/part-00000.parquet"
    file.write_text("other text")
    os.utime(file, ns=(1, 1))
    artifact = write_manifest(tmp_path / "out", "filter-0")
    assert artifact.rows[0].sha256 == store.sha256_bytes(b"other text")
    artifact.verify()


def test_two_parts_with_one_file_are_a_fault(tmp_path: Path) -> None:
    parts = [seal_part(tmp_path / "work", name, make(0)) for name in ("a-00000", "b-00000")]
    with pytest.raises(AtomError, match="two parts have the file kept/part-00000.parquet"):
        link_parts(parts, tmp_path / "out")


@pytest.mark.parametrize("count, parts", [(10, 3), (3, 3), (7, 1), (1000, 7)])
def test_parts_divide_the_items_in_order(count: int, parts: int) -> None:
    items = list(range(count))
    pieces = [items[part_slice(count, part, parts)] for part in range(parts)]
    assert [item for piece in pieces for item in piece] == items and max(map(len, pieces)) - min(map(len, pieces)) <= 1
