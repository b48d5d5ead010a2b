"""A look at each node before a stage begins, so that what is wrong with one is told in seconds, with its name.

Each rank looks at its own node (space, clock, GPU, versions) and leaves what it found in the folder of the launch; the
others then call rank 0 over the network that training will use. Rank 0 gathers, and speaks for all.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import environment
from pipeline.launch.ranks import node_name, read, write
from pipeline.launch.worker import Task

SECONDS = 120.0
"""What the ranks of a launch may differ in starting, and a call may take."""
SKEW_SECONDS = 30.0
POLL = 0.1


def check(task: Task, launch: Path, rank: int, free_gb: float, scratch: str | None) -> str | None:
    """What is wrong with a node of this launch, in one sentence that names it; None of a rank other than 0, and if all
    is well."""
    home = Path(task.home)
    wrong = own(home, free_gb, scratch)
    if task.ranks == 1:
        return wrong
    if rank:
        listener = _wait(launch / "listener.json") if wrong is None else None
        if wrong is None:
            wrong = _call(listener, rank)
        write(launch / f"node-{rank}.json", {"wrong": wrong, "node": node_name(), "lock": environment.fingerprint()})
        return None
    return _gather(launch, task.ranks, wrong)


def own(home: Path, free_gb: float, scratch: str | None) -> str | None:
    """What is wrong with this node, if anything."""
    name = node_name()
    for place in [home, *([Path(scratch)] if scratch else [])]:
        try:
            free = shutil.disk_usage(place).free / 1e9
            probe = place / f".probe-{uuid.uuid4().hex}"
            before = time.time()
            probe.touch()
            written = probe.stat().st_mtime
            probe.unlink()
        except OSError as error:
            return f"node {name} cannot write to {place} ({error.strerror}); mend its mounts, or exclude it"
        if free < free_gb:
            return f"node {name} has {free:.1f} GB free in {place}, less than free_gb = {free_gb:g}; free some"
        if place == home and abs(written - before) > SKEW_SECONDS:
            return f"the clock of node {name} differs by {written - before:.0f} s from the file system's; set it by NTP"
    return _gpus(name)


def _gpus(name: str) -> str | None:
    """Whether the GPUs that Slurm gave are there. No torch here: the device files say it."""
    given = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.strip().isdigit()]
    there = list(Path("/dev").glob("nvidia[0-9]*"))
    if os.environ.get("SLURM_GPUS_ON_NODE") and len(there) < len(given):
        return (
            f"node {name} has {len(there)} GPUs under /dev, and Slurm gave {len(given)}; have its driver looked after"
        )
    return None


def _call(listener: dict[str, Any] | None, rank: int) -> str | None:
    if listener is None:
        return f"node {node_name()} saw no word of rank 0 for {SECONDS:.0f} s; does it see the same $ATOM_HOME?"
    try:
        with socket.create_connection((listener["host"], listener["port"]), timeout=SECONDS) as line:
            line.sendall(f"{rank}\n".encode())
            line.settimeout(SECONDS)
            if line.recv(1) == b"+":
                return None
        return f"node {node_name()}: rank 0 at {listener['host']} hung up"
    except OSError as error:
        where = f"{listener['host']}:{listener['port']}"
        return f"node {node_name()} cannot reach rank 0 at {where} ({error}); look at names, routes and firewall"


def _gather(launch: Path, ranks: int, wrong: str | None) -> str | None:
    if wrong is not None:
        write(launch / "listener.json", {"host": "", "port": 0})
        return wrong
    deadline = time.monotonic() + SECONDS
    with socket.create_server(("", 0), backlog=ranks) as server:
        server.settimeout(POLL)
        write(launch / "listener.json", {"host": address(), "port": server.getsockname()[1]})
        told: dict[int, dict[str, Any]] = {}
        while len(told) < ranks - 1 and time.monotonic() < deadline:
            with suppress(TimeoutError):
                line, _ = server.accept()
                with line:
                    line.settimeout(SECONDS)
                    line.recv(64)
                    line.sendall(b"+")
            for rank in set(range(1, ranks)) - set(told):
                found = read(launch / f"node-{rank}.json")
                if found is not None:
                    told[rank] = found
    silent = sorted(set(range(1, ranks)) - set(told))
    if silent:
        started = [rank for rank in silent if (launch / f"started-{rank}").exists()]
        which = f"rank {silent[0]}" + (f" and {len(silent) - 1} more" if silent[1:] else "")
        how = "started and said nothing more" if started else "did not start"
        return f"{which} of {ranks} {how} within {SECONDS:.0f} s; its own log may tell why"
    bad = [found["wrong"] for _, found in sorted(told.items()) if found["wrong"]]
    if bad:
        return str(bad[0])
    lock = environment.fingerprint()
    other = next((found["node"] for _, found in sorted(told.items()) if found["lock"] != lock), None)
    if other is not None:
        return f"nodes {other} and {node_name()} differ in Python, packages or processor; ask for nodes that are alike"
    return None


def address() -> str:
    """The name by which other nodes of the job reach this one."""
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    return node_name() if nodes > 1 else "127.0.0.1"


def _wait(path: Path) -> dict[str, Any] | None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found = read(path)
        if found is not None:
            return found
        time.sleep(POLL)
    return None
