"""Paths that are not UTF-8: one sentence from every command, whoever states the path, and nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from pipeline.cli import main as command_line
from tests.fixtures import ROOT

BAD = os.fsdecode(b"h\xff")
SHOWN = r"h\udcff"


COMMANDS = sorted(get_command(command_line.app).commands)  # type: ignore[attr-defined]


def refuse(capsys: pytest.CaptureFixture[str], what: str) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    output, sentence = capsys.readouterr()
    assert ended.value.code == 2 and output == ""
    assert sentence.startswith(f"atom: {what} is ") and SHOWN in sentence, sentence
    assert sentence.endswith(", which is not UTF-8; use a path that is\n") and sentence.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_the_argument_and_the_home(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ((f"{tmp_path}/{BAD}/x",), (f"--out={tmp_path}/{BAD}",), ("x", "--cluster", BAD)):
        monkeypatch.setattr(sys, "argv", ["atom", command, *arguments])
        refuse(capsys, "the argument")
    monkeypatch.setattr(sys, "argv", ["atom", command])
    monkeypatch.setenv("ATOM_HOME", f"{tmp_path}/{BAD}")
    refuse(capsys, "$ATOM_HOME")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", command_line.PATH_VARIABLES)
def test_variables_and_links_are_looked_at(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / BAD).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / BAD)
    monkeypatch.setattr(sys, "argv", ["atom", "runs"])
    for value in (f"{tmp_path}/{BAD}", f"{tmp_path}/link", f"{tmp_path}/link/later"):
        monkeypatch.setenv(name, value)
        refuse(capsys, f"${name}")
    monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["atom", "verify", f"{tmp_path}/link"])
    refuse(capsys, "the argument")
    monkeypatch.setattr(sys, "argv", ["atom", "runs"])
    monkeypatch.chdir(tmp_path / BAD)
    refuse(capsys, "the current folder")


@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "POSIX"])
def test_a_real_process_says_so(locale: str, tmp_path: Path) -> None:
    """Whatever the locale; bytes on the command line and in the environment."""
    home = os.fsencode(tmp_path) + b"/h\xff"
    for arguments, variables in (
        ([b"run", b"atom-smoke", b"--until", b"acquire-docstrings"], {b"ATOM_HOME": home}),
        ([b"verify", home], {}),
    ):
        run = subprocess.run(
            [os.fsencode(sys.executable), b"-m", b"pipeline.cli", *arguments], cwd=ROOT, capture_output=True, text=True,
            env={**os.environb, b"LC_ALL": locale.encode(), **variables},
        )  # fmt: skip
        assert run.returncode == 2 and run.stdout == "", run.stderr
        assert run.stderr.startswith("atom: ") and SHOWN in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert not list(tmp_path.iterdir())


def test_names_of_utf8_and_texts_that_are_no_paths_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "häuser 家"))
    monkeypatch.setattr(sys, "argv", ["atom", "runs", "--json"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert not ended.value.code and "UTF-8" not in "".join(capsys.readouterr())
