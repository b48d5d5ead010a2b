"""A stage that fails in a given way on one of its ranks while the others hang, and how long its processes then live; or
that shows its environment."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.core.errors import CheckFailed, RecipeError
from pipeline.core.lease import has_exited
from pipeline.core.stage import Config, Inputs, Report, Stage, operational
from pipeline.graph import recipe
from pipeline.graph.dag import Graph, Node

RANKS = 4
PROMISED, LIMIT = 5.0, 30.0
"""Seconds from a failure to the end of the last process: without those in which some process of the machine had to wait
for a processor or a disk, as the kernel counts them; and with them."""
Way = Literal["bug", "check", "user", "kill", "abandon", "collective", "sleep", "environment"]


class Failing(Config):
    """Which rank fails, and how. Before it does, it leaves the file `acted` in `folder`."""

    way: Way = "sleep"
    failing_rank: int = 0
    folder: str = operational("", "where `acted` and the processes' ids are left")
    ranks: int = operational(RANKS, "processes")


def run(config: Failing, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    rank, folder = int(os.environ.get("RANK", "0")), Path(config.folder)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    while len(list(folder.glob("pid-*"))) < config.ranks:
        time.sleep(0.05)
    if config.way == "collective":
        import torch.distributed as dist

        from stages.train.parallel import Layout, session

        with session(0, Layout(ranks=config.ranks)):
            if rank == config.failing_rank:
                act(config, report)
            dist.barrier()
    if config.way == "environment":
        show_environment(folder, out)
        return
    if rank == config.failing_rank:
        act(config, report)
    ctypes.CDLL(None).sleep(600)  # as in a collective that some rank never joins: no signal handler of Python's runs


def act(config: Failing, report: Report) -> None:
    (Path(config.folder) / "acted").touch()
    if config.way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.way in ("bug", "collective"):
        raise KeyError("nobody expects this")
    if config.way == "check":
        raise CheckFailed("the weights that come back are others")
    if config.way == "user":
        raise RecipeError("recipe r: this cannot be")
    if config.way == "abandon":
        threading.Thread(target=report.abandon, args=("no step was finished for 5 s",)).start()


def show_environment(folder: Path, out: Path) -> None:
    """Leaves what this process and a child of it have as environment, and waits with the child for the file `go`."""
    (folder / "stage.environ").write_bytes(Path("/proc/self/environ").read_bytes())
    script = (
        "cat /proc/$$/environ > draft; echo $$ > child; mv draft child.environ; until [ -e go ]; do sleep 0.1; done"
    )
    subprocess.run(["sh", "-c", script], cwd=folder, check=True)
    (out / "seen").touch()


STAGE = Stage("failing", 1, Failing, run, ranks=lambda config: config.ranks, trains=True)


def python_path(folder: Path) -> str:
    """A PYTHONPATH with which any process of ours knows the stage."""
    (folder / "sitecustomize.py").write_text(
        "from pipeline.graph import registry\nregistry.stages()['failing'] = 'verdict_world'\n"
    )
    return f"{folder}:{Path(__file__).parent}"


def graph(folder: Path, way: str, failing_rank: int = 0, ranks: int = RANKS) -> Graph:
    """A graph of that stage alone, named by the way in which it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Failing.model_validate({"way": way, "failing_rank": failing_rank, "folder": str(folder), "ranks": ranks})
    name = f"{way}-{failing_rank}"
    return Graph(recipe.load("atom-smoke"), {name: Node(name, STAGE, config, {}, f"{name}-0123456789ab")})


def waited() -> float:
    """Seconds since the machine was started in which some process had to wait for a processor or a disk. Where the kernel
    does not count them (/proc/pressure), all of them."""
    try:
        lines = [Path(f"/proc/pressure/{name}").read_text().splitlines()[0] for name in ("cpu", "io")]
        return sum(int(line.rpartition("total=")[2]) for line in lines) / 1e6
    except OSError:
        return time.monotonic()


@dataclass(frozen=True)
class End:
    """When the last process of a launch was seen gone, and (time, `waited`) until then."""

    time: float
    samples: list[tuple[float, float]]

    def require_promise(self, name: str, since: float) -> None:
        """Raises AssertionError if it came too late after a moment."""
        elapsed = self.time - since
        before = max((waits for at, waits in self.samples if at <= since), default=self.samples[0][1])
        busy = elapsed - (self.samples[-1][1] - before)
        print(f"{name}: {elapsed:.2f} s to the end of the last process, {busy:.2f} s without waiting for the machine")
        assert busy < PROMISED and elapsed < LIMIT


def last_end(
    launch: Path, ranks: int = RANKS, patience: float = 120.0, over: Callable[[], bool] = lambda: False
) -> End:
    """Waits until the last process of a launch is gone. over: whether no process is left that has not yet written who it
    is; a quick verdict ends ranks before they do."""
    deadline, samples = time.monotonic() + patience, []
    while time.monotonic() < deadline:
        samples.append((time.time(), waited()))
        processes = [json.loads(path.read_text()) for path in launch.glob("rank-*.json")]
        if all(map(has_exited, processes)) and (len(processes) == ranks or over()):
            return End(samples[-1][0], samples)
        time.sleep(0.05)
    raise AssertionError(f"processes of {launch} live on after {patience:.0f} s")
