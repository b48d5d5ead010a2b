"""What the steps of an asynchronous phase take after a kill: the sampler is a function here, so that many kills are quick.
tests/integration/rl/test_asynchronous.py kills real processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.generation.protocols import Completion
from stages.rl.algorithms.grpo import mark_dropped
from stages.rl.policy import RolloutFiles
from stages.rl.rollout import rollouts
from stages.rl.rollout.asynchronous import Intake, LiveGroups
from stages.rl.rollout.curriculum import Curriculum
from stages.rl.rollout.rollouts import Rollout
from stages.tasks import Row
from tests.fixtures import rl_fixtures
from tests.fixtures.run_fixtures import RecordingReport

SAMPLES, QUEUE = 3, 8
PHASE: Any = SimpleNamespace(
    asynchronous=SimpleNamespace(max_staleness=1), prompts_per_step=4,
    max_resample_rounds=1, num_generations=SAMPLES, queue_groups=QUEUE,
)  # fmt: skip
ROWS = [rl_fixtures.row(f"task/{level}/{n}", "letter", level, "say it") for level in (0, 1) for n in range(6)]


class Chat:
    def encode_prompt(self, row: Row) -> tuple[int, ...]:
        return 1, 2

    def response(self, completion: Completion) -> Any:
        return SimpleNamespace(text="a")


class Policy:
    """Answers with tokens that follow from the seed, and rewards that follow from the tokens."""

    chat, verifiers = Chat(), SimpleNamespace(by_name={"instructions": SimpleNamespace(version="1")})

    def __init__(self, serves_many: bool) -> None:
        self.digest, self.sampler = "", SimpleNamespace(serves_many=serves_many)

    def draw(self, requests: Sequence[tuple[Row, int]]) -> list[Completion]:
        return [Completion((seed % 90, 5), (-1.0, -2.0), True, versions=((self.digest, 2),)) for _, seed in requests]

    def score(self, rows: Sequence[Row], completions: Sequence[Completion]) -> list[dict[str, float]]:
        return [{"reward": float(c.ids[0] % 3 == 0)} for c in completions]


def mark(answers: list[Rollout]) -> list[Rollout]:
    return [replace(r, group=answers[0].group) for r in mark_dropped(answers, SAMPLES)[0]]


Taken = dict[int, tuple[list[Rollout], dict[str, Any]]]


def take(folder: Path, start: int, state: Any, log: list[dict[str, Any]], upto: int, name: str, many: bool) -> Taken:
    """{step: its answers, the state after it} of the steps after `start`, whose policies are `name`<version>."""
    curriculum = Curriculum(ROWS, "test", 0)
    intake, policy, taken = Intake(PHASE, curriculum, "test", 0), Policy(many), {}
    if state is not None:
        curriculum.load(state["curriculum"])
        intake.load(state["queue"])
    files: Any = RolloutFiles(folder, RecordingReport())
    live = LiveGroups(files, policy, PHASE, start)  # type: ignore[arg-type]
    intake.begin(live, log)
    try:
        for step in range(start + 1, upto + 1):
            policy.digest = f"{name}{step - 1}" if step > start + 1 else f"first{step - 1}"
            answers = intake.take(step, policy.digest, mark)
            log.append({"step": step, "policy": policy.digest})
            taken[step] = answers, {"curriculum": curriculum.copy(), "queue": intake.state()}
    finally:
        live.close()
        live.join()
    return taken


@pytest.mark.parametrize("seed", range(8))
def test_a_kill_counts_nothing_twice(tmp_path: Path, seed: int) -> None:
    """What was drawn after the last checkpoint is drawn again; the weights come out as before, or they do not."""
    many, equal = bool(seed % 2), bool(seed % 3)
    log: list[dict[str, Any]] = []
    before = take(tmp_path, 0, None, log, 5, "first", many)
    resumed = seed % 5
    state = before[resumed][1] if resumed else None
    log = log[:resumed]
    after = take(tmp_path, resumed, state, log, 9, "first" if equal else "other", many)
    steps: dict[int, set[int]] = {}
    for path in RolloutFiles(tmp_path, RecordingReport()).all():
        for r in rollouts.read(path):
            steps.setdefault(r.group, set()).add(r.step)
    queue = after[9][1]["queue"]
    waiting = {group["number"] for group in queue["open"]}
    assert all(len(each) == 1 for each in steps.values()), "a group was taken twice"
    assert len(waiting) == QUEUE and not waiting & steps.keys()
    assert waiting | steps.keys() == set(range(queue["issued"]))
    versions = {line["policy"]: line["step"] - 1 for line in log}
    spans = [span for step in range(resumed + 1, 10) for r in after[step][0] for span in r.versions or ()]
    assert all(versions[span["policy"]] == span["version"] for span in spans), (
        "a policy that this attempt does not have"
    )


def test_an_error_of_the_sampler_reaches_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "draw", lambda self, requests: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        take(tmp_path, 0, None, [], 1, "first", False)
