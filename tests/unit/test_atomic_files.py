"""Files are replaced as a whole, and drafts do not stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core import atomic_files


@pytest.mark.parametrize("content", ["größer\n", b"\x00\xff"])
def test_write_replaces_a_file_and_leaves_no_draft(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "state.json"
    path.write_text("a much longer text than the new one")
    atomic_files.write(path, content, durable=True)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_files.replacing(path) as draft:
        draft.write_text("half")
        assert draft.parent == tmp_path and draft.name.startswith(".")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_link_to_another_file_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.write_text("of another release")
    (tmp_path / "link").hardlink_to(shared)
    atomic_files.write(tmp_path / "link", "new")
    assert shared.read_text() == "of another release" and (tmp_path / "link").read_text() == "new"


def test_an_error_names_the_file_and_not_its_draft(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "state.json"
    with pytest.raises(FileNotFoundError) as error:
        atomic_files.write(path, "new")
    assert str(error.value) == f"[Errno 2] No such file or directory: '{path}'"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        atomic_files.write(tmp_path / "folder", "new")
    assert error.value.filename == str(tmp_path / "folder") and [*tmp_path.iterdir()] == [tmp_path / "folder"]
