"""Reads jobs from Slurm: `squeue` for queued and running jobs, `sacct` for ended ones, if there is accounting.

What asks in a loop does so through `Answers`, so that the controller gets a bounded number of requests a minute.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar, cast

from pipeline.core.errors import AtomError
from pipeline.core.process import user_name

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
SECONDS = 30.0
# How often a command that redraws asks Slurm, in seconds.
ASK_EVERY = 10.0
# The states of a job that has not ended.
_LIVING = """
PENDING RUNNING CONFIGURING COMPLETING SUSPENDED REQUEUED REQUEUE_HOLD RESIZING SIGNALING STAGE_OUT STOPPED REQUEUE_FED
SPECIAL_EXIT RESV_DEL_HOLD
"""
LIVING = tuple(_LIVING.split())


class NoAnswer(AtomError):
    """Slurm, or its accounting, does not answer."""


class Refused(AtomError):
    """Slurm refuses a script."""


@dataclass(frozen=True)
class Owner:
    """The run and the stage that a job belongs to, as the path of its script says.

    No site changes that path, and no other submission has it. Sites change comments and names of jobs, requeueing
    changes the time of submission, and a controller that lost its state assigns ids again.

    Attributes:
        run: The id of the run.
        node: The name of the stage.
        part: `shards` or `servers` of a job array beside the stage's job; empty for that job.
    """

    run: str
    node: str
    part: str = ""

    @classmethod
    def read(cls, text: str) -> Owner | None:
        """Finds the owner in the command or the comment of a job; None if the job is not one of atom's.

        The comment counts where a site's own `sbatch` copies scripts.
        """
        match = _SCRIPT.search(text) or _COMMENT.search(text)
        return cls(match["run"], match["node"], match["part"] or "") if match else None

    def comment(self, key: str) -> str:
        """Returns the comment of the job, for people.

        Args:
            key: The key of the stage.
        """
        return f"atom {self.run} {self.node} {key}" + (f".{self.part}" if self.part else "")


# The names of the scripts are submitit's. Slurm shows the path of a script as the command of its job.
_SCRIPT = re.compile(
    r"/logs/(?P<run>[^/\s|]+)/(?P<node>[^/\s|]+)/(?:(?P<part>shards|servers)/)?submitit/\.?submission_file_\w+\.sh"
)
_COMMENT = re.compile(r"(?:^|\|)atom (?P<run>\S+) (?P<node>\S+) [\w@-]+(?:\.(?P<part>shards|servers))?\|?$")


@dataclass(frozen=True)
class Job:
    """One job as Slurm describes it.

    Attributes:
        id: Its id; of a task of an array with the number of the task, or with those of the tasks that wait.
        state: The state in capitals, as Slurm names it.
        reason: The reason for which it waits; of an ended job, the reason that the accounting has.
        nodes: Its nodes in Slurm's notation.
        elapsed: The time that it has run, in Slurm's notation.
        owner: The run and stage that it belongs to; None if Slurm does not show its script.
        code: Exit code and signal of an ended job.
        user: The user who submitted it.
        partition: Its partition, or several with commas between.
        cancelled_by: The user who cancelled it; empty if nobody did or it is not known.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    owner: Owner | None = None
    code: str = ""
    user: str = ""
    partition: str = ""
    cancelled_by: str = ""

    @property
    def alive(self) -> bool:
        return self.state in LIVING


def run_command(*command: str, seconds: float = SECONDS) -> str:
    """Returns the output of a Slurm command. Raises NoAnswer with its standard error, or Refused if sbatch refuses."""
    return _run(command, seconds).stdout


def test_only(*script: str, text: str | None = None) -> str:
    """Returns the start that Slurm expects for a job, in its words; empty if it names none. Nothing is submitted.

    Args:
        *script: The file of the script.
        text: The script, if no file has it.

    Raises:
        Refused: Slurm would not take the job.
    """
    answer = _run(("sbatch", "--test-only", *script), SECONDS, text).stderr
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
        # It judges a request, so its errors are about the request and not about Slurm.
        if command[0] == "sbatch":
            raise Refused(f"{command[0]}: {message}")
        raise NoAnswer(f"{command[0]} failed: {' '.join(message.split())}")
    return process


# The fields of `squeue`. The comment is anybody's text, so it is the last one.
_QUEUE_FIELDS = "JobArrayID State NodeList TimeUsed Reason UserName Partition Command Comment"
QUEUE_FIELDS = tuple(_QUEUE_FIELDS.split())


def queued_jobs(users: Iterable[str]) -> dict[str, Job]:
    """Returns the jobs of atom of these users in the controller, by id: waiting, running and recently ended ones.

    Slurm selects by one user; of several users or ids it would send the jobs of the whole cluster.
    """
    jobs = {}
    # Width 0 keeps squeue from cutting values.
    fields = ",".join(f"{name}:0|" for name in QUEUE_FIELDS)
    for user in sorted(set(users)):
        for row in run_command("squeue", "-h", "-t", "all", "-u", user, "-O", fields).splitlines():
            *values, text = row.split("|", len(QUEUE_FIELDS) - 2)
            if len(values) < len(QUEUE_FIELDS) - 2 or (owner := Owner.read(text)) is None:
                continue
            id, state, nodes, elapsed, reason, submitter, partition = map(_word, values)
            jobs[id] = Job(id, state, reason, nodes, elapsed, owner, user=submitter, partition=partition)
    return jobs


def _word(value: str) -> str:
    """Returns a value as Slurm shows it; empty where it shows that there is none."""
    return "" if value in ("None", "(null)") else value


def finished_jobs(ids: Iterable[str]) -> dict[str, Job]:
    """Returns jobs from the accounting, by id. Raises NoAnswer without accounting."""
    job_ids = sorted(set(ids), key=len)
    if not job_ids:
        return {}
    fields = "JobID,State,ExitCode,NodeList,Elapsed,User,Reason,SubmitLine,Comment"
    rows = run_command("sacct", "-X", "-n", "-P", "-o", fields, "-j", ",".join(job_ids)).splitlines()
    jobs = {}
    for row in rows:
        # The submit line and the comment may contain any characters, so they come last and stay together.
        id, state, code, nodes, elapsed, user, reason, text = (row.split("|", 7) + [""] * 8)[:8]
        # The accounting shows a cancelled job as `CANCELLED by 1000`.
        state, _, uid = state.partition(" by ")
        canceller = user_name(int(uid)) if uid.isdecimal() else ""
        owner = Owner.read(text)
        jobs[id] = Job(id, state, _word(reason), nodes, elapsed, owner, code, user, cancelled_by=canceller)
    return jobs


@dataclass
class Answers:
    """The answers of Slurm to one process, each at most `seconds` old: also that there is none."""

    seconds: float = 0.0
    _kept: dict[object, tuple[float, Any]] = field(default_factory=dict)

    def ask(
        self, function: Callable[Arguments, Answer], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Answer:
        """Calls a function of this module, unless its last answer still counts.

        Args:
            function: The function.
            *arguments: Its arguments, which can be hashed. Answers are kept by them.
            **options: Further arguments, by which answers are not told apart.

        Raises:
            NoAnswer: Slurm does not answer, or did not the last time.
        """
        question = (function.__name__, arguments)
        asked_at, answer = self._kept.get(question, (float("-inf"), None))
        if time.monotonic() - asked_at >= self.seconds:
            try:
                answer = function(*arguments, **options)
            except NoAnswer as error:
                # Kept as well, so that a controller that does not answer is not asked again at once.
                answer = error
            now = time.monotonic()
            self._kept = {key: kept for key, kept in self._kept.items() if now - kept[0] < self.seconds}
            self._kept[question] = (now, answer)
        if isinstance(answer, NoAnswer):
            raise answer
        return cast(Answer, answer)
