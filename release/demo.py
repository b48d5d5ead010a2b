"""`atom demo`: the whole pipeline with one command, from raw text to a verified release.

It runs, builds, signs, publishes to a local Hub, pulls back and verifies; every step is a command that a user can run.

On a terminal it is one screen that says what happens, with curves, and what each step proves. Elsewhere it prints the
output of the commands. It needs no account and no network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import AtomError
from pipeline.core.progress import duration, human
from pipeline.core.yaml_text import read_trusted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.core.store import Store
    from pipeline.graph.run import Run

# The namespace on the local Hub, and the token that it takes.
NAMESPACE, TOKEN = "local", "hf_local"
WORDS: dict[str, dict[str, str]] = read_trusted(Path(__file__).with_suffix(".yaml"))
# {command or kind of stage: the words on what it proves}
PROVES, STAGES_PROVE = WORDS["commands"], WORDS["stages"]
# Sealed stages on the screen, and characters of output that are printed with an error.
MOST_STAGES, TAIL = 6, 4000


@dataclass
class Command:
    """One `atom` command of the demo.

    Attributes:
        name: Its words on the screen.
        state: waiting, running, done or failed.
        began: Monotonic time of its start.
        seconds: Its duration, once it has ended.
        output: Its last lines.
    """

    name: str
    state: str = "waiting"
    began: float = 0.0
    seconds: float = 0.0
    output: deque[str] = field(default_factory=lambda: deque(maxlen=400))


class Screen:
    """The live screen. Without a terminal, it prints each command with its output. If it is quiet, it shows nothing.

    Attributes:
        recipe: The name of the recipe.
        store: The store of the runs, whose latest run is shown.
        quiet: True if nothing is shown.
        commands: The commands of the demo, in order.
    """

    def __init__(self, recipe: str, store: Store, quiet: bool) -> None:
        from rich.console import Console
        from rich.live import Live

        self.recipe, self.store, self.quiet = recipe, store, quiet
        self.commands = [Command(name) for name in PROVES]
        self._earlier_run: str | None = None
        self._console = Console()
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal and not quiet
        self._display = Live(console=self._console, get_renderable=self._render, refresh_per_second=2, transient=False)

    def __enter__(self) -> Screen:
        if self._is_live:
            self._display.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_live:
            self._display.stop()

    def run(self, *arguments: str, **environment: str) -> None:
        """Runs a command to its end. Exits with its code, and the end of its output, if it fails."""
        name = "verify --deep" if "--deep" in arguments else arguments[0]
        command = next(command for command in self.commands if command.name == name)
        prints = not self._is_live and not self.quiet
        if prints:
            print(f"\n$ atom {' '.join(arguments)}", flush=True)
        if name == "run":
            earlier = self._latest_run()
            self._earlier_run = earlier.id if earlier else None
        command.state, command.began = "running", time.monotonic()
        # Not `atom` from PATH, which can be another installation.
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )
        assert process.stdout is not None
        for line in process.stdout:
            command.output.append(line)
            if prints:
                print(line, end="", flush=True)
        code = process.wait()
        command.seconds = time.monotonic() - command.began
        command.state = "failed" if code else "done"
        if code:
            # The screen must be gone before the output is printed below it.
            self.__exit__()
            if not prints:
                print("".join(command.output)[-TAIL:], end="", file=sys.stderr)
            sys.exit(code)

    def _latest_run(self) -> Run | None:
        from pipeline.graph import run as runs

        try:
            return runs.find(self.store, None)
        except AtomError:  # there is none
            return None

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
            if command.state == "running" and command.name == "run":
                lines += self._stages()
            elif command.state == "running":
                # Programs end with empty lines. A copy, since another thread appends lines.
                last = next((line for line in reversed(command.output.copy()) if line.strip()), "")
                lines.append(Text(f"    {last.rstrip()}", style="dim"))
        for line in lines:
            line.truncate(self._console.width - 1, overflow="ellipsis")
        return Group(*lines)

    def _stages(self) -> list[Any]:
        """Returns lines on the stages that run, with their curves, and on the last ones that were sealed."""
        from rich.text import Text

        from pipeline.tracking import status

        run = self._latest_run()
        # Until the command has begun its run, the latest one is of an earlier demo.
        if run is None or run.id == self._earlier_run:
            return []
        current = status.take(run, self.store)
        sealed = [stage for stage in current.stages if stage.status.state == "sealed"]
        lines = [Text(), Text(f"    {len(sealed)} of {len(current.stages)} stages sealed")]
        running = [stage for stage in current.stages if stage.status.state == "running"]
        for stage in (*sealed[-MOST_STAGES:], *running):
            mark, color = ("▸", "yellow") if stage in running else ("✓", "green")
            name = stage.status.name
            proof = STAGES_PROVE.get(name) or STAGES_PROVE.get(name.split("-")[0], "")
            lines.append(Text.assemble((f"    {mark} ", color), f"{name:<22}", (proof, "dim")))
            if stage not in running:
                continue
            # At most three curves of a stage, so that all stages fit on the screen.
            for name in stage.names()[:3]:
                assert stage.curves is not None
                means = [mean for _, mean, _, _ in stage.curves.points(name)]
                lines.append(Text(f"      {name[:20]:<20}{human(means[-1]):>8}  {status.sparkline(means, 36)}"))
        return [*lines, Text()]


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
        screen.run("run", recipe)
        screen.run("build", recipe)
        # A second demo signs with the same key, so its fingerprint stays.
        key = store.home / "keys" / "demo.pem"
        if not key.exists():
            signing.make_key(key)
        screen.run("sign", str(release), "--key", str(key))
        fingerprint = signing.fingerprint(signing.SigningKey(key).public_key())
        screen.run("verify", "--deep", str(release), "--key", fingerprint)

        shutil.rmtree(hub, ignore_errors=True)  # a Hub keeps a version forever, and the demo may build it again
        with running(hub, NAMESPACE, TOKEN) as endpoint:
            environment = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN}
            screen.run("publish", str(release), "--to", NAMESPACE, **environment)
            screen.run("verify", repository, "--key", fingerprint, **environment)
    summary(release, hub, time.monotonic() - started)


def summary(release: Path, hub: Path, seconds: float) -> None:
    """Prints the page of the release, its places, and four things to try."""
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
        f"  atom chat {path}\n"
        "      talk to the model, which suggests problems\n"
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
