"""The groups of answers of an asynchronous phase.

They are issued in numbered order, drawn while the policy is updated, and taken by the steps in the order in which they
are finished.

Timing decides that order, and nothing else: group n is issued when n + 1 - `queue_groups` groups have been taken, its
task comes from the curriculum as it is then, and its seeds from its number. So the order in which groups were taken,
with their answers, determines all tasks and updates, and a replay from `rollouts.parquet` is exact.

The groups of each step are on disk before its update, for the published file. A phase that is killed goes on from its
last checkpoint: the groups that were open there are drawn again, with their numbers and seeds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.core.errors import MachineError
from stages.formats.seeds import seed_of
from stages.rl.config import RlPhase
from stages.rl.policy import Policy, RecordedRollouts, RolloutFiles, scored, unscored
from stages.rl.rollout import rollouts
from stages.rl.rollout.curriculum import Curriculum
from stages.rl.rollout.rollouts import Rollout, Span
from stages.tasks import Row

# Seconds that a thread may take to end.
JOIN_SECONDS = 10.0
# Seconds that a step waits for a group of answers while none is finished; then the phase stops.
STARVED_SECONDS = 1500.0


@dataclass(frozen=True)
class Group:
    """A group that is issued and not yet taken.

    Attributes:
        number: Number in which it was issued.
        row: Its task.
        version: Version of the policy at that time.
        requests: (task, seed) of each answer.
    """

    number: int
    row: Row
    version: int
    requests: Sequence[tuple[Row, int]]


class Intake:
    """The groups that the steps take. Only rank 0 calls `take`; every rank holds the state."""

    def __init__(self, phase: RlPhase, curriculum: Curriculum, label: str, seed: int) -> None:
        """Takes groups for a phase.

        Args:
            phase: Settings of the phase.
            curriculum: Draws the tasks.
            label: The phase's label in its seeds.
            seed: Seed of the recipe.
        """
        assert phase.asynchronous is not None
        self.phase, self.curriculum, self.label, self.seed = phase, curriculum, label, seed
        self.max_staleness = phase.asynchronous.max_staleness
        # Number of groups that were issued so far.
        self.issued = 0
        # By number: the groups that are issued and not taken.
        self.open: dict[int, Group] = {}
        # {digest of a policy: the last step after which it was the trainer's}
        self.history: dict[str, int] = {}
        self.source: GroupSource | None = None

    def state(self) -> dict[str, Any]:
        """Returns the groups that are issued, as JSON."""
        groups = [{"number": g.number, "task": g.row["id"], "version": g.version} for g in self.open.values()]
        return {"issued": self.issued, "open": groups}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores `state`."""
        # A checkpoint names tasks by id; the tasks themselves are an artifact.
        rows = {row["id"]: row for group in self.curriculum.bins.values() for row in group}
        self.issued = state["issued"]
        groups = [self._group(g["number"], rows[g["task"]], g["version"]) for g in state["open"]]
        self.open = {group.number: group for group in groups}

    def begin(self, source: GroupSource, log: Iterable[Mapping[str, Any]]) -> None:
        """Begins to take groups. Rank 0 only.

        Args:
            source: Source of the answers.
            log: Lines of the steps so far, with their policies.
        """
        self.source = source
        self.history = {line["policy"]: line["step"] - 1 for line in log if "policy" in line}
        source.issue(self.open.values())

    def take(self, step: int, digest: str, mark: Callable[[list[Rollout]], list[Rollout]]) -> list[Rollout]:
        """Returns the answers of the groups that the step takes, in order.

        It takes groups until `prompts_per_step` can be used, or no more may be replaced.

        Rank 0 only. Raises what the source raises.

        Args:
            step: Number of the step.
            digest: Digest of the trainer's policy.
            mark: Gives the answers of a group the reason why no update uses them.
        """
        assert self.source is not None
        self.history[digest] = step - 1
        self._issue(step - 1)
        answers: list[Rollout] = []
        usable, fresh = 0, 0
        prompts = self.phase.prompts_per_step
        most_fresh = prompts * (self.phase.max_resample_rounds + 1)
        while usable < prompts and fresh < most_fresh:
            group, drawn = self.source.next(step, len(answers), self.history)
            del self.open[group.number]
            drawn = [replace(r, step=step, versions=self._spans(r)) for r in drawn]
            # A stale group is replaced too, and does not count toward the limit of resampling.
            if oldest_version(drawn) < step - 1 - self.max_staleness:
                taken = [replace(r, dropped="stale") for r in drawn]
            else:
                taken = mark(drawn)
                fresh += 1
            if taken[0].dropped not in rollouts.WHOLE_GROUPS:
                usable += 1
            # In the order in which groups are taken, which a replay repeats.
            self.curriculum.update(group.row, rollouts.pass_rate(taken))
            # Each group that is taken makes room for another.
            self._issue(step - 1)
            answers += taken
        self.source.finish(step, answers)
        return answers

    def _spans(self, answer: Rollout) -> list[Span]:
        """Returns the policies of an answer's tokens, with their versions.

        A policy that another machine recorded, whose arithmetic gives other digests, keeps the version that is stated
        there.
        """
        return [
            {**span, "version": self.history.get(span["policy"], span["version"])} for span in answer.versions or ()
        ]

    def _issue(self, version: int) -> None:
        """Issues groups until as many are open as the phase allows. version: of the policy now."""
        assert self.source is not None
        groups = []
        while len(self.open) < self.phase.queue_groups:
            (row,) = self.curriculum.draw(1, self.issued, 0)
            group = self._group(self.issued, row, version)
            groups.append(group)
            self.open[group.number] = group
            self.issued += 1
        self.source.issue(groups)

    def _group(self, number: int, row: Row, version: int) -> Group:
        """Returns a group with the seeds of its answers, which follow from its number."""
        labels = (f"{self.label}/answer/group {number}/{sample}" for sample in range(self.phase.num_generations))
        return Group(number, row, version, [(row, seed_of(label, self.seed)) for label in labels])


def oldest_version(answers: Sequence[Rollout]) -> int:
    """Returns the version of the oldest token."""
    return min(span["version"] or 0 for r in answers for span in r.versions or ())


class LiveGroups:
    """Draws and scores groups in threads."""

    def __init__(self, files: RolloutFiles, policy: Policy, phase: RlPhase, step: int) -> None:
        """Starts the threads that draw.

        Args:
            files: Files of the answers.
            policy: The policy, which draws and scores.
            phase: Settings of the phase.
            step: The last finished step. The files of later ones, which an earlier attempt left, are removed.
        """
        assert phase.asynchronous is not None and policy.sampler is not None
        self.files, self.policy = files, policy
        self.samples = phase.num_generations
        files.remove_after(step)
        # Guards what the threads share, and tells of its changes.
        self.changed = threading.Condition()
        # By number: the groups that are issued and not taken.
        self.groups: dict[int, Group] = {}
        # Groups that no thread has begun to draw.
        self.pending: list[Group] = []
        # Number and answers of the groups that are scored, in the order in which they were finished.
        self.finished: list[tuple[int, list[Rollout]]] = []
        # The error at which a thread ended.
        self.error: BaseException | None = None
        # Number of `pending` groups that may be drawn.
        self.released = 0
        # True once the threads are to end.
        self.closed = False
        # The time of the last report.
        self.since = time.monotonic()
        # Seconds since then in which the trainer waited for a group.
        self.waited = 0.0
        # Seconds that the trainer waited before the last report.
        self.all_waited = 0.0
        self.serves_many = policy.sampler.serves_many
        # A sampler that draws one call after the other gains nothing from more threads.
        threads = phase.queue_groups if self.serves_many else 1
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def issue(self, groups: Iterable[Group]) -> None:
        """Takes groups to draw."""
        for group in groups:
            self.groups[group.number] = group
            with self.changed:
                self.pending.append(group)

    def next(self, step: int, place: int, history: Mapping[str, int]) -> tuple[Group, list[Rollout]]:
        """Returns the group that was finished first, once there is one, with its answers.

        Raises the error of the sampler or a verifier, and MachineError if no group is finished in time.
        """
        start = time.monotonic()
        with self.changed:
            if not self.finished:
                self._release()
            while not self.finished:
                if self.error is not None:
                    raise self.error
                if not self.changed.wait(max(0.0, start + STARVED_SECONDS - time.monotonic())) and not self.finished:
                    raise MachineError(
                        f"step {step} waited {STARVED_SECONDS:g} s for a group of answers and the sampler finished "
                        f"none of {len(self.groups)}; see its log and run again to go on"
                    )
            self.waited += time.monotonic() - start
            number, answers = self.finished.pop(0)
        return self.groups.pop(number), answers

    def finish(self, step: int, answers: Sequence[Rollout]) -> None:
        with self.changed:
            queued = len(self.finished)
        self.files.write(step, 0, answers)
        with self.changed:
            self._release()
            now = time.monotonic()
            seconds = max(now - self.since, 1e-9)
            self.files.report.metric(step, queued_groups=queued, trainer_idle_share=self.waited / seconds)
            self.all_waited += self.waited
            self.since, self.waited = now, 0.0

    def close(self) -> None:
        """Ends the threads, once the sampler is closed too: see `join`."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def join(self) -> None:
        """Waits for the threads to end, for JOIN_SECONDS each."""
        for thread in self.threads:
            thread.join(JOIN_SECONDS)

    def _release(self) -> None:
        """Lets the threads draw all that is issued: together, where one call draws many answers."""
        self.released = len(self.pending)
        self.changed.notify_all()

    # -- the threads that draw ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Draws groups until the phase ends, or an error."""
        while groups := self._to_draw():
            try:
                self._draw(groups)
            except BaseException as error:
                with self.changed:
                    # The trainer's thread raises it when it next waits for a group.
                    self.error = error
                    self.changed.notify_all()
                return

    def _to_draw(self) -> list[Group]:
        """Returns the groups to draw at once; none if the phase ends."""
        with self.changed:
            while not self.released and not self.closed:
                self.changed.wait()
            if self.closed:
                return []
            count = 1 if self.serves_many else self.released
            groups, self.pending = self.pending[:count], self.pending[count:]
            self.released -= count
            return groups

    def _draw(self, groups: Sequence[Group]) -> None:
        """Draws and scores the groups."""
        requests = [request for group in groups for request in group.requests]
        completions = self.policy.draw(requests)

        drawn = []
        owners = [(group, sample) for group in groups for sample in range(self.samples)]
        for (group, sample), (row, seed), completion in zip(owners, requests, completions, strict=True):
            spans: list[Span] = [{"version": None, "policy": p, "tokens": n} for p, n in completion.versions]
            answer = unscored(0, 0, spans[0]["policy"], row, seed, self.policy.chat, completion)
            drawn.append(replace(answer, group=group.number, sample=sample, issued=group.version, versions=spans))
        by_group = in_groups(scored([row for row, _ in requests], drawn, self.policy), self.samples)
        with self.changed:
            self.finished += zip((group.number for group in groups), by_group, strict=True)
            self.changed.notify_all()


def in_groups(answers: Sequence[Rollout], samples: int) -> list[list[Rollout]]:
    """Returns successive answers in groups of `samples`."""
    return [list(answers[start : start + samples]) for start in range(0, len(answers), samples)]


class RecordedGroups:
    """The groups of the rollouts.parquet of an earlier run, in their order."""

    def __init__(self, files: RecordedRollouts, policy: Policy, samples: int, step: int) -> None:
        """Reads recorded groups.

        Args:
            files: The file of the earlier run.
            policy: The policy, by which the answers are checked.
            samples: Answers of a group.
            step: The last finished step, whose checkpoint the replay begins with.
        """
        self.files, self.policy, self.samples, self.start = files, policy, samples, step
        # By number: the groups that are issued and not taken.
        self.groups: dict[int, Group] = {}

    def issue(self, groups: Iterable[Group]) -> None:
        self.groups |= {group.number: group for group in groups}

    def next(self, step: int, place: int, history: Mapping[str, int]) -> tuple[Group, list[Rollout]]:
        """Returns the group that the step takes next, with its answers.

        Raises:
            CheckFailed: The answers are not those of a group that is issued, or policies drew them that did not exist
                then.
        """
        self.files.open(step)
        recorded = self.files.answers[place : place + self.samples]
        if not recorded:
            raise self.files.altered(0, place, "is missing, and the phase asked for another group")
        group = self.groups.pop(recorded[0].group, None)
        if group is None:
            raise self.files.altered(
                0, place, f"is of group {recorded[0].group}, which is not issued then or was taken before"
            )

        self.files.check(0, recorded, group.requests, self.policy, place)
        for number, r in enumerate(recorded, place):
            if not has_versions(r, group.version, step - 1):
                raise self.files.altered(0, number, "states policies that cannot have drawn its tokens")
            for span in r.versions or ():
                # Only the policy of the checkpoint: on another machine, later ones have other digests.
                if span["version"] == self.start and history.get(span["policy"]) != self.start:
                    raise self.files.altered(
                        0,
                        number,
                        f"states the policy {span['policy']} after step {self.start}, which is not the checkpoint's",
                    )

        restored = self.files.restore(0, recorded, group.requests, self.policy)
        answers = []
        for sample, (answer, r) in enumerate(zip(restored, recorded, strict=True)):
            answers.append(
                replace(answer, group=group.number, sample=sample, issued=group.version, versions=r.versions)
            )
        return group, answers

    def finish(self, step: int, answers: Sequence[Rollout]) -> None:
        """Raises CheckFailed if the step took more, or if a column is another than follows."""
        if len(self.files.answers) > len(answers):
            raise self.files.altered(0, len(answers), "was used by no update and dropped for no reason")
        self.files.write(step, 0, answers)


def has_versions(r: Rollout, issued: int, version: int) -> bool:
    """Returns True if the policies that an answer from a file states can have drawn it.

    Their spans add up to its tokens, and their versions ascend, from that at which its group was issued to the present.

    Args:
        r: The answer.
        issued: Version of the policy when its group was issued.
        version: Version of the present policy.
    """
    spans = r.versions or ()
    try:
        versions = [issued, *(span["version"] for span in spans), version]
        return (
            sum(span["tokens"] for span in spans) == len(r.ids)
            and all(span["tokens"] > 0 for span in spans)
            and versions == sorted(versions)  # type: ignore[type-var]
            and spans[0]["policy"] == r.policy
        )
    except (TypeError, IndexError):  # a value is missing
        return False


# The sources of the answers of issued groups.
GroupSource = LiveGroups | RecordedGroups
