"""Archives of packages: what is read of them, and what hostile and damaged ones give."""

from __future__ import annotations

import gzip
import lzma
import tarfile
from pathlib import Path

import pytest

from stages.data.acquire.packages import archives
from stages.data.acquire.packages.archives import ArchiveError, Member, gunzip, members
from tests.fixtures.package_fixtures import Files, ar_of, deb_of, member, sdist_of, tar_of

NOTES: Files = {"usr/share/doc/a/one.txt": "one", "usr/bin/a": b"\x7fELF", "usr/share/doc/a/two.txt": "two" * 1000}


def read(folder: Path, content: bytes, name: str = "a_1_all.deb") -> list[Member]:
    path = folder / name
    path.write_bytes(content)
    return list(members(path, lambda path: path.endswith(".txt")))


def read_until_error(folder: Path, content: bytes, name: str = "a_1_all.deb") -> tuple[list[Member], str]:
    """What was read before the package could not be read, and why."""
    path, members_read = folder / name, []
    path.write_bytes(content)
    with pytest.raises(ArchiveError) as error:
        members_read += members(path, lambda path: path.endswith(".txt"))
    return members_read, str(error.value)


@pytest.mark.parametrize("compression", ["xz", "zst"])
def test_members_of_a_deb(tmp_path: Path, compression: str) -> None:
    members_read = read(tmp_path, deb_of(NOTES, compression))
    assert members_read == [Member("usr/share/doc/a/one.txt", b"one"), Member("usr/share/doc/a/two.txt", b"two" * 1000)]


def test_members_of_a_source_distribution(tmp_path: Path) -> None:
    members_read = read(tmp_path, sdist_of("a-1.0", {"a.py": "1", "docs/b.txt": "b"}), "a-1.0.tar.gz")
    assert members_read == [Member("a-1.0/docs/b.txt", b"b")]


def test_links_and_devices_are_no_members(tmp_path: Path) -> None:
    entries: Files = {
        "1": member("./a.txt", tarfile.SYMTYPE, "/etc/passwd"), "2": member("./b.txt", tarfile.LNKTYPE, "../../b.txt"),
        "3": member("./c.txt", tarfile.CHRTYPE), "4": member("./d.txt", tarfile.FIFOTYPE), "e.txt": "e",
    }  # fmt: skip
    assert read(tmp_path, deb_of(entries)) == [Member("e.txt", b"e")]


@pytest.mark.parametrize("name", ["../a.txt", "/a.txt", "a/../../b.txt"])
def test_a_path_that_leaves_the_package_is_refused_alone(tmp_path: Path, name: str) -> None:
    content = sdist_of("a-1.0", {"b.txt": "b"})
    packed = gzip.compress(tar_of({name: "x"})[:1024] + gzip.decompress(content))
    members_read = read(tmp_path, packed, "a-1.0.tar.gz")
    assert members_read == [Member(name, None, "its path leaves the package"), Member("a-1.0/b.txt", b"b")]


def test_a_member_of_too_many_bytes_is_refused_alone(tmp_path: Path) -> None:
    size = archives.MAX_MEMBER + 1
    members_read = read(tmp_path, deb_of({"big.txt": bytes(size), "small.txt": "small"}, "zst"))
    problem = f"it has {size} bytes; at most {archives.MAX_MEMBER} are read"
    assert members_read == [Member("big.txt", None, problem), Member("small.txt", b"small")]


def test_a_member_that_claims_more_than_there_is(tmp_path: Path) -> None:
    claims: Files = {"a.txt": "a", "1": member("./b.txt", tarfile.REGTYPE, size=10_000_000), "c.txt": "c"}
    members_read, problem = read_until_error(tmp_path, deb_of(claims))
    assert [member.path for member in members_read] == ["a.txt"] and problem.startswith("it is cut short or corrupt")
    huge: Files = {"a.txt": "a", "1": member("./b.bin", tarfile.REGTYPE, size=2**50)}
    members_read, problem = read_until_error(tmp_path, deb_of(huge))
    assert [member.path for member in members_read] == ["a.txt"]
    assert problem == f"it unpacks to more than {archives.MAX_UNPACKED} bytes"


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """tarfile reads an extended header as a whole."""
    header = member("a", tarfile.XHDTYPE, size=2**32).tobuf(tarfile.USTAR_FORMAT)
    _, problem = read_until_error(tmp_path, gzip.compress(header + bytes(10_000)), "a-1.0.tar.gz")
    assert "a header of 4294967296 bytes" in problem


def test_nested_headers_are_no_traceback(tmp_path: Path) -> None:
    header = member("a", tarfile.XHDTYPE, size=0).tobuf(tarfile.USTAR_FORMAT)
    _, problem = read_until_error(tmp_path, gzip.compress(header * 5000), "a-1.0.tar.gz")
    assert problem.startswith("it is ")


def test_a_bomb_is_read_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_UNPACKED", 10**6)
    entries: Files = {"a.txt": "a", **{f"{n}.bin": bytes(300_000) for n in range(5)}, "z.txt": "z"}
    members_read, problem = read_until_error(tmp_path, deb_of(entries))
    assert [member.path for member in members_read] == ["a.txt"] and problem == "it unpacks to more than 1000000 bytes"
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    members_read, problem = read_until_error(tmp_path, deb_of({f"{n}.txt": "" for n in range(5)}))
    assert len(members_read) == 3 and problem == "it has more than 3 members"


@pytest.mark.parametrize("compression", ["xz", "zst"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99])
def test_a_deb_that_is_cut_short(tmp_path: Path, compression: str, share: float) -> None:
    content = deb_of({f"{n}.txt": f"{n**n}" for n in range(300)}, compression)
    members_read, problem = read_until_error(tmp_path, content[: int(len(content) * share)])
    assert len(members_read) < 300 and problem.startswith(
        ("it is no package, or cut short", "it is cut short or corrupt")
    )


def test_damaged_bytes_are_no_traceback(tmp_path: Path) -> None:
    for compression in ("xz", "zst"):
        content = deb_of(NOTES, compression)
        for position in range(8, len(content), 7):
            damaged = content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]
            path = tmp_path / "a_1_all.deb"
            path.write_bytes(damaged)
            try:
                members_read = list(members(path, lambda path: path.endswith(".txt")))
            except ArchiveError:
                continue
            assert len(members_read) <= 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "does not begin as an ar archive"),
        (b"PK\x03\x04", "does not begin as an ar archive"),
        (ar_of({"debian-binary": b"2.0\n"}), "it has no data.tar"),
        (ar_of({"data.tar.bz2": b"BZh9"}), "data.tar.bz2 has an unknown compression"),
        (ar_of({"data.tar.xz": b"no xz"}), "format not supported"),
        (ar_of({"data.tar.xz": lzma.compress(b"no tar" * 1000)}), "invalid header"),
    ],
)
def test_what_is_no_package(tmp_path: Path, content: bytes, words: str) -> None:
    members_read, problem = read_until_error(tmp_path, content)
    assert members_read == [] and words in problem and "\n" not in problem


def test_names_are_printable(tmp_path: Path) -> None:
    (only,) = read(tmp_path, deb_of({"a\n\x1b[31m.txt": "a"}))
    assert only.path == r"a\n\x1b[31m.txt"


def test_gzip_members() -> None:
    assert gunzip(gzip.compress(b"text")) == b"text"
    with pytest.raises(ArchiveError, match="unpacks to more than"):
        gunzip(gzip.compress(bytes(archives.MAX_MEMBER + 1)))
    with pytest.raises(ArchiveError, match="cut short"):
        gunzip(gzip.compress(b"text" * 1000)[:-10])
    with pytest.raises(ArchiveError, match="not gzip"):
        gunzip(b"text")
