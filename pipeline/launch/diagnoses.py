"""The table of failures: how each is recognized, whether another attempt is made, and the sentence about it.

The same sentence reaches the log, the decision of the launch, `atom status` and the alert: a rank writes it
(`report_failure`), or the job's script (post_mortem.sh.jinja), or `atom status` for a job whose script never ran.
MLflow gets what a rank writes.

Faults of the operating system have their own table (os_errors.py), by number; `rows` lists them here as well. Reasons
for which a job waits are in waiting_reasons.py. Sentences are templates: {nodes} is the list of nodes in Slurm's
notation, {detail} what was seen there.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import os_errors
from pipeline.core.environment import node_name
from pipeline.core.errors import AtomError, Failure, Interrupted, Kind, installing
from pipeline.core.progress import duration
from pipeline.core.store import Store

AGAIN = "`atom retry` resumes it"
RETRY = "by `atom retry`"
NO_HOME_CODE = 69
"""The exit code on a node without the run's files: EX_UNAVAILABLE of sysexits.h."""


@dataclass(frozen=True)
class Diagnosis:
    """One row of the table.

    states: final states of a job, by Slurm. code: its exit code. pattern: an extended regular expression, for grep and
    for Python: in what srun reports or in an exception's message. bad_node: whether the node is avoided from then on.
    attempt: whether another attempt is made, if its kind does not decide that.
    """

    name: str
    signs: str
    kind: Kind
    sentence: str
    states: tuple[str, ...] = ()
    code: str = ""
    pattern: str = ""
    bad_node: bool = False
    attempt: str = ""

    def text(self, **fields: str) -> str:
        """The sentence with its fields filled in. A field that is not known is said to be unknown."""
        return self.sentence.format_map(_Fields(fields))


class _Fields(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return {"nodes": "an unknown node", "user": "somebody", "job": "of it"}.get(name, "not known")


MEMORY = Diagnosis(
    "out of memory", "state `OUT_OF_MEMORY`, or an `oom_kill` that srun reports", Kind.MACHINE,
    "memory of {nodes} ran out: requested {requested}, the most that Slurm saw in use {used}; raise memory_gb of the "
    "profile, or split the stage over more ranks",
    states=("OUT_OF_MEMORY",), pattern="oom[-_]kill|OOM Killed|Out Of Memory|[Ee]xceeded memory limit",
)  # fmt: skip
TIME_LIMIT = Diagnosis(
    "time limit", "state `TIMEOUT` or `DEADLINE`: the stage was signaled, and did not save in time", Kind.MACHINE,
    "its time limit came on {nodes} before it saved: requested {requested}, used {used}; raise minutes or "
    f"signal_before_limit_seconds of the profile, and {AGAIN}",
    states=("TIMEOUT", "DEADLINE"), attempt=RETRY,
)  # fmt: skip
PREEMPTED = Diagnosis(
    "preemption", "state `PREEMPTED`: Slurm gave the nodes away, and did not queue the job again", Kind.STOPPED,
    f"a job of higher priority took {{nodes}}, and Slurm did not queue this one again; {AGAIN}",
    states=("PREEMPTED", "REVOKED"), attempt=RETRY,
)  # fmt: skip
NODE_FAILED = Diagnosis(
    "node failure", "state `NODE_FAIL` or `BOOT_FAIL`; Slurm itself starts the job again if it may", Kind.MACHINE,
    f"Slurm lost a node of {{nodes}}; see `sinfo -R`, and {AGAIN} on others",
    states=("NODE_FAIL", "BOOT_FAIL"), attempt=RETRY,
)  # fmt: skip
NOT_LAUNCHED = Diagnosis(
    "launch failure", "exit code 0:53: the node could not start the job's script", Kind.MACHINE,
    "node {nodes} could not start the job's script (exit code 0:53); see that it mounts $ATOM_HOME and that its disks "
    f"are not full, then {AGAIN} on others",
    code="0:53", bad_node=True, attempt=RETRY,
)  # fmt: skip
NO_HOME = Diagnosis(
    "no home folder", f"exit code {NO_HOME_CODE} of a rank or of the job's script: it finds no files of the run",
    Kind.MACHINE,
    "node {nodes} does not see the run in $ATOM_HOME; mount it there as on the other nodes",
    code=f"{NO_HOME_CODE}:0", bad_node=True,
)  # fmt: skip
CANCELLED = Diagnosis(
    "cancelled", "state `CANCELLED`; the accounting says by whom", Kind.STOPPED,
    "{user} cancelled its job; `atom retry` submits it again",
    states=("CANCELLED",), attempt=RETRY,
)  # fmt: skip
NEVER_STARTED = Diagnosis(
    "cancelled dependent", "state `CANCELLED`, reason `DependencyNeverSatisfied`", Kind.STOPPED,
    "Slurm cancelled its job, because a job that it waited for did not succeed; `atom retry` submits both again",
    attempt=RETRY,
)  # fmt: skip
SETUP = Diagnosis(
    "failed module or setup", "a `module load` or a line of `setup` with another exit code than 0", Kind.MACHINE,
    "{detail} on node {nodes}; see that the module exists there, or change modules or setup of the profile",
    bad_node=True,
)  # fmt: skip
SETUP_ANYWHERE = Diagnosis(
    "missing module", "the same on two nodes, and on no node otherwise", Kind.USER,
    "{detail} on each of {nodes}; correct modules or setup of the profile",
)  # fmt: skip
NO_PYTHON = Diagnosis(
    "no Python on one node", "rank 0 left no decision, and Python with the stage's code does not start on that node",
    Kind.MACHINE,
    "Python did not start on {nodes} ({detail}); see its local disk, its mounts and the container runtime",
    bad_node=True,
)  # fmt: skip
NO_PYTHON_ANYWHERE = Diagnosis(
    "missing image or interpreter", "the same on two or more nodes, and on no node otherwise", Kind.USER,
    "Python starts on none of {nodes} ({detail}); correct python or container.image of the profile, or its mounts",
)  # fmt: skip
LOST = Diagnosis(
    "a lost rank", "a signal ended a rank before it could say why, by what srun reports", Kind.MACHINE,
    "node {nodes} lost a rank ({detail}); see the stage's log, and the system's log of that node",
)  # fmt: skip
LOST_TWICE = Diagnosis(
    "a rank lost twice",
    "a signal ended a rank on the same node in any two launches in a row, and memory was not the cause",
    Kind.MACHINE,
    "node {nodes} lost a rank in two launches in a row ({detail}); see the system's log of that node",
    bad_node=True,
)  # fmt: skip
PREFLIGHT = Diagnosis(
    "preflight check", "scratch, clock, GPUs or `$ATOM_HOME` of one node, before the stage begins", Kind.MACHINE,
    "{detail}", bad_node=True,
)  # fmt: skip
DEVICE = Diagnosis(
    "device", "an uncorrectable ECC error, a GPU off the bus, a failed NVLink or driver, in the error of a rank",
    Kind.MACHINE,
    "a GPU of node {nodes} failed ({detail}); have its driver and hardware checked, and run the same command to go on",
    pattern="uncorrectable (ECC|NVLink) error|ECC error|fallen off the bus|Xid [(]|NVRM: Xid|no CUDA-capable device|"
    "driver (shutting down|initialization failed)|CUDA_ERROR_(ECC|NVLINK|SYSTEM)|hardware stack error|"
    "system not yet initialized|is/are busy or unavailable",
    bad_node=True,
)  # fmt: skip
DETERMINISTIC = Diagnosis(
    "deterministic error", "kind `user` or `check`; kind `bug`, if the same exception ends two attempts at one place",
    Kind.USER, "{detail}",
)  # fmt: skip
NO_ACCOUNTING = Diagnosis(
    "lost accounting", "`sacct` does not answer", Kind.MACHINE,
    "{detail}; the outcome of jobs that Slurm has forgotten is unknown", attempt="as recorded",
)  # fmt: skip
LOST_JOB = Diagnosis(
    "lost job", "neither the queue nor the accounting has the job", Kind.MACHINE,
    "Slurm no longer has its job (a later job may have the id {job}); `atom retry` submits it again", attempt=RETRY,
)  # fmt: skip
HIDDEN_JOB = Diagnosis(
    "hidden job", "Slurm shows no jobs of other users (`PrivateData`), and this one is another's", Kind.MACHINE,
    "Slurm shows jobs of {detail} to no other user; what the stage recorded itself is all that is known",
    attempt="as recorded",
)  # fmt: skip
NO_DECISION = Diagnosis(
    "no decision", "the job's script ended without a decision of rank 0, and nothing above applies", Kind.MACHINE,
    "the stage left no decision on {nodes}, srun's exit code is {detail}; see its log",
)  # fmt: skip
TABLE = (
    MEMORY, TIME_LIMIT, PREEMPTED, NODE_FAILED, NOT_LAUNCHED, NO_HOME, CANCELLED, NEVER_STARTED, SETUP,
    SETUP_ANYWHERE, NO_PYTHON, NO_PYTHON_ANYWHERE, LOST, LOST_TWICE, PREFLIGHT, DEVICE, DETERMINISTIC, NO_ACCOUNTING,
    LOST_JOB, HIDDEN_JOB, NO_DECISION,
)  # fmt: skip
ATTEMPTS = {
    Kind.MACHINE: "at most `restarts` without progress",
    Kind.STOPPED: "resumes",
    Kind.USER: "none",
    Kind.CHECK: "none",
    Kind.BUG: "one",
}
"""Whether another attempt is made, by kind."""
FILE_SYSTEM = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""The faults of file systems that `rows` lists."""


def of_job(state: str, code: str) -> Diagnosis | None:
    """The diagnosis of an ended job that left no outcome. state, code: as accounting has them."""
    by_code = next((row for row in TABLE if row.code and row.code == code), None)
    return by_code or next((row for row in TABLE if state in row.states), None)


def of_error(error: BaseException) -> tuple[Diagnosis, str] | None:
    """The diagnosis of a rank's exception, from its message and those of its causes, with the line that shows it.

    Only a RuntimeError counts, as PyTorch and NCCL raise it: other text may quote anything.
    """
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return None
        if isinstance(cause, RuntimeError):
            for line in str(cause).splitlines():
                if re.search(DEVICE.pattern, line):
                    return DEVICE, line.strip()[:300]
        cause = cause.__cause__ or cause.__context__
    return None


def script_values() -> Mapping[str, Diagnosis]:
    """The rows that the job's script recognizes, by the name that its template has for them."""
    return {
        "memory": MEMORY,
        "no_home": NO_HOME,
        "setup": SETUP,
        "setup_anywhere": SETUP_ANYWHERE,
        "no_python": NO_PYTHON,
        "no_python_anywhere": NO_PYTHON_ANYWHERE,
        "lost": LOST,
        "lost_twice": LOST_TWICE,
        "no_decision": NO_DECISION,
    }


def rows() -> Iterator[tuple[str, str, str, str, str]]:
    """The table for the documentation: failure, signs, another attempt, whether the node is avoided, sentence."""
    for row in TABLE:
        avoided = "yes" if row.bad_node else ""
        attempt = row.attempt or ATTEMPTS[row.kind]
        yield row.name, row.signs, attempt, avoided, re.sub(r"{(\w+)}", lambda m: m[1].upper(), row.sentence)
    for number in FILE_SYSTEM:
        fault = os_errors.FAULTS[number]
        sentence = fault.text.format(place="PATH")
        yield errno.errorcode[number], "the error's number, in any wrapper", ATTEMPTS[fault.kind], "", sentence


def report_failure(error: BaseException, node: str, stage: str, store: Store) -> Failure:
    """Prints the sentence to the log, below the traceback of a bug; returns it with its kind."""
    failure = Failure(failure_message(error, stage, store), failure_kind(error, store))
    if device := of_error(error):
        diagnosis, line = device
        failure = Failure(diagnosis.text(nodes=node_name(), detail=line), diagnosis.kind, bad_node=node_name())
    elif failure.kind is Kind.MACHINE and "SLURMD_NODENAME" in os.environ:
        # a disk or a route may be the node's alone
        failure = Failure(f"node {node_name()}: {failure.text}", failure.kind)
    if failure.kind is Kind.BUG:
        traceback.print_exc()
    print(f"{node}: {failure.text}", file=sys.stderr, flush=True)
    return failure


def failure_kind(error: BaseException, store: Store) -> Kind:
    """The kind of a stage's exception, which decides the exit code and whether another attempt is made."""
    if isinstance(error, Interrupted):
        return Kind.STOPPED
    if fault := _fault(error, store):
        return fault.kind
    if isinstance(error, AtomError):
        return error.kind
    if isinstance(error, ImportError) and _is_third_party(error):
        return Kind.USER
    return Kind.BUG


def failure_message(error: BaseException, stage: str, store: Store) -> str:
    """The problem and the remedy as one sentence."""
    if isinstance(error, Interrupted):
        return f"stopped on request ({error}{_before_limit(str(error))}); run the same command to go on"
    if fault := _fault(error, store):
        machine_message = f"stage {stage} failed by its machine or network ({error}); {os_errors.AGAIN}".replace(
            "\n", " "
        )
        return fault.text or machine_message
    if isinstance(error, AtomError):
        return str(error)
    if isinstance(error, ImportError) and _is_third_party(error):
        return f"stage {stage} needs {error.name}; {installing('data,train')}, and the same command again"
    return f"a bug in stage {stage}: {type(error).__name__}: {error}; the traceback is in its log".replace("\n", " ")


def _before_limit(signal_name: str) -> str:
    """The time between the signal to save and the time limit of the Slurm job, in words. Slurm signals a job shortly
    before the limit, and for a preemption."""
    start, end = (os.environ.get(f"SLURM_JOB_{name}_TIME", "") for name in ("START", "END"))
    if signal_name != "SIGUSR2" or not (start.isdigit() and end.isdigit()):
        return ""
    return f", {duration(max(0.0, int(end) - time.time()))} before its time limit of {duration(int(end) - int(start))}"


def _fault(error: BaseException, store: Store) -> os_errors.Fault | None:
    """The fault of the operating system. An AtomError has its own sentence, unless a disk caused it."""
    if isinstance(error, AtomError):
        return os_errors.device(error, store.home)
    return os_errors.find(error, store.home)


def _is_third_party(error: ImportError) -> bool:
    """Returns True if a third-party package is missing."""
    return (error.name or "").split(".")[0] not in ("pipeline", "stages", "release")


def strip_paths(text: str, home: Path) -> str:
    """Removes the folders of a machine from a sentence, because statements are published."""
    text = re.sub(rf"{re.escape(str(home))}(?![\w-]|\.\w)", "$ATOM_HOME", text)
    return re.sub(r"(?<![\w$./:])/[^\s:;,()'\"]+/([^\s:;,()'\"/]+)", r"…/\1", text)
