"""What the commands show while they work: on a terminal, elsewhere, and quiet."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import record
from pipeline.core.lease import Lease
from pipeline.core.progress import StatusLine
from release import demo
from release.audit import show
from release.checks.verdict import OPEN, CheckResult, Verdict, answer
from release.commands.auditing import _verdict_text
from tests.fixtures import live_fixtures

STEPS = (
    "from pipeline.core.progress import StatusLine\n"
    "with StatusLine() as progress:\n    progress('x' * 300)\n    progress('second')\nprint('result')"
)


def test_progress_is_plain_lines_where_there_is_no_terminal() -> None:
    process = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True)
    assert (process.stdout, process.stderr) == ("result\n", f"{'x' * 300}\nsecond\n")


def test_progress_is_one_line_on_a_terminal_and_leaves_nothing() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="40")
        os.execv(sys.executable, [sys.executable, "-c", STEPS])
    text = ""
    while part := record._read(terminal):
        text += part
    os.waitpid(pid, 0)
    screen = record.Terminal()
    screen.feed(text)
    assert "second" in text and max(len(line) for line in text.split("\x1b[2K")) < 60
    assert ["".join(part for _, part in row) for row in screen.shown()] == ["result"]


def test_quiet_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with StatusLine(quiet=True) as progress:
        progress("step")
    assert capsys.readouterr().err == ""


def test_a_verdict_has_a_sentence_to_quote() -> None:
    checks = [answer("files", []), CheckResult("signatures", None, "not signed")]
    verdict = Verdict("here", "release", False, checks, digest="ab" * 32)
    assert verdict.in_one_sentence() == f"1 of 2 checks hold, 1 skipped, SHA256SUMS is sha256:{'ab' * 32}"
    ending = [verdict.in_one_sentence(), f"release here: {verdict.outcome()}"]
    assert _verdict_text(verdict).splitlines()[-2:] == ending == _verdict_text(verdict, quiet=True).splitlines()
    verdict.checks.append(answer("cards", ["README.md lacks a line"]))
    assert "1 bad (cards)" in verdict.in_one_sentence() and verdict.to_json()["digest"] == "ab" * 32
    assert _verdict_text(verdict, quiet=True).splitlines()[0] == "BAD     cards: README.md lacks a line"


@pytest.mark.parametrize("kind", OPEN)
def test_a_verdict_ends_with_what_only_the_key_can_show(kind: str) -> None:
    verdict = Verdict("here", kind, False, [answer("files", [])])
    assert verdict.outcome().startswith("verified; it is not signed: whether ")
    assert verdict.outcome().endswith("only the maker's key can tell (--key)")
    verdict.signed = True
    assert verdict.outcome().startswith("verified; it is signed, but nothing here says whose key that is: whether ")
    verdict.signer_is_known = True
    assert verdict.outcome() == "verified, and signed by whom you named"
    verdict.retracted = "one document of it taken back on request"
    assert verdict.outcome() == f"retracted: {verdict.retracted}"
    verdict.checks.append(answer("cards", ["README.md lacks a line"]))
    assert verdict.outcome() == "NOT what it claims to be"


def facts(sources: int) -> dict[str, Any]:
    """Of a release with long names and many of everything."""
    figure = {"value": 1.5, "se": 0.25}
    return {
        "title": "A release", "version": "1.0.0", "description": "word " * 60, "commit": None, "dirty": True,
        "license": {"weights": "Apache-2.0", "code": "Apache-2.0"}, "parameters": {"total": 10**12, "active": 10**10},
        "corpus": {
            f"a-source-with-a-rather-long-name-{n}": {"documents_in": 10**9, "kept": 10**9, "tokens": 10**13 - n}
            for n in range(sources)
        },
        "removed": {f"filter/rule_{n}": 10**6 for n in range(40)}, "seen": {"pretrain": {"steps": 10**6, "tokens": 10**13}},
        "models": {name: {"bits_per_byte": figure, "accuracy": figure} for name in ("model-base", "model-online-rlhf", "model")},
        "caveats": [f"- **A reward rose** in phase {n}: {'so much ' * 20}" for n in range(9)],
        "baselines": [f"source-{n}: worse than xz by 0.10 and better than byte 8-grams by 0.20" for n in range(sources)],
        "pass_at_1": {"sft": figure, "online-rlhf": figure}, "checkpoints": [f"pretrain-step-{n}" for n in range(900)],
        "gates": {"a": True, "b": False}, "base": None, "key": None, "identity": None,
        "cost": {"attempts": 9.0, "failed": 1.0, "core_hours": 10.0, "gpu_hours": 1e6, "energy_wh": 1e9},
    }  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 300])
def test_the_page_of_a_release_fits_a_screen(width: int) -> None:
    lines = show.text(facts(sources=50), width).splitlines()
    assert max(map(len, lines)) <= min(width, show.WIDEST) and "\x1b" not in "".join(lines)
    if width == 80:
        assert len(lines) < 70
        assert any(line.split()[:2] == ["42", "others"] for line in lines) and "35 other rules" in " ".join(
            " ".join(lines).split()
        )
        assert "5 more: they begin model/README.md" in "\n".join(
            lines
        ) and "900, the last is pretrain-step-899" in "\n".join(lines)


def test_caveats_stand_before_the_figures_that_they_qualify() -> None:
    text = show.text(facts(sources=2))
    places = [
        text.index(words) for words in ("know before any figure", "A reward rose", "quality", "bits per byte beside")
    ]
    assert places == sorted(places)


def test_the_demo_shows_what_runs_with_curves_and_what_it_proves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    _, store = live_fixtures.make_run(tmp_path, steps=60)
    monkeypatch.setenv("COLUMNS", "80")
    screen = demo.Screen("tiny", store, quiet=True)
    screen.commands[0].state = "running"
    console = Console(width=80, no_color=True)
    lease = Lease.take(store.work("pretrain-0123456789ab"))
    assert lease is not None
    with console.capture() as capture:
        console.print(screen._render())
    lease.release()
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    running = next(line for line in lines if "▸ pretrain" in line)
    assert demo.STAGES_PROVE["pretrain"] in running
    assert any(line.strip().startswith("loss") and "█" in line and "▁" in line for line in lines)
    assert any("· atom verify" in line and demo.PROVES["verify"] in line for line in lines)
    screen._earlier_run = screen._latest_run().id
    assert screen._stages() == [], "the run of an earlier demo"


def test_a_recording_shows_what_the_terminal_showed() -> None:
    terminal = record.Terminal()
    terminal.feed("one\r\n\x1b[32mtwo\x1b[0m\r\n\x1b[1A\x1b[2Kthree <&>\r\n")
    assert ["".join(text for _, text in row) for row in terminal.shown()] == ["one", "three <&>"]
    events = [(0.5 * n, f"step {n}\r\n") for n in range(100)]
    picture = record.draw(events, "atom <x>")
    assert picture == record.draw(events, "atom <x>") and 10 < picture.count("<g class=") <= record.FRAMES
    assert "<script" not in picture and "atom &lt;x&gt;" in picture and "step 99" in picture
