"""Lock files: what `atom pin` writes is read back, and a damaged one is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import RecipeError
from stages.data.acquire import hub_files
from stages.data.acquire.hub_files import LockedFile, LockedSource

SHA256, GIT = "sha256:" + "a" * 64, "git:" + "0" * 40
SOURCE = {"repo": "a/b", "requested": "main", "revision": "1" * 40, "pattern": '*.jsonl "x"\\'}


def locked(*lines: str) -> LockedSource:
    return LockedSource(**SOURCE, files="".join(f"{line}\n" for line in lines))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "x.lock.yaml"
    sources = {
        "web": locked(f"{SHA256} 5 b/c d.jsonl", f"{GIT} 0 a: {{é}} # .jsonl", f"{GIT} 1 - x"),
        "null_1": locked(f"{SHA256} 9007199254740991 x"),
    }
    hub_files.write(path, sources)
    assert hub_files.read(path) == sources
    assert sources["web"].rows() == [
        LockedFile("- x", 1, GIT),
        LockedFile("a: {é} # .jsonl", 0, GIT),
        LockedFile("b/c d.jsonl", 5, SHA256),
    ]
    hub_files.write(path, {"web": locked(f"{SHA256} 6 x")})
    assert list(hub_files.read(path)) == ["web"] and [p.name for p in tmp_path.iterdir()] == ["x.lock.yaml"]
    assert hub_files.read(tmp_path / "none.lock.yaml") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a mapping of sections"),
        ("- web", "must be a mapping of sections"),
        ("sources: 5\n...\n", "sources"),
        ("sources: {}\n", "so it is cut short"),
        ("sources: [", "lock file x.lock.yaml: line 2 is not valid YAML"),
        ("sources: {web: {repo: a/b}}", "requested"),
        (
            f"sources: {{web: {{repo: a/b, requested: main, revision: '{'1' * 39}', pattern: x, files: ''}}}}",
            "40 hex digits",
        ),
        *(
            (
                f"sources: {{web: {{repo: a/b, requested: main, revision: '{'1' * 40}', pattern: x, files: '{line}'}}}}",
                "is no line of digest, bytes and path",
            )
            for line in (
                f"{SHA256} 5",
                f"{SHA256} -5 x",
                f"{SHA256} 5 ../x",
                f"{SHA256[:-1]} 5 x",
                f"md5:{'0' * 32} 5 x",
            )
        ),
    ],
)
def test_a_damaged_lock_file(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.lock.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        hub_files.read(path)
    message = str(caught.value)
    assert words in message and "\n" not in message
    assert message.endswith("; restore it, or remove it and pin anew by `atom pin RECIPE`")


def test_a_lock_file_that_is_cut_anywhere_is_damaged(tmp_path: Path) -> None:
    """Also where the rest is YAML of fewer sources or files, or of the beginning of a path."""
    path = tmp_path / "x.lock.yaml"
    hub_files.write(path, {"web": locked(f"{SHA256} 5 b/c d.jsonl", f"{GIT} 0 a"), "z": locked(f"{GIT} 1 x")})
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(RecipeError, match=r"restore it, or remove it"):
            hub_files.read(path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be written .*; copy the data recipe to a folder of yours"):
        hub_files.write(tmp_path / "none" / "x.lock.yaml", {"web": locked(f"{SHA256} 6 x")})


def test_digests_of_git(tmp_path: Path) -> None:
    """The id of a blob is git's own: that of "hello\\n", from `git hash-object`."""
    (tmp_path / "x").write_text("hello\n")
    assert LockedFile("x", 6, GIT).digest_of(tmp_path / "x") == "git:ce013625030ba8dba906f756967f9e9ca394464a"
