"""Runs a graph on this machine: every stage is a submitit job of the local executor, the twin of its Slurm one."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import submitit

from pipeline.core import os_errors
from pipeline.core.errors import AtomError, Failure, Kind, of_kind
from pipeline.core.events import EventTail, figures_of
from pipeline.core.lease import holder
from pipeline.core.progress import Display
from pipeline.core.store import Store
from pipeline.graph.dag import Graph, Node
from pipeline.graph.run import Run
from pipeline.launch import clean_environment, preflight
from pipeline.launch.attempt import Task
from pipeline.launch.cluster_profile import Profile
from pipeline.launch.job_starter import Controller, JobStarter
from pipeline.launch.rendezvous import (
    announce,
    has_no_end,
    kill_processes,
    launch_folder,
    living_ranks,
    ranks_without_end,
)
from pipeline.launch.worker import work

POLL = 0.2
# Seconds that the ranks of an ended launch get to end by themselves.
LAST_SECONDS = 4.0
PROCESS_GONE = "its process is gone, perhaps killed for memory; see its log, and run the same command to go on"

# One thread for each rank, so that sums have one order under any load of the machine. Seeds of str hashes are fixed, so
# that no set order enters the bytes. Downloads are off: a stage uses only what is installed, and
# pinned files of sources. Of Arrow's allocators, jemalloc gives memory back between the parts of a corpus.
JOB_ENVIRONMENT = {
    "ARROW_DEFAULT_MEMORY_POOL": "jemalloc",
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


def require_inputs(graph: Graph, store: Store, selected: list[str], other_python: bool = False) -> None:
    """Checks that the selected stages can run.

    Args:
        graph: The graph.
        store: The home.
        selected: Names of the stages.
        other_python: They run with another Python than this process, so that nothing follows from what this machine
            lacks.

    Raises:
        AtomError: A stage needs one that is neither selected nor sealed, or cannot run at all, an artifact of it or of
            an input is damaged.
    """
    for name in selected:
        node = graph.nodes[name]
        keys = [node.key] if store.sealed(node.key) else graph.materials(node).values()
        if damage := next(filter(None, (store.damage(key) for key in keys if store.sealed(key))), None):
            raise AtomError(f"stage {name} cannot be run: {damage}")
        lack = "" if other_python else node.stage.lack(node.config)
        if not store.sealed(node.key) and (obstacle := node.stage.obstacle(node.config) or lack):
            raise AtomError(f"{graph.recipe.title}, stage {name}: {obstacle}")
        if not store.sealed(node.key) and not other_python:
            node.stage.inspect(node.config)
        for source in node.precursors:
            if source not in selected and not store.sealed(graph.nodes[source].key):
                lacking = f"stage {name} needs {source}, which is not sealed"
                raise AtomError(f"{lacking}; run that first, or use --until {name}")
        for key in node.external.values():
            if not store.sealed(key):
                raise AtomError(
                    f"stage {name} needs {key} of an earlier run, which is not sealed under {store.artifacts}; run "
                    "that recipe here first, or copy the artifact and its folder of the ledger"
                )


class _Executor(submitit.LocalExecutor):  # type: ignore[misc]  # submitit has no types
    """submitit's executor, with another way to start a job.

    Args:
        folder: submitit's folder of the job.
        start: Starts so many ranks with these variables.
    """

    def __init__(self, folder: Path, start: Callable[[Path, Mapping[str, str], int], Controller]) -> None:
        super().__init__(folder)
        self.start = start

    def _submit_command(self, command: str) -> Any:
        ranks = self.parameters["tasks_per_node"]
        variables = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": str(ranks)}
        variables |= {"SUBMITIT_LOCAL_NODEID": "0", "SUBMITIT_LOCAL_JOB_NUM_NODES": "1"}
        process = self.start(self.folder, variables, ranks)
        return self.job_class(self.folder, str(process.pid), tasks=list(range(ranks)), process=process)


@dataclass
class RunningJob:
    """A submitted job and the tail of its events."""

    node: Node
    # The job of submitit.
    submitted: Any
    tail: EventTail
    ranks: int = 1
    outcome: str | Failure | None = None
    pid: int | None = None
    # Ranks that were seen alive.
    seen_alive: set[int] = field(default_factory=set)
    # Ranks that have exited although the others need them.
    lost_ranks: list[int] = field(default_factory=list)
    # Whether the lost ranks were announced to the others.
    announced: bool = False
    # The time since which the remaining ranks have no work.
    finished_since: float | None = None

    def kill(self) -> None:
        """Kills its processes: the ranks, and submitit's controller."""
        controller = self.submitted._process.pid
        kill_processes({*living_ranks(controller).values(), *filter(None, [self.pid]), controller})


@dataclass
class LocalLauncher:
    """Runs stages in up to `profile.local.jobs` slots until all of `selected` are sealed or one has failed.

    A stage takes one slot for each of its ranks; a stage with more ranks than slots takes all of them.
    """

    graph: Graph
    store: Store
    run: Run
    selected: list[str]
    profile: Profile
    display: Display
    running: dict[str, RunningJob] = field(default_factory=dict)
    starters: dict[tuple[str, ...], JobStarter] = field(default_factory=dict)

    def go(self) -> None:
        """Runs to the end. Raises AtomError with the first failure; KeyboardInterrupt after a clean stop."""
        failures: dict[str, Failure] = {}
        waiting = [n for n in self.selected if not self.store.sealed(self.graph.nodes[n].key)]
        self.display.begin(len(self.selected), len(self.selected) - len(waiting))
        try:
            while waiting or self.running:
                self._start_ready(waiting, may_start=not failures)
                for name, job in list(self.running.items()):
                    outcome = self._poll(job)
                    if outcome is None:
                        continue
                    del self.running[name]
                    # Another process took the lease first, or the stage asks for a new start: it is looked at again.
                    if outcome == "busy" or (isinstance(outcome, Failure) and outcome.kind is Kind.RESTART):
                        waiting.append(name)
                    elif isinstance(outcome, Failure):
                        failures[name] = outcome
                        self.display.failed(name, outcome.text)
                # After a failure no stage starts, but those that run may still end well.
                if failures and not self.running:
                    break
                time.sleep(POLL)
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            for starter in self.starters.values():
                starter.close()
        if failures:
            name, failure = next(iter(failures.items()))
            raise of_kind(failure, f"stage {name} failed: {failure.text} (log: atom logs {name})")

    def _start_ready(self, waiting: list[str], may_start: bool) -> None:
        """Starts what is ready, in the order of the graph, and takes it and what is sealed from the list."""
        for name in list(waiting):
            node = self.graph.nodes[name]
            if self.store.sealed(node.key):
                waiting.remove(name)
                self.display.sealed(name, elsewhere=True)
            elif may_start and self._ready(node):
                # No later stage takes the slots that this one waits for: a row of short stages of one rank could keep
                # a stage of several ranks waiting to the end.
                may_start = self._places(node) <= self._free_places()
                if may_start:
                    waiting.remove(name)
                    self.running[name] = self._submit(node)

    def _places(self, node: Node) -> int:
        """Returns the slots that a stage takes: one for each rank.

        It takes all of them if it would share this machine's GPUs with another stage.
        """
        needs, jobs = node.stage.needs(node.config), self.profile.local.jobs
        return jobs if needs.gpus else min(needs.ranks, jobs)

    def _free_places(self) -> int:
        """Returns the slots without work. A job whose outcome is known only has to exit, which takes a second."""
        working = [job.node for job in self.running.values() if job.outcome is None]
        return self.profile.local.jobs - sum(self._places(node) for node in working)

    def _ready(self, node: Node) -> bool:
        after = (self.graph.nodes[name].key for name in node.after)
        if not all(self.store.sealed(key) for key in (*self.graph.materials(node).values(), *after)):
            return False
        folder = self.store.work(node.key)
        lease_holder = holder(folder) if folder.exists() else None
        if lease_holder is not None and lease_holder.alive:
            self.display.elsewhere(node.name, f"process {lease_holder.pid} on {lease_holder.host}")
            return False
        return True

    def _submit(self, node: Node) -> RunningJob:
        folder, number = self.run.node_folder(node.name), node.stage.ranks(node.config)
        watts_per_core = self.profile.power.watts_per_core
        task = Task.of(self.graph, self.store, self.run, node, watts_per_core=watts_per_core, ranks=number)
        executor = _Executor(folder / "submitit", partial(self._start, node))
        executor.update_parameters(tasks_per_node=number)
        # A Ctrl-C of the terminal goes to the whole process group. The job's controller never sees it (so that it waits
        # for the stage to stop); the stage itself unblocks it, see worker.stop_signals. This process gets it
        # afterwards.
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            tail = EventTail(folder / "events.jsonl")
            # Events of earlier attempts in this run are passed over.
            tail.read()
            job = executor.submit(work, task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        self.display.started(node.name, str(job.paths.stdout), number)
        return RunningJob(node, job, tail, number)

    def _start(self, node: Node, folder: Path, variables: Mapping[str, str], ranks: int) -> Controller:
        """Starts the ranks of a stage, with its variables and without denied ones."""
        needed = {k: v for k, v in node.stage.needs(node.config).environment.items() if k not in os.environ}
        needed["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, visible_gpus()[:ranks]))
        options = [word for name in clean_environment.denied_names(os.environ) for word in ("-u", name)]
        options.append(f"ATOM_HOME={self.store.home}")
        if needed["CUDA_VISIBLE_DEVICES"]:
            # Libraries may read variables of a GPU when they are imported, so this process is for the stage alone.
            options += [f"{name}={value}" for name, value in needed.items()]
            starter = JobStarter(["env", *options, sys.executable], ())
            try:
                return starter.start(folder, variables, ranks)
            finally:
                starter.close()
        # A process for each set of libraries, so that the memory of a stage counts those that it needs.
        libraries = tuple(node.stage.libraries)
        starter = self.starters.setdefault(libraries, JobStarter(["env", *options, sys.executable], libraries))
        return starter.start(folder, {**variables, **needed}, ranks)

    def _poll(self, job: RunningJob) -> str | Failure | None:
        """Returns the job's outcome, or None while it runs."""
        # Asked before the events are read: so those of a job that is done are complete.
        is_done = job.submitted.done()
        for event in job.tail.read():
            if event["event"] == "start":
                job.pid = event["pid"]
            elif event["event"] == "end":
                ok = event["outcome"] in ("sealed", "busy")
                job.outcome = event["outcome"] if ok else Failure.read(event["outcome"], event.get("kind"))
            elif event["event"] == "usage":
                self.display.usage(job.node.name, event["wall_seconds"])
            elif event["event"] == "progress":
                place = (event["time"], event["done"], event["total"], event["unit"])
                self.display.progress(job.node.name, *place, figures_of(event))
            elif event["event"] == "note":
                self.display.note(job.node.name, event["text"])
        if not is_done:
            self._end_leftover_ranks(job)
            return None
        if job.outcome == "sealed":
            self.display.sealed(job.node.name)
        if job.outcome is None and job.lost_ranks and job.lost_ranks[0] > 0:
            return Failure(f"rank {job.lost_ranks[0]}: {PROCESS_GONE}")
        if job.outcome is None and (full := os_errors.full_disk(self.store.home)):
            return Failure(full)  # there was no space even for the end event
        if job.outcome is None:
            return Failure("its process was killed from outside (perhaps for memory); run the same command to go on")
        return job.outcome

    def _end_leftover_ranks(self, job: RunningJob) -> None:
        """Ends the remaining ranks after rank 0 has ended the attempt or a required rank has exited.

        They may hang in a collective, or be stopped, so they get a grace time and are then killed. A killed rank is
        announced to the others.
        """
        if job.ranks == 1:
            return
        living = living_ranks(job.submitted._process.pid)
        job.seen_alive |= living.keys()
        folder = launch_folder(self.run.node_folder(job.node.name), job.submitted.job_id)
        if not job.lost_ranks:
            job.lost_ranks = ranks_without_end(folder, job.seen_alive - living.keys())
        elif job.outcome is None and not job.announced:
            job.announced = True  # at the next poll: rank 0 may have ended well meanwhile
            if has_no_end(folder, job.lost_ranks[0]):
                announce(folder, job.lost_ranks[0], Failure(PROCESS_GONE))
        if job.outcome is None and not job.lost_ranks:
            return
        job.finished_since = job.finished_since or time.monotonic()
        overdue = time.monotonic() - job.finished_since
        if overdue > LAST_SECONDS:  # rank 0 may still write, and its outcome is recorded
            kill_processes(pid for rank, pid in living.items() if rank or job.outcome is not None)
        if overdue > self.profile.local.stop_grace_seconds:
            kill_processes(living.values())

    def _stop(self) -> None:
        """Signals every running stage to stop, waits for the grace time, then kills the rest."""
        # A second Ctrl-C must not interrupt the clean stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.display.stopping()
        for job in self.running.values():
            with suppress(ProcessLookupError):
                job.submitted._process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.profile.local.stop_grace_seconds
        while self.running and time.monotonic() < deadline:
            self.running = {name: job for name, job in self.running.items() if self._poll(job) is None}
            time.sleep(POLL)
        for job in self.running.values():
            job.kill()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def visible_gpus() -> list[int]:
    """Returns the GPUs that this process may use: those in CUDA_VISIBLE_DEVICES, or all. Does not import torch."""
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible_devices is not None:
        return [int(name) for name in visible_devices.split(",") if name.strip().isdigit()]
    return list(range(len(list(Path("/dev").glob("nvidia[0-9]*")))))


def prepare_environment() -> None:
    """Sets the variables that affect bytes, and the limit of open files.

    The jobs inherit both, so this comes before the first of them starts.
    """
    preflight.allow_open_files()
    os.environ.update(JOB_ENVIRONMENT)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # of a surrounding launcher, not of the stage's ranks
