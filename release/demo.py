"""`atom demo`: the whole pipeline with one command, from raw text to a verified release.

It runs, builds, signs, publishes to a local Hub, pulls back and verifies; every step is a command that a user can run.

On a terminal it is one screen that says what happens, with curves, and what each step proves. Elsewhere it prints the
output of the commands. It needs no account and no network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.core.errors import AtomError
from pipeline.core.progress import duration, human

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.core.store import Store
    from pipeline.graph.run import Run

# The namespace on the local Hub, and the token that it takes.
NAMESPACE, TOKEN = "local", "hf_local"
WORDS: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
# {command or kind of stage: the words on what it proves}
PROVES, STAGES_PROVE = WORDS["commands"], WORDS["stages"]
# Sealed stages on the screen, and characters of output that are printed with an error.
MOST_STAGES, TAIL = 6, 4000


@dataclass
class Command:
    """One `atom` command of the demo.

    Attributes:
        arguments: Its arguments, the name of the command first.
        state: waiting, running, done or failed.
        began: Monotonic time of its start.
        seconds: Its duration, once it has ended.
        output: Its last lines.
    """

    arguments: tuple[str, ...]
    state: str = "waiting"
    began: float = 0.0
    seconds: float = 0.0
    output: deque[str] = field(default_factory=lambda: deque(maxlen=400))

    @property
    def name(self) -> str:
        return f"{self.arguments[0]} --deep" if "--deep" in self.arguments else self.arguments[0]


class Screen:
    """The live screen. Without a terminal, it prints each command with its output. If it is quiet, it shows nothing.

    Attributes:
        recipe: The name of the recipe.
        store: The store of the runs, whose latest run is shown.
        quiet: True if nothing is shown.
        console: The terminal.
        live: True if the screen is drawn: on a terminal, unless it is quiet.
        commands: The commands of the demo, in order.
        note: What happens between two commands; "" if nothing is to be said.
    """

    def __init__(self, recipe: str, store: Store, quiet: bool) -> None:
        from rich.console import Console
        from rich.live import Live

        self.recipe, self.store, self.quiet = recipe, store, quiet
        self.console = Console()
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal and not quiet
        self.commands: list[Command] = []
        self.note = ""
        self._run: Run | None = None
        self._display = Live(console=self.console, get_renderable=self._render, refresh_per_second=2, transient=False)

    def __enter__(self) -> Screen:
        if self.live:
            self._display.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self._display.stop()

    def say(self, text: str) -> None:
        """Shows a note on the steps between two commands."""
        self.note = text
        if not self.live and not self.quiet:
            print(f"\n{text}", flush=True)

    def plan(self, *commands: tuple[str, ...]) -> None:
        self.commands += [Command(arguments) for arguments in commands]

    def start(self, *arguments: str, **environment: str) -> Running:
        """Starts the next waiting command of that name, with its last arguments now known."""
        # The plan has the commands before all of their arguments are known.
        name = Command(arguments).name
        command = next(planned for planned in self.commands if planned.state == "waiting" and planned.name == name)
        command.arguments, command.state, command.began = arguments, "running", time.monotonic()
        return Running(self, command, environment)

    def run(self, *arguments: str, **environment: str) -> None:
        """Runs a command to its end. Exits with its code if it fails."""
        self.start(*arguments, **environment).wait()

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        title = f"atom demo: {self.recipe}, from raw text to a release that anybody can verify"
        lines = [Text(title, style="bold"), Text()]
        marks = {"waiting": ("·", "dim"), "running": ("▸", "yellow"), "done": ("✓", "green"), "failed": ("✗", "red")}
        for command in self.commands:
            mark, style = marks[command.state]
            seconds = time.monotonic() - command.began if command.state == "running" else command.seconds
            clock = duration(seconds) if command.state != "waiting" else ""
            words = f"atom {command.name:<14}{clock:>6}  "
            lines.append(Text.assemble((f"{mark} ", style), words, (PROVES[command.name], "dim")))
            if command.state == "running":
                lines += self._stages() if command.name == "run" else self._last_line(command)
        if self.note:
            lines += [Text(), Text(self.note, style="dim")]
        for line in lines:
            line.truncate(self.console.width - 1, overflow="ellipsis")
        return Group(*lines)

    def _last_line(self, command: Command) -> list[Any]:
        from rich.text import Text

        # Programs end with empty lines. A copy, since another thread appends lines.
        text = next((line for line in reversed(command.output.copy()) if line.strip()), "")
        return [Text(f"    {text.rstrip()}", style="dim")]

    def _stages(self) -> list[Any]:
        """Returns lines on the stages that run, with their curves, and on the last ones that were sealed."""
        from rich.text import Text

        from pipeline.graph import run as runs
        from pipeline.tracking import status

        lines = [Text()]
        try:
            # The newest run of the store is the one that the demo has just begun.
            self._run = self._run or runs.find(self.store, None)
        except AtomError:  # the command has not begun its run yet
            return lines
        current = status.take(self._run, self.store)
        sealed = [stage for stage in current.stages if stage.status.state == "sealed"]
        lines.append(Text(f"    {len(sealed)} of {len(current.stages)} stages sealed"))
        running = [stage for stage in current.stages if stage.status.state == "running"]
        for stage in (*sealed[-MOST_STAGES:], *running):
            mark, color = ("▸", "yellow") if stage in running else ("✓", "green")
            proof = STAGES_PROVE.get(kind_of(stage.status.name), "")
            lines.append(Text.assemble((f"    {mark} ", color), f"{stage.status.name:<22}", (proof, "dim")))
            if stage not in running:
                continue
            # At most three curves of a stage, so that all stages fit on the screen.
            for name in stage.names()[:3]:
                assert stage.curves is not None
                means = [mean for _, mean, _, _ in stage.curves.points(name)]
                lines.append(Text(f"      {name[:20]:<20}{human(means[-1]):>8}  {status.sparkline(means, 36)}"))
        return [*lines, Text()]


def kind_of(node: str) -> str:
    """Returns the kind of stage of a node, such as `order` for `order-pretrain`."""
    return node if node in STAGES_PROVE else node.split("-")[0]


class Running:
    """A command that runs in parallel to others, until `wait` or the end of the `with` block."""

    def __init__(self, screen: Screen, command: Command, environment: dict[str, str]) -> None:
        self.screen, self.command = screen, command
        self.process = subprocess.Popen(
            # Not `atom` from PATH, which can be another installation.
            [sys.executable, "-m", "pipeline.cli", *command.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )
        # The output is read while the command runs: a full pipe would stop the command.
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        # A command that starts beside another prints its last lines at its end, so that the lines of two do not mix.
        alone = sum(command.state == "running" for command in self.screen.commands) == 1
        prints = not self.screen.live and not self.screen.quiet
        if prints and alone:
            print(f"\n$ atom {' '.join(self.command.arguments)}", flush=True)
        for line in self.process.stdout:
            self.command.output.append(line)
            if prints and alone:
                print(line, end="", flush=True)
        if prints and not alone:
            print(f"\n$ atom {' '.join(self.command.arguments)}\n{''.join(self.command.output)}", end="", flush=True)

    def wait(self) -> None:
        """Waits for the end of the command. Exits with its code, and the end of its output, if it fails."""
        code = self.process.wait()
        # The command can end before its last lines are read.
        self.reader.join()
        self.command.seconds = time.monotonic() - self.command.began
        self.command.state = "failed" if code else "done"
        if code:
            # The screen must be gone before the output is printed below it.
            self.screen.__exit__()
            if self.screen.live or self.screen.quiet:
                print("".join(self.command.output)[-TAIL:], end="", file=sys.stderr)
            sys.exit(code)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            # After an error in the block, the command must not go on in the background.
            self.process.kill()
            self.process.wait()
            return
        self.wait()


def demo(recipe: str, quiet: bool = False) -> None:
    """Runs the demo of a recipe. Exits with the code of the command that fails."""
    import shutil

    from pipeline.core.store import Store, home_folder
    from pipeline.graph import recipe as recipes
    from release import signing
    from release.hub.local.server import running

    started = time.monotonic()
    store = Store(home_folder())
    config = recipes.load(recipe).config
    release = store.home / "releases" / f"{config.name}-{config.version}"
    repository = f"{NAMESPACE}/{config.name}@v{config.version}"
    hub = store.home / "hub"
    with Screen(recipe, store, quiet) as screen:
        screen.plan(("run",), ("build",), ("sign",), ("verify", "--deep"), ("publish",), ("verify",))
        screen.run("run", recipe)
        screen.run("build", recipe)
        # A second demo signs with the same key, so its fingerprint stays.
        key = store.home / "keys" / "demo.pem"
        if not key.exists():
            screen.say(f"made a key for this demo, {_short_path(key)}")
            signing.make_key(key)
        screen.run("sign", str(release), "--key", str(key))
        fingerprint = signing.fingerprint(signing.SigningKey(key).public_key())

        screen.say("a local Hub with the routes of huggingface.co, empty at first")
        shutil.rmtree(hub, ignore_errors=True)  # a Hub keeps a version forever, and the demo may build it again
        with running(hub, NAMESPACE, TOKEN) as endpoint:
            environment = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN}
            publish = screen.start("publish", str(release), "--to", NAMESPACE, **environment)
            # The deep verification only reads the release, so it runs beside the publication.
            with screen.start("verify", "--deep", str(release), "--key", fingerprint):
                # The release is complete on the Hub only when `publish` has ended.
                publish.wait()
                screen.run("verify", repository, "--key", fingerprint, **environment)
        screen.say("")
    summary(release, hub, time.monotonic() - started)


def summary(release: Path, hub: Path, seconds: float) -> None:
    """Prints the page of the release, its places, and three things to try."""
    import shutil

    from release.audit import show
    from release.layout import PAGE
    from release.opened_release import Release

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else show.WIDTH
    print(f"\n{show.text(show.facts_of(Release(release)), width)}\n")
    path = _short_path(release)
    print(f"release       {path}\nlocal Hub     {_short_path(hub)}\nmodel card    {path}/model/README.md")
    print(f"page          {(release / PAGE).resolve().as_uri()}")
    print(f"time          {duration(seconds)}; a second run uses what is sealed")
    print(
        "\nWhat to try next\n"
        f"  atom trace {path} --phase pretrain --step 7\n"
        "      the documents of that training step, with origin and license\n"
        f"  atom replay {path} pretrain\n"
        "      train its last steps again, and compare every tensor\n"
        f"  atom verify {path}\n"
        "      then flip any byte of it, and verify again"
    )


def _short_path(path: Path) -> str:
    """Returns a path below the working folder relative to it, any other in full."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
