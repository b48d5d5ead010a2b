"""Damage drawn at random: a flipped byte, two files in each other's place, a table or weights cut short."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from release import signing
from release.layout import SIGNATURE
from release.signing import Trust
from tests.fixtures.audit_fixtures import verify
from tests.fixtures.release_fixtures import resum
from tests.fixtures.run_fixtures import SOAK
from tests.fixtures.signing_fixtures import signed, signer  # noqa: F401 - fixtures

FLIPS, SWAPS = (1000, 200) if SOAK else (20, 6)


@pytest.fixture
def release(signed: Path, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(signed, tmp_path / signed.name))


def problems(folder: Path, trust: Trust = Trust(), deep: bool = False) -> str:  # noqa: B008
    """All that is wrong, in one text."""
    return "\n".join(text for check in verify(folder, deep, trust=trust).checks for text in check.wrong)


def names(release: Path) -> list[str]:
    """Every file, signatures and their keys too."""
    return sorted(path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file())


@pytest.mark.timeout(3600)
def test_a_flipped_byte_anywhere_is_reported(release: Path, signer: signing.SigningKey) -> None:  # noqa: F811
    """Twenty here, a thousand by `make soak`: half of them in files drawn alike, half in bytes drawn alike."""
    ours, draw = Trust(signing.fingerprint(signer.public_key())), random.Random(1)
    files = names(release)
    sizes = [(release / name).stat().st_size for name in files]
    unseen = []
    for number in range(FLIPS):
        (name,) = draw.choices(files, sizes if number % 2 else [size > 0 for size in sizes])
        before = (release / name).read_bytes()
        at, by = draw.randrange(len(before)), draw.randrange(1, 256)
        (release / name).write_bytes(before[:at] + bytes([before[at] ^ by]) + before[at + 1 :])
        if name not in problems(release, ours):
            unseen.append((name, at, by))
        (release / name).write_bytes(before)
    assert not unseen, f"{len(unseen)} of {FLIPS} were not reported"
    assert problems(release, ours) == ""


@pytest.mark.timeout(3600)
def test_two_files_in_each_others_place_are_reported(release: Path) -> None:
    draw, files = random.Random(2), names(release)
    for _ in range(SWAPS):
        one = draw.choice(files)
        alike = [name for name in files if Path(name).suffix == Path(one).suffix]
        content = (release / one).read_bytes()
        others = [name for name in alike if (release / name).read_bytes() != content]
        if not others:
            continue
        other = draw.choice(others)
        (release / one).write_bytes((release / other).read_bytes())
        (release / other).write_bytes(content)
        wrong = problems(release)
        if Path(one).name == SIGNATURE:  # sound, but about other files, and those are named
            assert "was altered after signing" in wrong
        else:
            assert one in wrong and other in wrong, (one, other, wrong)
        (release / other).write_bytes((release / one).read_bytes())
        (release / one).write_bytes(content)
    assert problems(release) == ""


def cut(path: Path) -> bytes:
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    return before


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_tables_and_weights_that_are_cut_short_are_reported(suffix: str, copy: Path) -> None:
    files = [name for name in names(copy) if name.endswith(suffix)]
    assert len(files) > 8
    for name in files:
        before = cut(copy / name)
        assert f"{name} is altered" in problems(copy)
        (copy / name).write_bytes(before)
    for name in files:  # and with all checksums made anew, all of them at once
        cut(copy / name)
    resum(copy)
    wrong = problems(copy)
    assert all(f"{name} cannot be read as Parquet" in wrong or f"{name}: " in wrong for name in files), wrong


@pytest.mark.parametrize(
    "place, pattern", [("dataset", "*.parquet"), ("checkpoints/midtrain-step-2", "*.safetensors")], ids=str
)
def test_they_are_reported_in_a_repository_alone_whose_checksums_were_made_anew(
    place: str, pattern: str, copy: Path
) -> None:
    for path in sorted((copy / place).rglob(pattern)):
        before = cut(path)
        resum(copy)
        assert path.relative_to(copy / place).as_posix() in problems(copy / place, deep=True), path
        path.write_bytes(before)
    resum(copy)
    assert problems(copy / place, deep=True) == ""
