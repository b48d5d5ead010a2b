"""The table of reasons for which a job waits in Slurm: one sentence for each, and whether a person must act.

`squeue` shows either a name of Slurm's list (`job_state_reason_string`; job_reason_codes in Slurm's documentation) or a
text of the controller. A reason that is in neither has the sentence of `UNKNOWN`, so no sentence is about another
reason. Slurm's own word follows each sentence. Sentences are templates: {job} is the id, {partition} the partition,
{nodes} the nodes that are down or drained, {reservation} a reservation with its times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from pipeline.launch import slurm_client
from pipeline.launch.slurm_client import Answers, Job, NoAnswer

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
"""The states of a job in which the reason says why it waits."""
_RESUBMIT = "`atom cancel` it, correct the profile, and submit again"
_RELEASE = "`scontrol release {job}` lets it start"
_RESOURCE = "(BB|Billing|Cpu|CPU|Energy|GRES|License|Mem|Memory|Node|Unknown)"


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


def _turn(name: str, reasons: str, sentence: str) -> WaitingReason:
    """A row about a job that starts by itself."""
    return WaitingReason(name, reasons, sentence)


def _alert(name: str, *reasons: str, sentence: str) -> WaitingReason:
    """A row about a job that needs a person."""
    return WaitingReason(name, "|".join(reasons), sentence, alert=True)


MAINTENANCE = _alert(
    "maintenance",
    "ReqNodeNotAvail, Reserved for maintenance",
    sentence="its nodes are reserved for maintenance, {reservation}",
)
UNKNOWN = _turn("unknown", "", "Slurm names a reason that atom does not know; see `scontrol show job {job}`")
TABLE = (
    _turn("its turn", "Priority", "jobs of higher priority come first"),
    _turn("resources", "Resources", "it waits until other jobs leave it enough nodes"),
    _turn("not considered yet", "WaitingForScheduling|SchedDefer", "Slurm has not considered it yet"),
    _turn("dependency", "Dependency", "it waits for the jobs of its inputs, or for its first server"),
    _turn("begin time", "BeginTime", "Slurm starts it no earlier than a set time, as after each requeue"),
    _turn("array", "JobArrayTaskLimit", "as many tasks of its array run as array_tasks of the profile allows"),
    _turn("licenses", "Licenses", "all licenses that it asks for are taken"),
    _turn("features", "Constraints", "no nodes with the features that it asks for are available now"),
    _turn("last start", "Cleaning", "Slurm still cleans up after its last start"),
    _turn("prolog", "Prolog", "the prolog of its nodes still runs"),
    _turn("burst buffer", "BurstBufferResources|BurstBufferStageIn", "its burst buffer is not ready"),
    _turn("cloud nodes", "MaxPoweredUpNodes", "as many nodes are powered up as the site allows at once"),
    _turn("ports", "MpiPortsBusy", "the ports for MPI on its nodes are taken"),
    _turn("federation", "FedJobLock", "the clusters of the federation have not agreed on it yet"),
    _turn(
        "kept nodes",
        "ReqNodeNotAvail, May be reserved for other job",
        "nodes that it needs may be kept for another job",
    ),
    _turn(
        "nodes",
        "ReqNodeNotAvail|ReqNodeNotAvail, UnavailableNodes:",
        "some of the nodes that it needs are in use, reserved or down",
    ),
    _turn(
        "nodes of other partitions",
        "Nodes required for job are DOWN, DRAINED.* or reserved for jobs in higher priority partitions",
        "its nodes are down, drained or kept for partitions of higher priority; down or drained: {nodes}",
    ),
    _turn(
        "failed start",
        "SystemFailure|JobLaunchFailure|NonZeroExitCode|RaisedSignal|TimeLimit|InactiveLimit|OutOfMemory",
        "its last start ended for that reason, and Slurm starts it again in its turn",
    ),
    _turn(
        "ended reservation",
        r"Reservation \S+, which this job was running under, has ended",
        "the reservation of its last start ended, and Slurm starts it again in its turn",
    ),
    MAINTENANCE,
    _alert(
        "unavailable nodes",
        r"ReqNodeNotAvail, UnavailableNodes:\S+",
        "NodeDown",
        "FrontEndDown",
        sentence="it waits for nodes that are down or drained ({nodes}); have them repaired, or wait for others",
    ),
    _alert(
        "reservation",
        "Reservation",
        sentence="the reservation that it asks for has not begun, is full or is over, {reservation}",
    ),
    _alert(
        "missing reservation",
        "ReservationDeleted",
        "ReservationInvalid",
        sentence=f"the reservation that it asks for does not exist any more; {_RESUBMIT}",
    ),
    _alert(
        "closed partition",
        "PartitionDown",
        "PartitionInactive",
        sentence="partition {partition} is closed: its jobs wait until an administrator opens it",
    ),
    _alert(
        "held by its user", "JobHeldUser", sentence=f"its user or a coordinator of the account holds it; {_RELEASE}"
    ),
    _alert("held by an administrator", "JobHeldAdmin", sentence=f"an administrator holds it, and alone {_RELEASE}"),
    _alert(
        "requeued and held",
        "job requeued in held state",
        "job requeued in special exit state",
        sentence=f"it was requeued and is held; {_RELEASE}",
    ),
    _alert(
        "too many requeues", "JobHoldMaxRequeue", sentence=f"it is held after as many requeues as allowed; {_RELEASE}"
    ),
    _alert(
        "held after a failed launch",
        "launch failed requeued held",
        "launch failure limit exceeded requeued held",
        sentence="Slurm holds it because a node could not launch it ({nodes}); `atom retry` releases it",
    ),
    _alert(
        "failed burst buffer",
        "BurstBufferOperation",
        "Burst buffer .*",
        sentence="its burst buffer failed; ask the administrators of the cluster",
    ),
    _alert(
        "used-up account",
        f"AssocGrp{_RESOURCE}Minutes(Limit)?",
        "AssociationTimeLimit",
        sentence="its account has used up what it was granted; ask for more, or submit under another account",
    ),
    _alert(
        "used-up QOS",
        f"QOSGrp{_RESOURCE}Minutes(Limit)?",
        "QOSTimeLimit",
        "QOSUsageThreshold",
        sentence="its QOS has used up what it was granted; ask for more, or submit under another QOS",
    ),
    _alert(
        "limit of the account",
        f"AssocGrp{_RESOURCE}(RunMinutes)?(Limit)?",
        "AssocGrp(Jobs|SubmitJobs|Wall)Limit",
        "Association(Job|Resource)Limit",
        f"Max(Jobs|SubmitJobs|{_RESOURCE})PerAccount",
        f"Max{_RESOURCE}RunMinsPerAccount",
        sentence="jobs of its account have as much as a limit allows: it starts when others end",
    ),
    _alert(
        "limit of the QOS",
        f"QOSGrp{_RESOURCE}(RunMinutes)?(Limit)?",
        "QOSGrp(Jobs|SubmitJobs|Wall)Limit",
        "QOS(Job|Resource)Limit",
        sentence="jobs of its QOS have as much as a limit allows: it starts when others end",
    ),
    _alert(
        "limit of the user",
        "AssocMax(Jobs|SubmitJob)Limit",
        f"QOSMax(Jobs|SubmitJob|{_RESOURCE})PerUser(Limit)?",
        f"Max{_RESOURCE}RunMinsPerUser",
        sentence="jobs of its user have as much as a limit of the account or QOS allows: it starts when others end",
    ),
    _alert(
        "limit of a job",
        f"(Assoc|QOS)Max{_RESOURCE}(Minutes)?Per(Job|Node)(Limit)?",
        "(Assoc|QOS)MaxWallDurationPerJobLimit",
        f"QOSMin({_RESOURCE}|CpuNotSatisfied)",
        "MaxMemPerLimit",
        sentence=f"it asks for more or less than a limit allows a job of its account or QOS; {_RESUBMIT}",
    ),
    _alert(
        "limit of the partition",
        "PartitionTimeLimit",
        "PartitionConfig",
        sentence=f"it asks for more than partition {{partition}} allows; {_RESUBMIT}",
    ),
    _alert(
        "nodes of the partition",
        "PartitionNodeLimit",
        sentence="it asks for more nodes than partition {partition} allows, or nodes of it are down; see `sinfo -R`",
    ),
    _alert(
        "impossible request",
        "BadConstraints",
        "DeadLine",
        sentence=f"it can never start as it is requested; {_RESUBMIT}",
    ),
    _alert(
        "account or QOS",
        "InvalidAccount",
        "InvalidQOS",
        "AccountNotAllowed",
        "QOSNotAllowed",
        "AccountingPolicy",
        sentence=f"Slurm does not accept its account or QOS; {_RESUBMIT}",
    ),
    _alert(
        "failed dependency",
        "DependencyNeverSatisfied",
        sentence="a job that it waits for did not succeed, so it never starts; `atom retry` submits both again",
    ),
)


def fits(row: WaitingReason, reason: str) -> bool:
    """Returns True if a row is that of a reason as Slurm shows it."""
    return re.fullmatch(row.reasons, reason) is not None


def explain(job: Job, answers: Answers) -> tuple[WaitingReason, str] | None:
    """The row and the sentence about a job that waits; None if it does not wait, or if Slurm names no reason."""
    if job.state not in WAITING or not job.reason:
        return None
    row = next((row for row in TABLE if fits(row, job.reason)), UNKNOWN)
    fields = {"job": job.id, "partition": job.partition}
    if "{nodes}" in row.sentence:
        fields["nodes"] = "see `sinfo -R`"
        with suppress(NoAnswer):
            fields["nodes"] = answers.ask(slurm_client.unavailable_nodes) or "none"
    if "{reservation}" in row.sentence:
        name = None if row is MAINTENANCE else job.reservation
        fields["reservation"] = "see `scontrol show reservation`"
        with suppress(NoAnswer):
            fields["reservation"] = answers.ask(slurm_client.reservation, name)
    return row, f"{row.sentence.format_map(fields)} ({job.reason})"


def rows() -> Iterator[tuple[str, str, str, str]]:
    """The table for the documentation: cause, Slurm's reasons with * for any text, alert, sentence."""
    for row in (*TABLE, UNKNOWN):
        words = re.sub(r"\([^()]*\)\??|\\S\+|\.\*", "*", row.reasons)
        words = re.sub(r"\*+", "*", re.sub(r"\([^()]*\)\??", "*", words))  # groups within groups
        reasons = ", ".join(f"`{word}`" for word in dict.fromkeys(words.split("|")) if word)
        sentence = re.sub(r"{(\w+)}", lambda match: match[1].upper(), row.sentence)
        yield row.name, reasons or "any other", "yes" if row.alert else "", f"{sentence} (REASON)"
