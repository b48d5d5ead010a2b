"""Sealed artifacts: complete or absent, proven by their rows, refused when two differ."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.core import environment
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import (
    Artifact,
    FileRecord,
    Store,
    digest_of,
    once,
    rows_of,
    sha256_file,
    write_manifest,
)


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace('"x"', '"y"'))


def test_the_digest_depends_on_rows_alone(tmp_path: Path) -> None:
    one = write_manifest(folder(tmp_path / "a", x="1", y="2"), "stage-aaaaaaaaaaaa")
    two = write_manifest(folder(tmp_path / "b", y="2", x="1"), "other-bbbbbbbbbbbb")
    assert one.digest == two.digest == digest_of(rows_of(tmp_path / "a"))
    assert write_manifest(folder(tmp_path / "c", x="1", y="3"), "stage-aaaaaaaaaaaa").digest != one.digest


def test_a_sealed_folder_opens_and_verifies(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    records: list[str] = []
    artifact = store.seal(folder(tmp_path / "out", x="1"), "stage-aaaaaaaaaaaa", lambda a: records.append(a.digest))
    assert records == [artifact.digest] and not (tmp_path / "out").exists()
    assert store.sealed(artifact.key) and store.open(artifact.key).digest == artifact.digest
    artifact.verify()


def test_several_verify_an_artifact_together(tmp_path: Path) -> None:
    """Each hashes its share of the chosen files, and together they find what is damaged in any of them."""
    (tmp_path / "a" / "step").mkdir(parents=True)
    for number in range(7):
        (tmp_path / "a" / "step" / f"model-{number}").write_text("x" * (number + 1))
    for name in ("step/optimizer", "other"):
        (tmp_path / "a" / name).write_text("moments")
    artifact = write_manifest(tmp_path / "a", "stage-aaaaaaaaaaaa")

    def verify(rank: int, ranks: int = 3) -> list[int]:
        sizes: list[int] = []
        artifact.verify("step", lambda path: "model" in path, (rank, ranks), sizes.append)
        return sizes

    assert sorted(size for rank in range(3) for size in verify(rank)) == [1, 2, 3, 4, 5, 6, 7]
    (tmp_path / "a" / "step" / "optimizer").write_text("damaged")
    (tmp_path / "a" / "step" / "model-4").write_text("y" * 5)
    assert len(verify(0)) + len(verify(2)) == 5
    for rank, ranks in ((1, 3), (0, 1)):
        with pytest.raises(CheckFailed, match="step/model-4 is not what its manifest says"):
            verify(rank, ranks)


def test_a_record_of_a_file_holds_while_nobody_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("content")
    record = FileRecord.of(path, sha256_file(path))
    hashed: list[int] = []
    os.link(path, tmp_path / "link")
    assert record.describes(tmp_path / "link", hashed.append) and not hashed
    os.utime(path, ns=(1, 1))
    assert not record.is_unchanged(path) and record.describes(path, hashed.append) and hashed == [7]
    path.write_text("c0ntent")
    assert not record.describes(path, hashed.append) and hashed == [7, 7]
    path.write_text("longer content")
    assert not record.describes(path, hashed.append) and hashed == [7, 7], "a file of another size is not read"


def test_no_statement_no_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")

    def refuse(artifact: Artifact) -> None:
        raise AtomError("no")

    with pytest.raises(AtomError):
        store.seal(folder(tmp_path / "out", x="1"), "stage-aaaaaaaaaaaa", refuse)
    assert not store.sealed("stage-aaaaaaaaaaaa")


def test_the_first_sealed_artifact_wins_and_another_digest_is_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    first = store.seal(folder(tmp_path / "1", x="1"), "stage-aaaaaaaaaaaa", lambda a: None)
    assert store.seal(folder(tmp_path / "2", x="1"), "stage-aaaaaaaaaaaa", lambda a: None).digest == first.digest
    with pytest.raises(AtomError, match="sealed twice at once with different digests"):
        store.seal(folder(tmp_path / "3", x="2"), "stage-aaaaaaaaaaaa", lambda a: None)
    assert (store.artifacts / "stage-aaaaaaaaaaaa" / "x").read_text() == "1"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: (p / "x").unlink(), "x is missing"),
        (lambda p: (p / "x").write_text("12"), "x has 2 bytes instead of 1"),
        (lambda p: (p / "manifest.json").unlink(), "not a sealed artifact"),
        (lambda p: (p / "manifest.json").write_text("{"), "is damaged"),
        (lambda p: (p / "manifest.json").write_text(json.dumps({"key": "k", "files": []})), "digest"),
        (lambda p: edited(p / "manifest.json"), "was edited"),
    ],
)
def test_damage_is_seen_on_opening(tmp_path: Path, damage: object, sentence: str) -> None:
    store = Store(tmp_path / "home")
    artifact = store.seal(folder(tmp_path / "out", x="1"), "stage-aaaaaaaaaaaa", lambda a: None)
    damage(artifact.path)  # type: ignore[operator]
    with pytest.raises(AtomError, match=sentence):
        store.open(artifact.key)


def test_a_flipped_byte_and_an_extra_file_are_seen_by_verify(tmp_path: Path) -> None:
    artifact = write_manifest(folder(tmp_path / "a", x="1"), "stage-aaaaaaaaaaaa")
    (artifact.path / "x").write_text("2")
    with pytest.raises(CheckFailed, match="x is not what its manifest says"):
        artifact.verify()
    (artifact.path / "x").write_text("1")
    (artifact.path / "y").write_text("")
    with pytest.raises(CheckFailed, match="y is not in its manifest"):
        artifact.verify()


def test_links_cannot_be_sealed(tmp_path: Path) -> None:
    out = folder(tmp_path / "a", x="1")
    (out / "link").symlink_to("x")
    with pytest.raises(AtomError, match="regular files only"):
        write_manifest(out, "stage-aaaaaaaaaaaa")


def test_work_kept_by_once_is_made_again_when_it_is_damaged(tmp_path: Path) -> None:
    creations: list[int] = []

    def make() -> list[float]:
        creations.append(1)
        return [0.1, 2.0]

    path = tmp_path / "rows.json"
    assert once(path, make) == once(path, make) == [0.1, 2.0] and len(creations) == 1
    for damage in (path.read_bytes()[:-1], path.read_bytes().replace(b"2.0", b"3.0"), b"", b"\xff"):
        path.write_bytes(damage)
        assert once(path, make) == [0.1, 2.0]
    assert len(creations) == 5


def test_sealed_files_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    out = folder(tmp_path / "out", x="1")
    (out / "sub").mkdir(mode=0o700)
    (out / "sub" / "y").write_text("2")
    for path in (out / "x", out / "sub" / "y"):
        path.chmod(0o600)
    before = os.umask(0o002)
    try:
        write_manifest(out, "stage-aaaaaaaaaaaa")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o664}
    assert (out / "sub").stat().st_mode & 0o777 == 0o775


def test_tensors_are_written_by_the_umask(tmp_path: Path) -> None:
    import torch

    from stages.train.checkpoint.release_checkpoint import save_tensors

    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_variables_that_change_rounding_are_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.ARITHMETIC:
        monkeypatch.delenv(name, raising=False)
    plain = environment.fingerprint()
    assert "variables" not in environment.device()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert environment.device()["variables"] == {"MKL_CBWR": "COMPATIBLE"}
    assert environment.fingerprint() != plain
