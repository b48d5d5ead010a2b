"""Runs a graph on this machine: every stage is a submitit job of the local executor, the twin of its Slurm one."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit

from pipeline.core.errors import AtomError, Failure, of_kind
from pipeline.core.events import Tail
from pipeline.core.lease import holder
from pipeline.core.progress import Display
from pipeline.core.store import Store
from pipeline.graph.dag import Graph, Node
from pipeline.graph.run import Run
from pipeline.launch import clean_environment
from pipeline.launch.attempt import Task
from pipeline.launch.cluster_profile import Profile
from pipeline.launch.failure_messages import full
from pipeline.launch.rendezvous import announce, kill, launch_folder, lost, silent, tasks
from pipeline.launch.worker import work

POLL = 0.2
FOREVER_MINUTES = 60 * 24 * 365
LAST_SECONDS = 4.0
"""What the ranks of a launch that is over get to end by themselves."""
GONE = "its process is gone, perhaps killed for memory; its log may tell why; run the same command to go on"
NO_ROOM = 1_000_000
"""Free bytes below which a process that died without a word is thought to have had no room for it."""

# One thread a rank: sums are then taken in one order, whatever else the machine does. Seeds of str hashes are fixed so
# that no set order leaks into bytes. Nothing may ask the network for anything: what a stage needs is installed.
JOB_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def require_inputs(graph: Graph, store: Store, selected: list[str]) -> None:
    """Raises AtomError if a selected stage needs one that is neither selected nor sealed, or cannot be run at all, or
    if something stands in the place of a folder of the home."""
    if obstacle := store.misplaced():
        raise AtomError(f"{obstacle}, and run the same command again")
    for name in selected:
        node = graph.nodes[name]
        if not store.sealed(node.key) and (obstacle := node.stage.obstacle(node.config)):
            raise AtomError(f"{graph.recipe.title}, stage {name}: {obstacle}")
        for source in graph.nodes[name].inputs.values():
            if source not in selected and not store.sealed(graph.nodes[source].key):
                raise AtomError(
                    f"stage {name} needs {source}, which is not sealed; run that first, or use --until {name}"
                )
        for key in graph.nodes[name].external.values():
            if not store.sealed(key):
                raise AtomError(
                    f"stage {name} needs {key} of an earlier run, which is not sealed under {store.artifacts}; run "
                    "that recipe here first, or copy the artifact and its folder of the ledger"
                )


def damage_of(graph: Graph, store: Store, selected: list[str]) -> dict[str, str]:
    """Of the selected stages those that cannot be had, because what they sealed is damaged or what they need is, each
    with a sentence that says which file."""
    found: dict[str, str] = {}
    for name in selected:
        node = graph.nodes[name]
        if store.sealed(node.key):
            if text := store.damage(node.key):
                found[name] = text
            continue
        inputs = {source: graph.nodes[source].key for source in node.inputs.values()}
        for source, key in {**inputs, **{key: key for key in node.external.values()}}.items():
            text = found.get(source) or (store.damage(key) if store.sealed(key) else None)
            if text is not None:
                found[name] = text
                break
    return found


@dataclass
class Flight:
    """A submitted job and the tail of its events."""

    node: Node
    job: Any
    tail: Tail
    ranks: int = 1
    outcome: str | Failure | None = None
    pid: int | None = None
    seen: set[int] = field(default_factory=set)
    """Ranks that were seen alive."""
    lost: list[int] = field(default_factory=list)
    """Ranks that are gone though the others need them."""
    announced: bool = False
    """Whether the others were told of the lost ones."""
    over: float | None = None
    """Since when what is left of the ranks has no more to do."""


@dataclass
class LocalLauncher:
    """Keeps stages running, in up to `profile.local.jobs` places, until all of `selected` are sealed or one has failed.

    A stage takes a place for each of its ranks; one that has more ranks than there are places takes all.
    """

    graph: Graph
    store: Store
    run: Run
    selected: list[str]
    profile: Profile
    display: Display
    flights: dict[str, Flight] = field(default_factory=dict)

    def go(self) -> None:
        """Runs to the end. Raises AtomError with the first failure; KeyboardInterrupt after a clean stop."""
        failures: dict[str, Failure] = {}
        waiting = [n for n in self.selected if not self.store.sealed(self.graph.nodes[n].key)]
        self.display.begin(len(self.selected), len(self.selected) - len(waiting))
        try:
            while waiting or self.flights:
                for name in list(waiting):
                    node = self.graph.nodes[name]
                    if self.store.sealed(node.key):
                        waiting.remove(name)
                        self.display.sealed(name, elsewhere=True)
                    elif not failures and self._ready(node) and self._places(node) <= self._free():
                        waiting.remove(name)
                        self.flights[name] = self._submit(node)
                for name, flight in list(self.flights.items()):
                    outcome = self._poll(flight)
                    if outcome is None:
                        continue
                    del self.flights[name]
                    if outcome == "busy":
                        waiting.append(name)
                    elif isinstance(outcome, Failure):
                        failures[name] = outcome
                        self.display.failed(name, outcome.text)
                if failures and not self.flights:
                    break
                time.sleep(POLL)
        except KeyboardInterrupt:
            self._stop()
            raise
        if failures:
            name, failure = next(iter(failures.items()))
            raise of_kind(failure, f"stage {name} failed: {failure.text} (log: atom logs {name})")

    def _places(self, node: Node) -> int:
        return min(node.stage.ranks(node.config), self.profile.local.jobs)

    def _free(self) -> int:
        return self.profile.local.jobs - sum(self._places(flight.node) for flight in self.flights.values())

    def _ready(self, node: Node) -> bool:
        if not all(self.store.sealed(key) for key in self.graph.materials(node).values()):
            return False
        folder = self.store.work(node.key)
        present = holder(folder) if folder.exists() else None
        if present is not None and present.alive:
            self.display.elsewhere(node.name, f"process {present.pid} on {present.host}")
            return False
        return True

    def _submit(self, node: Node) -> Flight:
        folder, number = self.run.node_folder(node.name), node.stage.ranks(node.config)
        task = Task(
            home=str(self.store.home),
            run=self.run.id,
            node=node.name,
            stage=node.stage.name,
            config=node.config.model_dump(mode="json"),
            inputs=self.graph.materials(node),
            key=node.key,
            watts_per_core=self.profile.power.watts_per_core,
            ranks=number,
        )
        # `env` becomes the stage's process, without what a stage may not have
        without = [word for name in clean_environment.denied(os.environ) for word in ("-u", name)]
        executor = submitit.LocalExecutor(folder / "submitit", python=shlex.join(["env", *without, sys.executable]))
        executor.update_parameters(timeout_min=FOREVER_MINUTES, stderr_to_stdout=True, tasks_per_node=number)
        gpus = visible_gpus()
        executor.update_parameters(gpus_per_node=min(number, len(gpus)), visible_gpus=gpus)  # else it hides them all
        # A Ctrl-C of the terminal goes to the whole process group. The job's controller never sees it (so that it waits
        # for the stage to stop); the stage itself unblocks it, see worker._stop_signals. Here it waits until after.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            tail = Tail(folder / "events.jsonl")
            tail.read()
            job = executor.submit(work, task.json())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.display.started(node.name, str(job.paths.stdout), number)
        return Flight(node, job, tail, number)

    def _poll(self, flight: Flight) -> str | Failure | None:
        """The job's outcome, or None while it runs."""
        ended = flight.job.done()
        for event in flight.tail.read():
            kind = event["event"]
            if kind == "start":
                flight.pid = event["pid"]
            elif kind == "end":
                good = event["outcome"] in ("sealed", "busy")
                flight.outcome = event["outcome"] if good else Failure.read(event["outcome"], event.get("kind"))
            elif kind == "usage":
                self.display.usage(flight.node.name, event)
            elif kind == "progress":
                self.display.progress(flight.node.name, event)
            elif kind == "note":
                self.display.note(flight.node.name, event["text"])
        if not ended:
            self._see_off(flight)
            return None
        if flight.outcome == "sealed":
            self.display.sealed(flight.node.name)
        if flight.outcome is None and flight.lost and flight.lost[0] > 0:
            return Failure(f"rank {flight.lost[0]}: {GONE}")
        if flight.outcome is None and shutil.disk_usage(self.store.home).free < NO_ROOM:
            return Failure(full(self.store))  # not even the word that it ends had room
        if flight.outcome is None:
            return Failure("its process was killed from outside (perhaps for memory); run the same command to go on")
        return flight.outcome

    def _see_off(self, flight: Flight) -> None:
        """Once rank 0 has ended the attempt, or a rank is gone that the others need, what is left of them (it may hang
        in a collective, or be stopped) gets a moment, and is killed. Of a rank that was killed the others are told."""
        if flight.ranks == 1:
            return
        living = tasks(flight.job._process.pid)
        flight.seen |= living.keys()
        folder = launch_folder(self.run.node_folder(flight.node.name), flight.job.job_id)
        if not flight.lost:
            flight.lost = lost(folder, flight.seen - living.keys())
        elif flight.outcome is None and not flight.announced:  # a look later: rank 0 may have ended well meanwhile
            flight.announced = True
            if silent(folder, flight.lost[0]):
                announce(folder, flight.lost[0], Failure(GONE))
        if flight.outcome is None and not flight.lost:
            return
        flight.over = flight.over or time.monotonic()
        late = time.monotonic() - flight.over
        if late > LAST_SECONDS:  # rank 0 may still write, and what it has told is on record
            kill(pid for rank, pid in living.items() if rank or flight.outcome is not None)
        if late > self.profile.local.stop_grace_seconds:
            kill(living.values())

    def _stop(self) -> None:
        """Asks every running stage to stop, waits for the grace time, then kills what is left."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.display.stopping()
        for flight in self.flights.values():
            with suppress(ProcessLookupError):
                flight.job._process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.profile.local.stop_grace_seconds
        while self.flights and time.monotonic() < deadline:
            self.flights = {n: f for n, f in self.flights.items() if self._poll(f) is None}
            time.sleep(POLL)
        for flight in self.flights.values():
            controller = flight.job._process.pid
            kill({*tasks(controller).values(), *filter(None, [flight.pid]), controller})
        signal.signal(signal.SIGINT, signal.default_int_handler)


def visible_gpus() -> list[int]:
    """The GPUs that this process may use: those that CUDA_VISIBLE_DEVICES names, or all. No torch here."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [int(name) for name in named.split(",") if name.strip().isdigit()]
    return list(range(len(list(Path("/dev").glob("nvidia[0-9]*")))))


def prepare_environment() -> None:
    """Jobs inherit this process's environment: set what bytes depend on before the first one starts."""
    os.environ.update(JOB_ENVIRONMENT)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # of a launcher around us, not of the stage's own ranks
