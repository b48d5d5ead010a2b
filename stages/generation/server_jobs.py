"""vLLM servers in jobs of their own: how they run (`serve`), and the files by which a stage finds them.

Each server writes a file into a folder that all see, and keeps it fresh:

    server-<number>.json    url, host, Slurm job and start of a server that answers
    config.json             of the stage: the model to serve

Files are written atomically, and only the server that a file is of writes or removes it. A server lives while the time
of its file is younger than EXPIRY by the clock of the file system, so that no clocks of hosts are compared. No torch.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files
from pipeline.core.environment import node_name
from pipeline.core.errors import MachineError
from pipeline.core.json_files import Damaged
from pipeline.core.lease import EXPIRY, HEARTBEAT, file_system_time
from pipeline.core.stage import ServerPlace
from stages.generation import vllm_server
from stages.generation.protocols import SamplingSettings

# Bytes of the largest file that is read.
LIMIT = 100_000
# Seconds in which a server may give no answer before it is started again.
SILENCE_SECONDS = 120.0
# Seconds between two looks: has the stage ended, and does the server answer?
POLL_SECONDS = 1.0
# The file of the servers' secret, in the folder that they and their stage see.
SECRET = "secret"


class _Body(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    run: str
    url: Annotated[str, Field(pattern=r"^http://[^\s/]+$")]
    host: str
    job: str
    start: int


_BODY = TypeAdapter(_Body)


@dataclass(frozen=True)
class Announced:
    """A server that announces itself.

    Attributes:
        run: Run that it belongs to.
        url: Its address.
        host: Name of its node.
        job: Its Slurm job.
        start: Number of times that the job was started again.
    """

    run: str
    url: str
    host: str
    job: str
    start: int


@contextmanager
def announced(folder: Path, number: int, server: Announced) -> Iterator[None]:
    """Announces a server in a block, as number `number` of its stage."""
    path, stop = folder / f"server-{number}.json", threading.Event()
    atomic_files.write(path, json.dumps(asdict(server)))

    def beat() -> None:
        while not stop.wait(HEARTBEAT):
            with suppress(OSError):  # the file system is away for a moment, or the file for good: it is then stale
                os.utime(path)

    thread = threading.Thread(target=beat, name="announcement", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):  # else it becomes stale
            path.unlink()


def read(folder: Path, run: str) -> list[Announced]:
    """Returns the servers of a run that live, by URL.

    A damaged file, and one of another run, is reported once. Of two files with one URL the fresher one counts: its
    server took the port of one that died.

    Raises:
        MachineError: The folder is not there.
    """
    try:
        now = file_system_time(folder)
    except OSError as error:
        raise MachineError(
            f"{folder} cannot be used ({error.strerror}), in which servers announce themselves; see whether this node "
            "mounts the file system"
        ) from None
    fresh: dict[str, tuple[float, Announced]] = {}
    for name in json_files.names(folder):
        if not re.fullmatch(r"server-[0-9]{1,9}\.json", name):
            continue
        path = folder / name
        try:
            server = Announced(**json_files.read(path, _BODY, LIMIT))
            written = path.stat().st_mtime
        except FileNotFoundError:  # its server has just ended
            continue
        except Damaged as error:
            json_files.report(error, "its server is left out")
            continue
        if server.run != run:
            json_files.note(
                f"{json_files.printable(path)} is of run {server.run}, not of {run}; its server is left out"
            )
        elif now - written < EXPIRY and written > fresh.get(server.url, (0.0,))[0]:
            fresh[server.url] = written, server
    return [server for _, (_, server) in sorted(fresh.items())]


def serve(settings: SamplingSettings, place: ServerPlace) -> None:
    """Runs a server for a stage and announces it until the stage has ended.

    Raises:
        MachineError: The server dies or no longer answers.
        AtomError: vLLM is missing.
    """
    python, config = vllm_server.interpreter(), place.folder / "config.json"
    while not config.exists():  # the stage writes it
        if place.ended():
            return
        time.sleep(POLL_SECONDS)
    import torch

    # No training shares these GPUs, so all of their memory counts as free.
    gpus = (torch.cuda.device_count(), 1.0) if torch.cuda.is_available() else None
    secret = place.folder / SECRET
    run(vllm_server.Server.start(python, place.folder, place.log, settings.options, gpus, secret), place, place.folder)


def run(server: vllm_server.Server, place: ServerPlace, folder: Path) -> None:
    """Announces a server in a folder until the stage has ended, and ends it.

    Raises:
        MachineError: The server dies or no longer answers.
    """
    try:
        if not server.wait(None, place.ended, POLL_SECONDS):
            return
        place.ready()
        job, start = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        announcement = Announced(place.run, server.url, node_name(), job, start)
        with announced(folder, place.number, announcement):
            while server.wait(SILENCE_SECONDS, place.ended, POLL_SECONDS):
                time.sleep(POLL_SECONDS)
    finally:
        server.close()
