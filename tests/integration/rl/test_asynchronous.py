"""An asynchronous phase: answers are drawn while the policy is updated. Its recorded answers, taken in their order, move
the same weights; another order is named."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError, CheckFailed, Interrupted
from release.audit.replay.plan import require_same_consumption
from stages.generation.in_process import InProcess
from stages.generation.protocols import Prompt
from stages.generation.weights import Weights
from stages.mcore.hf_mapping import hf_config
from stages.rl.config import RlPhase
from stages.rl.protocols import Response, VerifierFailed
from stages.rl.rollout import generation, rollouts
from stages.rl.rollout.asynchronous import LiveGroups
from tests.fixtures import ROOT, layout_fixtures, rl_fixtures, train_fixtures
from tests.fixtures.rl_fixtures import first, place, rewrite, without_sampler  # noqa: F401 - fixtures
from tests.fixtures.run_fixtures import at_length
from tests.fixtures.sampler_fixtures import MODEL, VOCAB, tensors


def settings(**phase: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = dict(steps=6, release_checkpoint_interval=2, checkpoint_interval=1)
    defaults |= {"asynchronous": {"queue_groups": 8}}
    return rl_fixtures.config(**{**defaults, **phase})


@pytest.fixture(scope="module")
def live(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product of a run whose sampler draws all groups in the queue during an update, so that some become stale."""
    folder = tmp_path_factory.mktemp("live")
    finish = LiveGroups.finish

    def fill_queue(self: LiveGroups, step: int, answers: Any) -> None:
        finish(self, step, answers)
        deadline = time.monotonic() + 120
        while len(self.finished) < len(self.groups) and self.error is None and time.monotonic() < deadline:
            time.sleep(0.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveGroups, "finish", fill_queue)
        rl_fixtures.rlvr(place, folder / "work", folder / "out", settings())
    return folder / "out"


def test_an_answer_states_the_policy_that_drew_it() -> None:
    config = hf_config(MODEL, VOCAB, 1, 0, "float32")
    requests = [Prompt(tuple(range(6, 6 + n)), 7 * n) for n in (3, 9, 3, 17, 5)]
    one, other = InProcess(config, (1, 3), 12), InProcess(config, (1, 3), 12)
    one.load(tensors(0))
    other.load(Weights("first", tensors(0)))
    expected = [replace(c, versions=(("first", len(c.ids)),)) for c in one.generate(requests)]
    assert other.generate(requests) == expected
    other.load(Weights("second", tensors(1)))
    assert {c.versions[0][0] for c in other.generate(requests)} == {"second"}


def require_all_counted(out: Path, queue_groups: int = 8, last: int = 6) -> None:
    """Every group that was issued was taken once, or waits."""
    groups: dict[int, set[int]] = {}
    for r in rollouts.read(out / "rollouts.parquet"):
        groups.setdefault(r.group, set()).add(r.step)
    assert all(len(steps) == 1 for steps in groups.values()), "a group was taken twice"
    queue = json.loads((out / f"step-{last:06d}/state.json").read_text())["rl"]["queue"]
    waiting = {group["number"] for group in queue["open"]}
    assert len(waiting) == queue_groups and {*groups, *waiting} == set(range(queue["issued"]))
    assert not waiting & groups.keys()


def require_equal_replay(place: Path, out: Path, folder: Path, **phase: Any) -> None:
    recorded = rl_fixtures.record(out, folder / "recorded")
    rl_fixtures.rlvr(place, folder / "replay-work", folder / "replay", settings(**phase), rollouts=recorded)
    assert rl_fixtures.trained(folder / "replay") == rl_fixtures.trained(out)


@at_length("training", 40)
def test_recorded_answers_move_the_same_weights(place: Path, live: Path, tmp_path: Path, without_sampler: None) -> None:
    require_equal_replay(place, live, tmp_path)
    require_all_counted(live)


@at_length("training", 6)
def test_so_they_do_from_a_checkpoint_on(place: Path, live: Path, tmp_path: Path, without_sampler: None) -> None:
    recorded = rl_fixtures.record(live, tmp_path / "recorded")
    with pytest.raises(Interrupted):
        reporter = train_fixtures.Reporter(3, signal.SIGTERM)
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "a", settings(), reporter, rollouts=recorded)
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "b", settings(), rollouts=recorded)
    assert rl_fixtures.trained(tmp_path / "b") == rl_fixtures.trained(live)


@at_length("training", 1)
@pytest.mark.numeric
def test_answers_say_who_drew_them_and_the_log_counts(live: Path) -> None:
    answers = rollouts.read(live / "rollouts.parquet")
    lines = {line["step"]: line for line in rl_fixtures.lines(live) if "policy" in line}
    assert len({r.seed for r in answers}) == len(answers) and len({(r.group, r.sample) for r in answers}) == len(
        answers
    )
    reasons: dict[str, set[int]] = {}
    for r in answers:
        assert r.issued is not None and r.versions
        assert sum(span["tokens"] for span in r.versions) == len(r.ids) == len(r.logprobs)
        assert r.policy == r.versions[0]["policy"] and r.wave == 0
        for span in r.versions:
            assert r.issued <= span["version"] < r.step and lines[span["version"] + 1]["policy"] == span["policy"]
        reasons.setdefault(r.dropped, set()).add(r.step - 1 - r.versions[0]["version"])
    assert min(reasons["stale"]) == 2 and reasons[""] == {0, 1}, "max_staleness is 1"
    for step, line in lines.items():
        taken = [r for r in answers if r.step == step]
        assert line["consumed"] == rollouts.consumption_digest(taken) and line["answers"] == len(taken)
        kept = [r for r in taken if not r.dropped]
        ages = [(step - 1 - s["version"], s["tokens"]) for r in kept for s in r.versions or ()]
        assert line["staleness"] == pytest.approx(sum(a * n for a, n in ages) / sum(n for _, n in ages))
        assert line["max_staleness"] == max(a for a, _ in ages) <= 1
        assert sum(line["dropped"].values()) == len(taken) - len(kept)
    assert lines[1]["staleness"] == 0 and lines[2]["staleness"] == 1
    # the weight of a token is by the policy that drew it: off-policy tokens differ from the trainer's
    assert lines[1]["max_sampler_gap"] < 1e-4 < lines[2]["max_sampler_gap"]


def update_group(rows: list[dict[str, Any]], number: int, **columns: Any) -> None:
    for row in rows:
        if row["group"] == number:
            row.update(columns)


def stale(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["dropped"] == "stale")


def move_to_step(rows: list[dict[str, Any]], step: int, other: int) -> None:
    group = first(rows, step, dropped="")["group"]
    moved = [row for row in rows if row["group"] == group]
    for row in moved:
        rows.remove(row)
        row.update(step=other)
    start = next(n for n, row in enumerate(rows) if row["step"] == other)
    rows[start:start] = moved


def swap_groups(rows: list[dict[str, Any]], step: int) -> None:
    """The first two groups of a step that differ in their mean reward change places."""
    numbers = list(dict.fromkeys(row["group"] for row in rows if row["step"] == step))
    means = {n: sum(row["reward"] for row in rows if row["group"] == n) for n in numbers}
    a = numbers[0]
    b = next(n for n in numbers if means[n] != means[a])
    start = {n: next(i for i, row in enumerate(rows) if row["group"] == n) for n in (a, b)}
    for i in range(8):
        rows[start[a] + i], rows[start[b] + i] = rows[start[b] + i], rows[start[a] + i]


FORGERIES: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "a group moved to an earlier step": (
        lambda rows: move_to_step(rows, 4, 1),
        r"answer 0 in step 1, wave 0 is of group \d+, which is not issued then or was taken before",
    ),
    "a group moved to a later step": (
        lambda rows: move_to_step(rows, 2, 3),
        r"in step 2, wave 0 (is missing, and the phase asked for another|has another|is of group \d+, which is not issued)",
    ),
    "a stale group taken": (
        lambda rows: update_group(rows, stale(rows)["group"], dropped=""),
        r"answer \d+ in step \d, wave 0 has another `dropped` than follows",
    ),
    "a usable group called stale": (
        lambda rows: update_group(rows, first(rows, 2, dropped="")["group"], dropped="stale"),
        r"in step 2, wave 0 has another `dropped` than follows",
    ),
    "stale answers that claim a newer version": (
        lambda rows: stale(rows)["versions"][0].update(version=stale(rows)["step"] - 1),
        r"answer \d+ in step \d, wave 0 has another `(dropped|versions)` than follows",
    ),
    "a version before the group was issued": (
        lambda rows: first(rows, 6)["versions"][0].update(version=0),
        r"answer \d+ in step 6, wave 0 states policies that cannot have drawn its tokens",
    ),
    "a version to come": (
        lambda rows: first(rows, 4)["versions"][0].update(version=4),
        r"answer \d+ in step 4, wave 0 states policies that cannot have drawn its tokens",
    ),
    "another policy of the checkpoint": (
        lambda rows: first(rows, 1).update(
            policy="tensors-sha256:0", versions=[{**first(rows, 1)["versions"][0], "policy": "tensors-sha256:0"}]
        ),
        r"answer 0 in step 1, wave 0 states the policy tensors-sha256:0 after step 0, which is not the checkpoint's",
    ),
    "tokens of nobody": (
        lambda rows: first(rows, 2)["versions"][0].update(tokens=1000),
        r"in step 2, wave 0 states policies that cannot have drawn its tokens",
    ),
    "no versions": (
        lambda rows: first(rows, 2).update(versions=None),
        r"in step 2, wave 0 states policies that cannot have drawn its tokens",
    ),
    "a group twice": (
        lambda rows: rows.extend([{**row, "step": 6} for row in rows if row["group"] == first(rows, 5)["group"]]),
        r"in step 6, wave 0 was used by no update and dropped for no reason",
    ),
    "another number": (
        lambda rows: update_group(rows, first(rows, 2)["group"], group=77),
        r"answer 0 in step 2, wave 0 is of group 77, which is not issued then or was taken before",
    ),
    "an answer less": (
        lambda rows: rows.pop(),
        r"answer \d+ in step 6, wave 0 is missing, and the phase asked for one",
    ),
}


@at_length("training", 3)
@pytest.mark.parametrize("forgery", FORGERIES)
def test_changed_records_are_named(place: Path, live: Path, tmp_path: Path, forgery: str) -> None:
    change, sentence = FORGERIES[forgery]
    recorded = rl_fixtures.record(live, tmp_path / "recorded")
    rewrite(recorded, change)
    with pytest.raises(CheckFailed, match=sentence) as error:
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings(), rollouts=recorded)
    assert "\n" not in str(error.value)


@at_length("training", 3)
@pytest.mark.parametrize("step", [1, 6])
def test_the_log_seals_the_order(live: Path, tmp_path: Path, step: int) -> None:
    """Also where no task depends on the order, such as in the last step."""
    recorded = rl_fixtures.record(live, tmp_path / "recorded")
    log = rl_fixtures.lines(live)
    require_same_consumption(recorded / "rollouts.parquet", log)
    rewrite(recorded, lambda rows: swap_groups(rows, step))
    with pytest.raises(CheckFailed, match=f"the answers of step {step} are not those that the log says were taken"):
        require_same_consumption(recorded / "rollouts.parquet", log)


@at_length("training", 20)
def test_an_order_that_depends_on_time_is_replayed_too(place: Path, tmp_path: Path) -> None:
    """No step waits here for the queue to fill, so that the order depends on time."""
    phase: dict[str, Any] = {"asynchronous": {}, "steps": 4, "release_checkpoint_interval": 4, "validate_every": 2}
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings(**phase))
    require_equal_replay(place, tmp_path / "out", tmp_path, **phase)


@at_length("training", 25)
def test_a_sampler_that_gives_nothing_stops_the_phase(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InProcess, "_draw", lambda *_: time.sleep(2))
    monkeypatch.setattr("stages.rl.rollout.asynchronous.STARVED_SECONDS", 0.5)
    with pytest.raises(
        AtomError, match=r"step 1 waited 0.5 s for a group of answers and the sampler finished none of 4"
    ):
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings(asynchronous={}))


class NoNumber:
    """A verifier whose rewards are no numbers."""

    name, version = "no-number", "1"

    def score(self, answers: Any) -> list[dict[str, float]]:
        return [{"reward": float("nan")} for _ in answers]

    def close(self) -> None: ...


def test_a_reward_that_is_no_number_is_named() -> None:
    verifiers = generation.Verifiers({"no-number": NoNumber()}, print)  # type: ignore[dict-item]
    row = {"id": "task/1", "verifier": "no-number"}
    with pytest.raises(
        VerifierFailed, match="verifier no-number: the reward of an answer to task task/1 is nan, which is no number"
    ):
        verifiers.score([(row, Response("", "", True))])


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [
        (
            {"asynchronous": {"queue_groups": 9}},
            "queue_groups = 9 keeps answers in the queue for more than max_staleness",
        ),
        ({"asynchronous": {"max_staleness": 0}}, "max_staleness"),
        ({"sampling": {"max_new_tokens": 12, "options": ["-v"]}}, "options has no effect with kind = in-process"),
    ],
)
def test_settings_that_cannot_work_are_refused(phase: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RlPhase.model_validate(settings(**phase)["phase"])


def start(place: Path, folder: Path) -> subprocess.Popen[str]:
    arguments = [str(p) for p in (place, folder / "work", folder / "out", folder / "config.json")]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fixtures.rl_fixtures", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def rollout_files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "work/rollouts").glob("*")}


def run_ranks(place: Path, folder: Path, **env: str) -> list[int]:
    """The exit codes of two ranks of the phase in folder/config.json. As a launcher does, the one that waits for a
    killed one is killed."""
    places = [str(p) for p in (place, folder / "work", folder / "out", folder / "config.json")]
    processes = layout_fixtures.spawn("tests.fixtures.rl_fixtures", places, 2, env)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_fixtures, "GRACE", 5.0)
        codes, logs = layout_fixtures.end(processes)
    assert any(codes) == ("TEST_DISTURB" in env), logs
    return codes


@at_length("training", 60)
@pytest.mark.parametrize("layout", [{}, {"ep": 2}], ids=["dp 2", "ep 2"])
def test_two_ranks_lose_one_and_replay_bit_for_bit(place: Path, tmp_path: Path, layout: dict[str, int]) -> None:
    """Rank 0 draws for both. The other one is killed in the phase, and in its replay in the same layout."""
    recorded = tmp_path / "recorded"
    for name in ("live", "replay"):
        (tmp_path / name).mkdir()
        body = settings(parallelism={"ranks": 2, **layout}, steps=4, validate_every=4)
        (tmp_path / name / "config.json").write_text(json.dumps(body))
        env = {"TEST_ROLLOUTS": str(recorded)} if name == "replay" else {}
        assert -signal.SIGKILL in run_ranks(place, tmp_path / name, TEST_DISTURB="1 3 SIGKILL", **env)
        assert not (tmp_path / name / "out/summary.json").exists()
        run_ranks(place, tmp_path / name, **env)
        if name == "live":
            rl_fixtures.record(tmp_path / name / "out", recorded)
    require_all_counted(tmp_path / "live/out", last=4)
    assert rl_fixtures.trained(tmp_path / "replay/out") == rl_fixtures.trained(tmp_path / "live/out")


@at_length("training", 300)
@pytest.mark.parametrize("seed", range(4))
def test_kills_count_nothing_twice(place: Path, tmp_path: Path, seed: int) -> None:
    """The trainer is killed at random points, until the phase ends by itself."""
    (tmp_path / "config.json").write_text(json.dumps(settings()))
    rng, kills = random.Random(seed), 0
    while True:
        before = rollout_files(tmp_path)
        trainer = start(place, tmp_path)
        while trainer.poll() is None and (kills == 4 or rollout_files(tmp_path) == before):
            time.sleep(0.01)
        until = time.monotonic() + rng.uniform(0, 1.5)
        while trainer.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if trainer.poll() is not None:
            log = trainer.communicate()[0]
            assert trainer.returncode == 0, log
            break
        kills += 1
        trainer.kill()
        trainer.communicate()
    require_all_counted(tmp_path / "out")
    require_equal_replay(place, tmp_path / "out", tmp_path)
