"""What make asks of the machine: `requirements/system` on machines that lack something, by a PATH of few commands and an
apt-get that records its arguments. Nothing is installed here."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures import ROOT

BASE = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
OF_DEBIAN = "import sys; sys.executable = '/usr/bin/python3'\n"
WITHOUT_VENV = "import importlib.util; importlib.util.find_spec = lambda name: None\n"
WITHOUT_HEADERS = "import os; os.path.exists = lambda path: False\n"
OLD = "import sys; sys.version_info = (3, 10, 12)\n"
INSTALL = "apt-get install -y --no-install-recommends"


class Machine:
    """A folder of commands, which is all that PATH names."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.calls = folder / "bin", folder / "calls"
        self.bin.mkdir()
        for name in ("sh", "dirname", "tr", "id", "git", "g++", "bwrap"):
            self.link(name)
        self.python()
        self.user(1000)
        self.apt()

    def link(self, name: str) -> None:
        path = shutil.which(name)
        assert path, f"the tests need {name}"
        (self.bin / name).symlink_to(path)

    def write(self, name: str, script: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def python(self, prelude: str = "") -> None:
        """An interpreter that runs `prelude` before each piece of code."""
        self.write("python3", f'exec {BASE} -c {shlex.quote(prelude)}"$2"')

    def user(self, number: int) -> None:
        self.write("id", f"echo {number}")

    def apt(self, update: int = 0, install: int = 0) -> None:
        """An apt-get with these exit codes, which installs git and bubblewrap."""
        links = "; ".join(
            f'case "$*" in *{package}*) [ -e {self.bin}/{name} ] || {shutil.which("ln")} -s {shutil.which(name)} {self.bin}/{name};; esac'
            for package, name in (("git", "git"), ("bubblewrap", "bwrap"))
        )
        self.write(
            "apt-get",
            f'echo "$*" >> {self.calls}; case "$*" in *update*) exit {update};; esac; [ {install} = 0 ] || exit {install}; {links}',
        )

    def run(self) -> tuple[int, str, list[str]]:
        """The exit code, the text for the user, and the arguments of apt-get's calls."""
        process = subprocess.run(
            [ROOT / "requirements/system", "python3"], env={"PATH": str(self.bin)}, capture_output=True, text=True
        )
        assert process.stdout == ""
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return process.returncode, process.stderr, calls


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_that_has_everything_is_left_alone(machine: Machine) -> None:
    assert machine.run() == (0, "", [])


@pytest.mark.parametrize(
    ("commands", "packages"), [(["bwrap"], "bubblewrap"), (["git", "bwrap"], "git bubblewrap"), (["g++"], "g++")]
)
def test_an_ordinary_user_gets_one_sentence_with_the_command(
    machine: Machine, commands: list[str], packages: str
) -> None:
    for name in commands:
        (machine.bin / name).unlink()
    text = (
        f"requirements/system: this machine lacks {packages}; run 'sudo apt-get update && sudo {INSTALL} {packages}', "
        "then make again\n"
    )
    assert machine.run() == (2, text, [])


@pytest.mark.parametrize("update", [0, 100])
def test_root_has_it_installed_from_fresh_lists_if_there_are_any(machine: Machine, update: int) -> None:
    for name in ("git", "bwrap"):
        (machine.bin / name).unlink()
    machine.user(0)
    machine.apt(update=update)
    code, text, calls = machine.run()
    assert code == 0 and ("goes on with the package lists that are here" in text) == (update > 0)
    assert calls == [
        "-q update",
        "-q -o DPkg::Lock::Timeout=300 install -y --no-install-recommends git bubblewrap",
    ]


def test_root_without_a_network_is_told_what_to_run_later(machine: Machine) -> None:
    (machine.bin / "bwrap").unlink()
    machine.user(0)
    machine.apt(update=100, install=100)
    code, text, calls = machine.run()
    assert code == 2 and len(calls) == 2
    assert text.splitlines()[-1] == (
        "requirements/system: apt could not install bubblewrap, for the reason above; "
        f"run '{INSTALL} bubblewrap' when it can, then make again"
    )


def test_a_package_that_does_not_bring_its_command_is_reported(machine: Machine) -> None:
    (machine.bin / "g++").unlink()  # which this apt-get does not install
    machine.user(0)
    code, text, _ = machine.run()
    assert code == 2 and "apt has installed g++, and make still finds nothing of g++" in text


@pytest.mark.parametrize("user", [0, 1000])
def test_another_distribution_is_told_the_packages(machine: Machine, user: int) -> None:
    for name in ("bwrap", "apt-get"):
        (machine.bin / name).unlink()
    machine.user(user)
    code, text, _ = machine.run()
    assert code == 2 and len(text.splitlines()) == 1
    assert "lacks what Debian calls bubblewrap; install that by this system's package manager" in text


@pytest.mark.parametrize(
    ("prelude", "packages"),
    [
        (OF_DEBIAN + WITHOUT_VENV, f"{VERSION}-venv"),
        (OF_DEBIAN + WITHOUT_HEADERS, f"{VERSION}-dev"),
        (None, "python3 python3-venv python3-dev"),
    ],
)
def test_parts_of_debians_python_are_packages(machine: Machine, prelude: str | None, packages: str) -> None:
    machine.python(prelude or "")
    if prelude is None:
        (machine.bin / "python3").unlink()
    code, text, _ = machine.run()
    assert code == 2 and f"this machine lacks {packages}; run 'sudo apt-get update" in text


@pytest.mark.parametrize(
    ("prelude", "sentence"),
    [
        (OLD, "Python 3.11 or newer is needed, and "),
        (WITHOUT_VENV, f"{BASE} was built without ensurepip or "),
        (WITHOUT_HEADERS, f"{BASE} was built without ensurepip or "),
    ],
)
def test_a_python_that_no_package_completes_is_refused(machine: Machine, prelude: str, sentence: str) -> None:
    """Root too: apt's packages are for Debian's own Python."""
    machine.python(
        prelude
        if "version_info" in prelude
        else f"import sys; sys.executable = {BASE.replace('/usr/bin', '/opt')!r}\n{prelude}"
    )
    machine.user(0)
    code, text, calls = machine.run()
    assert code == 2 and calls == [] and len(text.splitlines()) == 1
    assert sentence.replace("/usr/bin", "/opt") in text and "name another" in text


def test_a_bubblewrap_that_does_not_work_is_refused(machine: Machine) -> None:
    machine.write("bwrap", "echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1")
    code, text, _ = machine.run()
    assert code == 2 and len(text.splitlines()) == 1
    assert text.startswith(
        "requirements/system: the sandbox cannot start: bwrap: setting up uid map: Permission denied; "
    )


@pytest.mark.parametrize(
    "target",
    [
        ".venv/.ready",
        "demo",
        "check",
        "test",
        "tests",
        "soak",
        "test-latest",
        "test-vllm",
        "test-runtimes",
        "test-nemo",
        "test-te",
        "site",
    ],
)
def test_make_looks_at_the_machine_before_it_installs_or_runs_anything(target: str, tmp_path: Path) -> None:
    """By make's list of commands, in a checkout without environments."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copytree(ROOT / "tests/te", tmp_path / "tests/te")
    environment = {"PATH": os.environ["PATH"]}  # without what a make around these tests hands to one inside
    process = subprocess.run(
        ["make", "-n", target], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    commands = process.stdout.splitlines()
    looks = next(n for n, line in enumerate(commands) if line.startswith("requirements/system python3"))
    works = next(n for n, line in enumerate(commands) if line.startswith(("python3", "requirements/install", ".venv")))
    assert looks < works


def test_continuous_integration_is_the_test_command() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in lines if line[:1] != "#"] == ['cd "$(dirname "$0")/.." && exec make test']
