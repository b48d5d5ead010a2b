"""What `atom --help` and `atom COMMAND --help` teach."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.cli.run_commands import status
from pipeline.core.errors import AtomError

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
HERE = [name for name, command in COMMANDS.items() if command.callback.__module__.startswith("pipeline.")]


def test_commands_stand_in_the_order_of_their_use() -> None:
    """Those of the engine first, and then what the registry adds."""
    assert HERE == [
        "init", "validate", "diff", "plan", "run", "submit", "status", "logs", "nodes", "cancel", "retry", "sync",
        "runs", "compare", "watch", "gc",
    ]  # fmt: skip
    assert list(COMMANDS)[: len(HERE)] == HERE and {"simulate-precision", "build", "verify"} < COMMANDS.keys()


def test_help_lists_the_commands_by_who_needs_them() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    titles = re.findall(r"^([A-Z][a-z ]+):$", text, re.MULTILINE)
    assert titles == ["Options", "Plan and run", "Release", "Check", "Data"]
    panels = get_command(app).panels()  # type: ignore[attr-defined]
    assert {"plan", "run"} < set(panels["Plan and run"]) and {"build", "sign", "publish"} < set(panels["Release"])
    assert {"verify", "trace", "replay"} < set(panels["Check"]) and "pin" in panels["Data"]
    assert sorted(name for commands in panels.values() for name in commands) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_one_sentence_that_the_list_shows_whole_and_an_example_that_parses(name: str) -> None:
    command = COMMANDS[name]
    first = command.help.split("\n\n")[0]
    assert first.endswith(".") and first.count(". ") == 0 and command.get_short_help_str(54) == first, first
    (example,) = re.findall(r"^Example: (atom .*)$", command.help, re.MULTILINE)
    words = shlex.split(example)
    assert words[1] == name
    command.make_context(name, words[2:])  # raises for an option or an argument that is none


def test_status_has_one_output() -> None:
    with pytest.raises(AtomError, match=r"^atom status: --watch and --json are different outputs; give one of them"):
        status(watch=True, as_json=True)


@pytest.mark.parametrize("module", ["pipeline.cli", "pipeline.cli.main"])
def test_both_modules_are_the_command(module: str) -> None:
    process = subprocess.run([sys.executable, "-m", module, "no-such-command"], capture_output=True, text=True)
    assert process.returncode == 2 and "no-such-command" in process.stderr
