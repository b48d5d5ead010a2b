"""Record a command in a terminal of 80 columns as an animated SVG for the README.

    python bench/record.py docs/terminal.svg -- atom demo atom-smoke
    python bench/record.py docs/terminal.svg --cast FILE

The recording is an asciicast of version 2, next to the SVG while the command runs; --cast draws an earlier one. The
picture shows what the terminal showed, with pauses cut to two seconds; a reader who wants no motion sees its end.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Iterable, Iterator
from html import escape
from itertools import pairwise
from pathlib import Path

COLUMNS, ROWS, VISIBLE = 80, 200, 44
"""Of the terminal, which is high so that nothing scrolls away; VISIBLE rows are drawn, the last of the filled ones."""
LONGEST_PAUSE, FRAMES = 2.0, 24
CHARACTER, LINE, MARGIN = 8.0, 18, 14
"""Pixels."""
COLORS = {"1": "#f0f6fc", "2": "#8b949e", "31": "#ff7b72", "32": "#7ee787", "33": "#e3b341"}
PLAIN, BACKGROUND = "#c9d1d9", "#0d1117"
CODE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)|\x1b")
Row = list[tuple[str, str]]
Shown = tuple[tuple[tuple[str, str], ...], ...]
"""Rows, each as (color, text) of its parts."""


class Terminal:
    """What a terminal shows of text with line feeds, carriage returns, colors, and codes that move up or erase."""

    def __init__(self) -> None:
        self.rows: list[Row] = [[]]
        self.row = self.column = 0
        self.color = PLAIN

    def feed(self, text: str) -> None:
        for parameters, code, control, characters in (match.groups() for match in CODE.finditer(text)):
            if control == "\r":
                self.column = 0
            elif control == "\n":
                self.row += 1
                self.rows += [[]] * (self.row == len(self.rows))
                self.rows[self.row] = list(self.rows[self.row])
            elif characters:
                self._write(characters)
            elif code == "A":
                self.row = max(0, self.row - int(parameters or 1))
            elif code == "K":
                self.rows[self.row] = [] if parameters == "2" else self.rows[self.row][: self.column]
            elif code == "m":
                last = parameters.split(";")[-1]
                self.color = COLORS.get(last, PLAIN)

    def _write(self, characters: str) -> None:
        row = self.rows[self.row]
        row += [(" ", PLAIN)] * (self.column - len(row))
        row[self.column : self.column + len(characters)] = [(character, self.color) for character in characters]
        self.column += len(characters)

    def shown(self, most: int = VISIBLE) -> Shown:
        """The last rows that are filled, so many at most."""
        filled = len(self.rows)
        while filled and not any(character.strip() for character, _ in self.rows[filled - 1]):
            filled -= 1
        return tuple(_parts(row) for row in self.rows[max(0, filled - most) : filled])


def _parts(row: Row) -> tuple[tuple[str, str], ...]:
    parts: list[tuple[str, str]] = []
    for character, color in row:
        if parts and parts[-1][0] == color:
            parts[-1] = (color, parts[-1][1] + character)
        else:
            parts.append((color, character))
    return tuple(parts)


def record(command: list[str], cast: Path) -> int:
    """Runs a command in a terminal and writes what it shows, with times. Returns its exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    begin = time.monotonic()
    with cast.open("w") as file:
        head = {"version": 2, "width": COLUMNS, "height": ROWS, "title": " ".join(command)}
        print(json.dumps(head), file=file)
        while data := _read(terminal):
            print(json.dumps([round(time.monotonic() - begin, 2), "o", data]), file=file, flush=True)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode("utf-8", "replace")
    except OSError:  # the command has closed the terminal
        return ""


def frames(
    events: Iterable[tuple[float, str]], title: str
) -> Iterator[tuple[float, tuple[tuple[tuple[str, str], ...], ...]]]:
    """(seconds that it stays, rows) of each distinct screen, FRAMES of them at most."""
    terminal = Terminal()
    terminal.feed(f"$ {title}\r\n\r\n")
    screens = [(0.0, terminal.shown())]
    for at, text in events:
        terminal.feed(text.replace(f"{Path.cwd()}/", ""))  # paths as a reader has them
        if (screen := terminal.shown()) != screens[-1][1]:
            screens.append((at, screen))
    step = max(1, -(-(len(screens) - 1) // (FRAMES - 1)))
    kept = [*screens[:-1:step], screens[-1]]
    for (at, screen), (following, _) in pairwise(kept):
        yield min(max(following - at, 0.4), LONGEST_PAUSE), screen
    yield 3 * LONGEST_PAUSE, kept[-1][1]


def draw(events: Iterable[tuple[float, str]], title: str) -> str:
    """The SVG."""
    timed = list(frames(events, title))
    total, height = sum(seconds for seconds, _ in timed), max(len(rows) for _, rows in timed)
    width = round(COLUMNS * CHARACTER) + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * LINE + 2 * MARGIN}" role="img">',
        f"<title>A terminal runs {escape(title)}</title>",
        "<style>text{font:13.3px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}",
        f".f{{visibility:hidden;animation:{total:.1f}s steps(1) infinite}}",
    ]
    begin = 0.0
    for number, (seconds, _) in enumerate(timed):
        start, end = 100 * begin / total, 100 * (begin + seconds) / total
        hidden = "0%{visibility:hidden}" if number else ""
        after = "" if number == len(timed) - 1 else f"{end:.2f}%{{visibility:hidden}}"
        lines.append(f"@keyframes k{number}{{{hidden}{start:.2f}%{{visibility:visible}}{after}}}")
        lines.append(f".k{number}{{animation-name:k{number}}}")
        begin += seconds
    lines += [
        f"@media(prefers-reduced-motion){{.f{{animation:none}}.k{len(timed) - 1}{{visibility:visible}}}}</style>",
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
    ]
    for number, (_, rows) in enumerate(timed):
        lines.append(f'<g class="f k{number}">')
        lines += [_line(n, row) for n, row in enumerate(rows) if row]
        lines.append("</g>")
    return "\n".join([*lines, "</svg>"]) + "\n"


def _line(number: int, row: tuple[tuple[str, str], ...]) -> str:
    parts = "".join(f'<tspan fill="{color}">{escape(text, quote=False)}</tspan>' for color, text in row)
    return f'<text x="{MARGIN}" y="{MARGIN + LINE * (number + 0.75):.1f}" xml:space="preserve">{parts}</text>'


def main(arguments: list[str]) -> int:
    if len(arguments) < 3 or arguments[1] not in ("--", "--cast"):
        print((__doc__ or "").split("\n\n")[1], file=sys.stderr)
        return 2
    target = Path(arguments[0])
    cast, code = target.with_suffix(".cast"), 0
    if arguments[1] == "--":
        code = record(arguments[2:], cast)
    else:
        cast = Path(arguments[2])
    head, *rows = (json.loads(line) for line in cast.read_text().splitlines())
    target.write_text(draw([(at, text) for at, _, text in rows], head["title"]))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
