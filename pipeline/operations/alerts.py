"""Alerts on a run, from outside of its jobs: a job whose node has vanished reports nothing itself.

`alerts` computes the present alerts from files and Slurm. `Watcher` hands each of them to one shell command, and
records what was sent in a file, so that cron may call it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.core import atomic_files, json_files
from pipeline.core.log_summary import Curves, EventSummary
from pipeline.core.progress import duration
from pipeline.core.progress import stages as stage_count
from pipeline.core.store import Store
from pipeline.graph.budget import RESOURCES
from pipeline.graph.run import REFUSED, NodeStatus
from pipeline.launch import bad_nodes
from pipeline.tracking.status import ENDING, Snapshot, StageView

# The time that the command of an alert may take.
SECONDS = 30.0
# The steps for which a loss spike is an alert.
SPIKE_STEPS = 64
# The steps after which an expert without tokens is an alert: in the first ones, routers have not settled.
DEAD_STEPS = 1000
# Median step times without a report after which a stage has stalled, if these are more than the seconds of Thresholds.
STALLED_STEPS = 20.0
# The used share of a budget above which it is an alert.
BUDGET_SHARE = 0.9
# The states of a stage that does not go on by itself.
FAILED = ("failed", "lost", "damaged", ENDING)
STATE = TypeAdapter(dict[str, str])


@dataclass(frozen=True)
class Thresholds:
    """The limits beyond which something is an alert."""

    # Seconds without a report, at least.
    stalled_seconds: float = 300.0
    # On the disk of the home.
    free_gb: float = 1.0


@dataclass(frozen=True)
class Alert:
    """Something in a run that a person should know."""

    # The same as long as the alert stands.
    id: str
    kind: str
    stage: str | None
    text: str


def alerts(snapshot: Snapshot, store: Store, limits: Thresholds) -> list[Alert]:
    """Returns the present alerts of a run, the disk first: a full one causes the rest."""
    current: list[Alert] = []
    free = shutil.disk_usage(store.home).free / 1e9
    if free < limits.free_gb:
        text = f"the disk that holds {store.home} has {free:.3g} GB left; free some space"
        current.append(Alert("disk", "disk", None, text))
    current += _of_jobs([stage.status for stage in snapshot.stages])
    current += [alert for stage in snapshot.stages for alert in _of_stage(stage, snapshot.time, limits)]
    for entry in bad_nodes.read(store):
        if entry.run == snapshot.run.id:
            current.append(Alert(f"node {entry.node} {entry.until}", "avoided node", entry.stage, entry.sentence))
    for name in RESOURCES:
        limits_of_run, resource = snapshot.run.body.get("budget"), name.replace("_", " ")
        if not (limits_of_run and (limit := limits_of_run.get(name))):
            continue
        if snapshot.used[name] >= BUDGET_SHARE * limit:
            text = f"{snapshot.used[name]:,.4g} of the budget of {limit:,.10g} {resource} are used"
            current.append(Alert(f"budget {name}", "budget", None, text))
    return current


def _of_jobs(stages: Sequence[NodeStatus]) -> Iterator[Alert]:
    """Yields alerts on jobs that do not start: one for each cause, however many jobs have it."""
    causes: dict[str, list[NodeStatus]] = {}
    for stage in stages:
        if cause := REFUSED if stage.state == REFUSED else stage.alert:
            causes.setdefault(cause, []).append(stage)
    for cause, concerned in causes.items():
        first, others = concerned[0], len(concerned) - 1
        text = f"stage {first.name}: {first.message or first.reason}"
        text += f"; the same holds for {stage_count(others)} more" if others else ""
        yield Alert(f"waits {cause}", cause, first.name, text)


def _of_stage(stage: StageView, now: float, limits: Thresholds) -> Iterator[Alert]:
    name, state, curves = stage.status.name, stage.status.state, stage.curves
    if state in FAILED:
        reason = stage.status.message or stage.status.reason or "the cause is not known"
        yield Alert(f"failed {name}", "failed", name, f"stage {name} {state}: {reason}")
    slow_since = stage.events.state["slow_since"]
    if stage.status.slow and slow_since is not None and now - slow_since >= limits.stalled_seconds:
        yield Alert(f"slow rank {name}", "slow rank", name, f"stage {name}: {stage.status.slow}")
    if state != "running":
        return

    # The rest is about a stage at work.
    if stalled := _stalled(stage.events, now, limits):
        yield Alert(f"stalled {name}", "stalled", name, f"stage {name} {stalled}")
    if curves is None:
        return
    skipped = curves.points("spike")
    if skipped and stage.status.done - skipped[-1][0] <= SPIKE_STEPS:
        text = f"stage {name}: spikes so far: {curves.count('spike')}, the last one near step {skipped[-1][0]:.0f}"
        yield Alert(f"skipped {name} {skipped[-1][0]:.0f}", "loss spike", name, text)
    if dead := _dead_experts(curves):
        experts = f"{dead:.0f} experts have" if dead > 1 else "1 expert has"
        text = f"stage {name}: {experts} been dead for {DEAD_STEPS:,} steps"
        yield Alert(f"dead experts {name}", "dead experts", name, text)


def _dead_experts(curves: Curves) -> float:
    """Returns the latest count of dead experts if they are dead for long, else 0.

    There must have been one at each report of the last `DEAD_STEPS` steps.
    """
    points = curves.points("dead_experts")
    if not points or points[-1][0] - points[0][0] < DEAD_STEPS:
        return 0.0
    recent = [low for step, _, low, _ in points if step >= points[-1][0] - DEAD_STEPS]
    return points[-1][1] if min(recent) > 0 else 0.0


def _stalled(events: EventSummary, now: float, limits: Thresholds) -> str | None:
    """Returns the end of the sentence about a stage that has reported nothing for too long; None if it reports."""
    last, step = events.state["last"], events.step_seconds()
    if last is None:
        return None
    silent, allowed = now - last["time"], max(limits.stalled_seconds, STALLED_STEPS * (step or 0.0))
    if silent <= allowed:
        return None
    usual = f"; a step takes {step:.3g} s" if step else ""
    return f"has reported nothing for {duration(silent)}{usual}; see atom logs, and the node that it runs on"


@dataclass
class Watcher:
    """Sends each alert of a run once, and again only after it was over.

    Attributes:
        run: The id of the run.
        state: The file that keeps `sent`.
        command: The shell command that gets each alert. Without it nothing is sent, and the file is neither read nor
            written.
        sent: The alerts that were sent and still stand.
    """

    run: str
    state: Path
    command: str | None = None
    sent: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.command is not None:
            consequence = "all alerts that stand are sent again"
            self.sent = json_files.read_optional(self.state, STATE, consequence) or {}

    def send(self, current: list[Alert]) -> tuple[list[Alert], list[str]]:
        """Sends what was not sent yet. An alert whose command failed is sent again the next time.

        Returns:
            The alerts that are new, and a sentence for each failure of the command.

        Raises:
            OSError: The file of sent alerts cannot be written.
        """
        problems = list[str]()
        # An alert that was over is forgotten, so that it is sent again when it returns.
        self.sent = {id: text for id, text in self.sent.items() if any(alert.id == id for alert in current)}
        new = [alert for alert in current if alert.id not in self.sent]
        self._write()  # raises before anything is sent that would be sent at every look
        for alert in new:
            problem = None if self.command is None else run_command(self.command, self.run, alert)
            if problem is None:
                self.sent[alert.id] = alert.text
            else:
                problems.append(problem)
        self._write()
        return new, problems

    def _write(self) -> None:
        if self.command is not None:
            atomic_files.write(self.state, json.dumps(self.sent, indent=1, sort_keys=True) + "\n")


def run_command(command: str, run: str, alert: Alert) -> str | None:
    """Runs a shell command with an alert as JSON on its standard input, and in ATOM_RUN, ATOM_ALERT and ATOM_TEXT.

    Returns:
        None if the command succeeded, or one sentence on its failure.
    """
    body = json.dumps({"run": run, **asdict(alert)})
    variables = {"ATOM_RUN": run, "ATOM_ALERT": alert.kind, "ATOM_TEXT": alert.text}
    try:
        process = subprocess.run(
            ["sh", "-c", command],
            env={**os.environ, **variables},
            input=body,
            text=True,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the command of the alert took more than {SECONDS:.0f} s; let it end sooner"
    if process.returncode:
        message = " ".join((process.stderr or process.stdout).split())[-300:]
        return f"the command of the alert ended with exit code {process.returncode}: {message}"
    return None
