"""The table of reasons for which a job waits in Slurm: one sentence for each, and whether a person must act.

`squeue` shows either a name of Slurm's list (`job_state_reason_string`; job_reason_codes in Slurm's documentation) or a
text of the controller. A reason that is in neither has the sentence of `UNKNOWN`, so no sentence is about another
reason. Sentences are templates: {reason} is Slurm's own word, {job} the id, {partition} the partition.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.launch.slurm_client import Answers, Job, NoAnswer

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
"""The states of a job in which the reason says why it waits."""
RESUBMIT = "`atom cancel` it, correct the profile, and submit again"
RELEASE = "`scontrol release {job}` lets it start"


@dataclass(frozen=True)
class WaitingReason:
    """One row of the table.

    Attributes:
        name: A short name of the cause.
        reasons: The whole reason as Slurm shows it, as a regular expression.
        sentence: The template of the sentence.
        alert: True if the job does not start before a person acts, or if a person should know.
    """

    name: str
    reasons: str
    sentence: str
    alert: bool = False


_RESOURCE = "(BB|Billing|Cpu|CPU|Energy|GRES|License|Mem|Memory|Node|Unknown)"
MAINTENANCE = WaitingReason(
    "maintenance",
    "ReqNodeNotAvail, Reserved for maintenance",
    "its nodes are reserved for maintenance ({reason}): {reservation}",
    True,
)
RESERVATION = WaitingReason(
    "reservation",
    "Reservation",
    "the reservation that it asks for has not begun, is full or is over ({reason}): {reservation}",
    True,
)
UNAVAILABLE = WaitingReason(
    "unavailable nodes",
    r"ReqNodeNotAvail, UnavailableNodes:\S+|NodeDown|FrontEndDown",
    "it waits for nodes that are down or drained ({reason}; {nodes}); have them repaired, or wait for others",
    True,
)
HIGHER_PARTITION = WaitingReason(
    "nodes of other partitions",
    "Nodes required for job are DOWN, DRAINED.* or reserved for jobs in higher priority partitions",
    "its nodes are down, drained or kept for partitions of higher priority; down or drained: {nodes}",
)
LAUNCH_FAILED = WaitingReason(
    "held after a failed launch",
    "launch failed requeued held|launch failure limit exceeded requeued held",
    "Slurm holds the job because a node could not launch it ({reason}; {nodes}); `atom retry` releases it",
    True,
)
UNKNOWN = WaitingReason(
    "unknown", "", "Slurm names a reason that atom does not know: {reason}; see `scontrol show job {job}`"
)
TABLE = (
    WaitingReason("its turn", "Priority", "jobs of higher priority come first ({reason})"),
    WaitingReason("resources", "Resources", "it waits until other jobs leave it enough nodes ({reason})"),
    WaitingReason(
        "not considered yet", "WaitingForScheduling|SchedDefer", "Slurm has not considered it yet ({reason})"
    ),
    WaitingReason(
        "dependency", "Dependency", "it waits for the jobs of its inputs, or for its first server ({reason})"
    ),
    WaitingReason(
        "begin time", "BeginTime", "Slurm starts it no earlier than a set time, as after each requeue ({reason})"
    ),
    WaitingReason(
        "array",
        "JobArrayTaskLimit",
        "as many tasks of its array run as array_tasks of the profile allows ({reason})",
    ),
    WaitingReason("licenses", "Licenses", "all licenses that it asks for are taken ({reason})"),
    WaitingReason(
        "features", "Constraints", "no nodes with the features that it asks for are available now ({reason})"
    ),
    WaitingReason("last start", "Cleaning", "Slurm still cleans up after its last start ({reason})"),
    WaitingReason("prolog", "Prolog", "the prolog of its nodes still runs ({reason})"),
    WaitingReason(
        "burst buffer", "BurstBufferResources|BurstBufferStageIn", "its burst buffer is not ready ({reason})"
    ),
    WaitingReason(
        "failed burst buffer",
        "BurstBufferOperation|Burst buffer .*",
        "its burst buffer failed ({reason}); ask the administrators of the cluster",
        True,
    ),
    WaitingReason(
        "cloud nodes", "MaxPoweredUpNodes", "as many nodes are powered up as the site allows at once ({reason})"
    ),
    WaitingReason("ports", "MpiPortsBusy", "the ports for MPI on its nodes are taken ({reason})"),
    WaitingReason("federation", "FedJobLock", "the clusters of the federation have not agreed on it yet ({reason})"),
    WaitingReason(
        "kept nodes",
        "ReqNodeNotAvail, May be reserved for other job",
        "nodes that it needs may be kept for another job ({reason})",
    ),
    WaitingReason(
        "nodes",
        "ReqNodeNotAvail|ReqNodeNotAvail, UnavailableNodes:",
        "some of the nodes that it needs are in use, reserved or down ({reason})",
    ),
    HIGHER_PARTITION,
    UNAVAILABLE,
    MAINTENANCE,
    RESERVATION,
    WaitingReason(
        "missing reservation",
        "ReservationDeleted|ReservationInvalid",
        f"the reservation that it asks for does not exist any more ({{reason}}); {RESUBMIT}",
        True,
    ),
    WaitingReason(
        "closed partition",
        "PartitionDown|PartitionInactive",
        "partition {partition} is closed ({reason}): its jobs wait until an administrator opens it",
        True,
    ),
    WaitingReason(
        "held by its user",
        "JobHeldUser",
        f"the job is held by its user or a coordinator of the account ({{reason}}); {RELEASE}",
        True,
    ),
    WaitingReason(
        "held by an administrator",
        "JobHeldAdmin",
        f"an administrator holds the job, and alone can release it ({{reason}}); {RELEASE}",
        True,
    ),
    WaitingReason(
        "requeued and held",
        "job requeued in held state|job requeued in special exit state",
        f"the job was requeued and is held ({{reason}}); {RELEASE}",
        True,
    ),
    WaitingReason(
        "too many requeues",
        "JobHoldMaxRequeue",
        f"the job was requeued as often as the site allows, and is held ({{reason}}); {RELEASE}",
        True,
    ),
    LAUNCH_FAILED,
    WaitingReason(
        "used-up account",
        f"AssocGrp{_RESOURCE}Minutes(Limit)?|AssociationTimeLimit",
        "its account has used up what it was granted ({reason}); ask for more, or submit under another account",
        True,
    ),
    WaitingReason(
        "used-up QOS",
        f"QOSGrp{_RESOURCE}Minutes(Limit)?|QOSTimeLimit|QOSUsageThreshold",
        "its QOS has used up what it was granted ({reason}); ask for more, or submit under another QOS",
        True,
    ),
    WaitingReason(
        "limit of the account",
        f"AssocGrp{_RESOURCE}(RunMinutes)?(Limit)?|AssocGrp(Jobs|SubmitJobs|Wall)Limit|Association(Job|Resource)Limit|"
        f"Max(Jobs|SubmitJobs|{_RESOURCE})PerAccount|Max{_RESOURCE}RunMinsPerAccount",
        "jobs of its account have as much as a limit allows ({reason}): it starts when others end",
        True,
    ),
    WaitingReason(
        "limit of the QOS",
        f"QOSGrp{_RESOURCE}(RunMinutes)?(Limit)?|QOSGrp(Jobs|SubmitJobs|Wall)Limit|QOS(Job|Resource)Limit",
        "jobs of its QOS have as much as a limit allows ({reason}): it starts when others end",
        True,
    ),
    WaitingReason(
        "limit of the user",
        f"AssocMax(Jobs|SubmitJob)Limit|QOSMax(Jobs|SubmitJob|{_RESOURCE})PerUser(Limit)?|Max{_RESOURCE}RunMinsPerUser",
        "jobs of its user have as much as a limit of the account or QOS allows ({reason}): it starts when others end",
        True,
    ),
    WaitingReason(
        "limit of a job",
        f"(Assoc|QOS)Max{_RESOURCE}(Minutes)?Per(Job|Node)(Limit)?|(Assoc|QOS)MaxWallDurationPerJobLimit|"
        f"QOSMin({_RESOURCE}|CpuNotSatisfied)|MaxMemPerLimit",
        f"it asks for more or less than a limit allows a job of its account or QOS ({{reason}}); {RESUBMIT}",
        True,
    ),
    WaitingReason(
        "limit of the partition",
        "PartitionTimeLimit|PartitionConfig",
        f"it asks for more than partition {{partition}} allows ({{reason}}); {RESUBMIT}",
        True,
    ),
    WaitingReason(
        "nodes of the partition",
        "PartitionNodeLimit",
        "it asks for more nodes than partition {partition} allows, or nodes of it are down ({reason}); "
        "see `sinfo -p {partition}`, and change nodes of the profile if they will not come back",
        True,
    ),
    WaitingReason(
        "impossible request",
        "BadConstraints|DeadLine",
        f"the job can never start as it is requested ({{reason}}); {RESUBMIT}",
        True,
    ),
    WaitingReason(
        "account or QOS",
        "InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed|AccountingPolicy",
        f"Slurm does not accept its account or QOS ({{reason}}); {RESUBMIT}",
        True,
    ),
    WaitingReason(
        "failed dependency",
        "DependencyNeverSatisfied",
        "a job that it waits for did not succeed, so it never starts ({reason}); `atom retry` submits both again",
        True,
    ),
    WaitingReason(
        "ended reservation",
        r"Reservation \S+, which this job was running under, has ended",
        "its last start ended ({reason}), and Slurm starts it again in its turn",
    ),
    WaitingReason(
        "failed start",
        "SystemFailure|JobLaunchFailure|NonZeroExitCode|RaisedSignal|TimeLimit|InactiveLimit|OutOfMemory",
        "its last start ended ({reason}), and Slurm starts it again in its turn",
    ),
)


def fits(row: WaitingReason, reason: str) -> bool:
    """Whether a row is that of a reason as Slurm shows it."""
    return re.fullmatch(row.reasons, reason) is not None


def find(reason: str) -> WaitingReason:
    """The row of a reason; `UNKNOWN` if no row has it."""
    return next((row for row in TABLE if fits(row, reason)), UNKNOWN)


def explain(job: Job, answers: Answers) -> tuple[WaitingReason, str] | None:
    """The row and the sentence about a job that waits; None if it does not wait, or if Slurm names no reason."""
    if job.state not in WAITING or not job.reason:
        return None
    row = find(job.reason)
    fields = {"reason": job.reason, "job": job.id, "partition": job.partition}
    if "{nodes}" in row.sentence:
        fields["nodes"] = _ask(answers.unavailable_nodes, "see `sinfo -R`") or "none"
    if "{reservation}" in row.sentence:
        name = None if row is MAINTENANCE else job.reservation
        fields["reservation"] = _ask(lambda: answers.reservation(name), "see `scontrol show reservation`")
    return row, row.sentence.format_map(fields)


def _ask(question: Callable[[], str], otherwise: str) -> str:
    """The answer of Slurm; `otherwise` if there is none."""
    try:
        return question()
    except NoAnswer:
        return otherwise


def rows() -> Iterator[tuple[str, str, str, str]]:
    """The table for the documentation: cause, Slurm's reasons with * for any text, alert, sentence."""
    for row in (*TABLE, UNKNOWN):
        words = re.sub(r"\([^()]*\)\??|\\S\+|\.\*", "*", row.reasons)
        words = re.sub(r"\*+", "*", re.sub(r"\([^()]*\)\??", "*", words))  # groups within groups
        reasons = ", ".join(f"`{word}`" for word in dict.fromkeys(words.split("|")) if word)
        sentence = re.sub(r"{(\w+)}", lambda match: match[1].upper(), row.sentence)
        yield row.name, reasons or "any other", "yes" if row.alert else "", sentence
