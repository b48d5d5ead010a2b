"""`atom show`, `atom verify` and `atom demo` on a terminal of 80 columns, without color, in a pipe, and quiet."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

from bench import record
from tests.fixtures.run_fixtures import UNTRACKED, at_length, atom

COLUMNS = 80
COLOR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")


def on_terminal(home: Path, *arguments: str, **environment: str) -> tuple[int, str, list[str]]:
    """(exit code, what the command sent, the rows of a high terminal of 80 columns in the end) of an `atom` command."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", record.ROWS, COLUMNS, 0, 0))
    names = ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *arguments], stdin=terminal, stdout=terminal, stderr=terminal,
        env={**plain, **UNTRACKED, "ATOM_HOME": str(home), "TERM": "xterm-256color", **environment}, close_fds=True,
    )  # fmt: skip
    os.close(terminal)
    text = ""
    while part := record._read(main):
        text += part
    os.close(main)
    screen = record.Terminal()
    screen.feed(text)
    return process.wait(), text, ["".join(part for _, part in row).rstrip() for row in screen.shown(record.ROWS)]


def test_show_is_the_same_page_on_a_terminal_and_in_a_pipe(built: Path, tmp_path: Path) -> None:
    piped = atom(tmp_path, "show", str(built)).stdout
    assert "\x1b" not in piped and max(map(len, piped.splitlines())) <= COLUMNS
    code, text, _ = on_terminal(tmp_path, "show", str(built), NO_COLOR="1")
    assert code == 0 and not COLOR.search(text)
    assert text.replace("\r\n", "\n") == piped, "a terminal of 80 columns gets the page of a pipe"


def test_verify_shows_one_line_of_progress_and_then_the_verdict(built: Path, tmp_path: Path) -> None:
    code, text, shown = on_terminal(tmp_path, "verify", str(built), NO_COLOR="1")
    assert code == 0 and not COLOR.search(text)
    drawn = re.findall(r"\r\x1b\[2K([^\r\n]+)", text)
    assert len(drawn) > 5 and max(map(len, drawn)) < COLUMNS, "progress is one line, drawn again"
    assert shown[-1].startswith(f"release {built}: verified; it is not signed: ") and not any(
        "\x1b" in line for line in shown
    )
    quiet = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "verify", "--quiet", str(built)],
        env={**os.environ, **UNTRACKED, "ATOM_HOME": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert quiet.stderr == "" and len(quiet.stdout.splitlines()) == 2
    assert re.match(r"\d+ of \d+ checks hold, .*SHA256SUMS is sha256:[0-9a-f]{64}\n", quiet.stdout)


@at_length("release", 90)
def test_the_demo_in_80_columns_without_color_and_quiet(smoke_home: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(smoke_home, home)
    code, text, shown = on_terminal(home, "demo", "atom-smoke", NO_COLOR="1")
    assert code == 0, "\n".join(shown)
    assert not COLOR.search(text)
    assert max(len(line) for line in shown if str(home) not in line) <= COLUMNS, "only a path is wider"
    assert sum(line.startswith("✓ atom ") for line in shown) == 6 and "What to try next" in shown
    process = atom(home, "demo", "atom-smoke", "--quiet")
    assert process.stderr == "" and "\x1b" not in process.stdout and "$ atom" not in process.stdout
    assert process.stdout.count("What to try next") == 1
