"""Reads jobs from Slurm: `squeue` for queued and running jobs, `sacct` for ended ones, if there is accounting.

What asks in a loop does so through `Answers`, so that the controller gets a bounded number of requests a minute.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.errors import AtomError

SECONDS = 30.0
ASK_EVERY = 10.0
"""How often a command that redraws asks Slurm, in seconds."""
LIVING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
          "SIGNALING", "STAGE_OUT", "STOPPED", "REQUEUE_FED", "SPECIAL_EXIT")  # fmt: skip


class NoAnswer(AtomError):
    """Slurm, or its accounting, does not answer."""


class Refused(AtomError):
    """Slurm refuses a script."""


@dataclass(frozen=True)
class Owner:
    """The owner of a job, recorded in the job's comment: an id alone is ambiguous, because a controller that lost its
    state assigns ids again."""

    run: str
    node: str
    key: str

    @property
    def comment(self) -> str:
        return f"atom {self.run} {self.node} {self.key}"

    @classmethod
    def read(cls, comment: str) -> Owner | None:
        """Parses a comment; None if the job is not one of atom's."""
        words = comment.split(" ")
        return cls(*words[1:]) if len(words) == 4 and words[0] == "atom" else None


@dataclass(frozen=True)
class Job:
    """One job as Slurm describes it. owner: None if accounting keeps no comments. code: exit code and signal of
    an ended job. user: who submitted it."""

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    owner: Owner | None = None
    code: str = ""
    user: str = ""

    @property
    def alive(self) -> bool:
        return self.state in LIVING

    @property
    def stuck(self) -> bool:
        """Whether Slurm holds the job after a failed launch: it waits until it is released."""
        return self.state == "PENDING" and "launch" in self.reason and "held" in self.reason


def run_command(*command: str, seconds: float = SECONDS) -> str:
    """The output of a Slurm command. Raises NoAnswer with its standard error, or Refused if sbatch refuses."""
    return _run(command, seconds).stdout


def test_only(*command: str, text: str | None = None) -> str:
    """When and where a job could start that sbatch or srun is given with these arguments, in Slurm's words; nothing is
    submitted. text: the script, if no file has it. Raises Refused."""
    answer = _run((command[0], "--test-only", *command[1:]), SECONDS, text).stderr
    _, _, start = answer.partition(" to start at ")
    return f"to start at {start.splitlines()[0].strip()}" if start else ""


def _run(command: tuple[str, ...], seconds: float, text: str | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise NoAnswer(f"there is no {command[0]} here; submit from a host of a Slurm cluster, or use `atom run`")
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, input=text)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} gave no answer within {seconds:.0f} s; see whether slurmctld is up") from None
    if process.returncode:
        message = process.stderr.strip() or f"exit code {process.returncode}"
        raise (
            Refused(f"{command[0]}: {message}")
            if command[0] == "sbatch" or "--test-only" in command
            else NoAnswer(f"{command[0]} failed: {' '.join(message.split())}")
        )
    return process


def lack() -> str | None:
    """Why there is no Slurm for this host, in a few words; None if it answers."""
    try:
        run_command("sinfo", "--noheader", "--format=%P")
    except NoAnswer as error:
        before, _, fatal = str(error).partition("fatal: ")
        return f"sinfo: {fatal}" if fatal else before.partition(";")[0]
    return None


def queued_jobs() -> dict[str, Job]:
    """Every job of atom in the controller, by id: waiting, running and recently ended ones."""
    rows = run_command("squeue", "-h", "-t", "all", "-o", "%i|%T|%N|%M|%r|%u|%k").splitlines()
    jobs = {}
    for row in rows:
        id, state, nodes, elapsed, reason, user, comment = (row.split("|", 6) + [""] * 7)[:7]
        if owner := Owner.read(comment):
            jobs[id] = Job(id, state, "" if reason == "None" else reason, nodes, elapsed, owner, user=user)
    return jobs


def hides_jobs() -> bool:
    """Whether Slurm shows this user no jobs of others: `PrivateData` has `jobs`. Root sees all. Raises NoAnswer."""
    if os.geteuid() == 0:
        return False
    lines = (line.partition("=") for line in run_command("scontrol", "show", "config").splitlines())
    settings = {name.strip(): value.strip() for name, _, value in lines}
    return "jobs" in settings.get("PrivateData", "").split(",")


def finished_jobs(ids: Iterable[str]) -> dict[str, Job]:
    """Jobs from the accounting, by id. Raises NoAnswer without accounting."""
    job_ids = sorted(set(ids), key=len)
    if not job_ids:
        return {}
    fields = "JobID,State,ExitCode,NodeList,Elapsed,User,Comment"
    rows = run_command("sacct", "-X", "-n", "-P", "-o", fields, "-j", ",".join(job_ids)).splitlines()
    jobs = {}
    for row in rows:
        id, state, code, nodes, elapsed, user, comment = (row.split("|", 6) + [""] * 7)[:7]
        state, _, canceled_by = state.partition(" ")  # "CANCELLED by 0"
        reason = f"exit code {code.split(':')[0]}" if state == "FAILED" else canceled_by
        jobs[id] = Job(id, state, reason, nodes, elapsed, Owner.read(comment), code, user)
    return jobs


def memory_of(id: str) -> tuple[str, str]:
    """(memory that a job requested on all of its nodes, the most that a task of it was seen to use) in the notation of
    Slurm, from the accounting; empty where it knows none. Raises NoAnswer without accounting."""
    lines = run_command("sacct", "-n", "-P", "-o", "ReqMem,NNodes,MaxRSS", "-j", id).splitlines()
    rows = [[*line.split("|"), "", ""][:3] for line in lines]
    requested = next((f"{size} on {nodes} nodes" if nodes != "1" else size for size, nodes, _ in rows if size), "")
    return requested, max((used for *_, used in rows if used), key=in_bytes, default="")


def time_of(id: str) -> tuple[str, str]:
    """(time limit of a job, time that it ran) in the notation of Slurm, from the accounting; empty where it knows none.
    Raises NoAnswer without accounting."""
    rows = run_command("sacct", "-X", "-n", "-P", "-o", "Timelimit,Elapsed", "-j", id).splitlines()
    limit, _, elapsed = rows[-1].partition("|") if rows else ("", "", "")
    return limit, elapsed


def in_bytes(size: str) -> float:
    """A size in the notation of Slurm: 302040K, 1.5G. Zero if it is none."""
    unit = " KMGTP".find(size[-1:].upper())
    try:
        return float(size.rstrip("KMGTPkmgtp")) * 1024.0 ** max(0, unit)
    except ValueError:
        return 0.0


def time_limits() -> dict[str, float]:
    """The longest time of a job in each partition, in minutes. Raises NoAnswer."""
    rows = (row.partition("|") for row in run_command("sinfo", "-h", "-o", "%R|%l").splitlines())
    return {name.strip(): _minutes(limit.strip()) for name, _, limit in rows}


def _minutes(limit: str) -> float:
    """A time limit in the notation of Slurm, [days-][hours:]minutes:seconds. Infinite if it is none."""
    if not (match := re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)):
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def unavailable_nodes() -> str:
    """The nodes that are down or drained, with the reasons that were given: `n4: bad fan`. Raises NoAnswer."""
    rows = (row.partition("|") for row in run_command("sinfo", "-h", "-R", "-o", "%N|%E").splitlines())
    return "; ".join(f"{nodes.strip()}: {' '.join(reason.split())}" for nodes, _, reason in rows)


def first_node(nodes: str) -> str:
    """The first of a list of nodes as Slurm writes it, such as `n[1-3]`: the one that runs a job's script. Raises
    NoAnswer."""
    return run_command("scontrol", "show", "hostnames", nodes).split()[0]


@dataclass
class Answers:
    """The answers of Slurm to one process, each at most `seconds` old: also that there is none."""

    seconds: float = 0.0
    _kept: dict[object, tuple[float, Any]] = field(default_factory=dict)

    def queued_jobs(self) -> dict[str, Job]:
        jobs: dict[str, Job] = self._ask("queue", queued_jobs)
        return jobs

    def finished_jobs(self, ids: Iterable[str]) -> dict[str, Job]:
        wanted = tuple(ids)
        jobs: dict[str, Job] = self._ask(wanted, lambda: finished_jobs(wanted))
        return jobs

    def memory_of(self, id: str) -> tuple[str, str]:
        sizes: tuple[str, str] = self._ask(f"memory {id}", lambda: memory_of(id))
        return sizes

    def time_of(self, id: str) -> tuple[str, str]:
        times: tuple[str, str] = self._ask(f"time {id}", lambda: time_of(id))
        return times

    def first_node(self, nodes: str) -> str:
        return str(self._ask(f"first of {nodes}", lambda: first_node(nodes)))

    def unavailable_nodes(self) -> str:
        return str(self._ask("nodes", unavailable_nodes))

    def hides_jobs(self) -> bool:
        return bool(self._ask("hidden", hides_jobs))

    def _ask(self, question: object, function: Callable[[], Any]) -> Any:
        asked_at, answer = self._kept.get(question, (float("-inf"), None))
        if time.monotonic() - asked_at >= self.seconds:
            try:
                answer = function()
            except NoAnswer as error:
                answer = error
            now = time.monotonic()
            self._kept = {key: kept for key, kept in self._kept.items() if now - kept[0] < self.seconds}
            self._kept[question] = (now, answer)
        if isinstance(answer, NoAnswer):
            raise answer
        return answer
