"""On-policy distillation: the student comes closer to its teacher, on its own answers, and every stop gives the same
bytes."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.core.errors import AtomError, Interrupted
from stages.rl.config import DistillationConfig
from stages.rl.rollout import rollouts
from tests.fixtures import layout_fixtures, rl_fixtures, train_fixtures
from tests.fixtures.rl_fixtures import without_sampler  # noqa: F401 - fixtures
from tests.fixtures.run_fixtures import at_length

TEACHER = {**rl_fixtures.MODEL, "init_std": 0.3}
"""A mixture of experts, which is surer of its tokens than its dense student."""
PHASE: dict[str, Any] = {"num_generations": 2, "max_resample_rounds": 0}


def config(**phase: Any) -> dict[str, Any]:
    student = {"model": train_fixtures.DENSE, "teacher": TEACHER, "name": "distillation"}
    return {**rl_fixtures.config(**{**PHASE, **phase}), **student}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distillation")
    rl_fixtures.make(folder)
    (folder / "init").rename(folder / "mixture")
    rl_fixtures.write_policy(folder / "init", train_fixtures.DENSE, 0)
    rl_fixtures.write_policy(folder / "teacher", TEACHER, 1)
    return folder


@pytest.fixture(scope="module")
def calm(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    rl_fixtures.rlvr(place, folder / "work", folder / "out", config())
    return folder / "out"


def steps(out: Path) -> list[dict[str, Any]]:
    return [line for line in rl_fixtures.lines(out) if "teacher_gap" in line]


@pytest.mark.numeric
def test_the_student_comes_closer_to_its_teacher(place: Path, tmp_path: Path) -> None:
    settings = config(steps=16, num_generations=8, release_checkpoint_interval=16)
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings)
    gaps = [line["teacher_gap"] for line in steps(tmp_path / "out")]
    assert sum(gaps[-4:]) < 0.8 * 2 * sum(gaps[:2]), gaps  # by factors of 0.49 to 0.62 over 5 seeds


def test_every_answer_teaches_whatever_its_reward_and_its_end(calm: Path) -> None:
    answers = rollouts.read(calm / "rollouts.parquet")
    assert {r.dropped for r in answers} == {""} and len({r.wave for r in answers}) == 1
    assert any(not r.finished for r in answers) and len({r.reward for r in answers}) > 1
    for line in steps(calm):
        taught = [r for r in answers if r.step == line["step"]]
        assert len(taught) == line["answers"] == 8 and line["groups"] == 4


@pytest.mark.numeric
def test_a_teacher_that_is_the_student_teaches_nothing(place: Path, tmp_path: Path) -> None:
    """Its log-probabilities are those of the same tokens, up to the rounding of a pass with and without gradient."""
    same = {**config(steps=2, release_checkpoint_interval=2), "teacher": train_fixtures.DENSE}
    student = rl_fixtures.open_inputs(place)["init"]
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", same, teacher=student)
    first = steps(tmp_path / "out")[0]
    assert (first["teacher_gap"], first["grad_norm"]) == pytest.approx((0.0, 0.0), abs=1e-5)


def test_stopped_and_resumed_gives_the_same_bytes(place: Path, calm: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped after step 3"):
        rl_fixtures.rlvr(
            place, tmp_path / "work", tmp_path / "out", config(), train_fixtures.Reporter(3, signal.SIGTERM)
        )
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "again", config())
    assert train_fixtures.digest(tmp_path / "again") == train_fixtures.digest(calm)


def test_killed_between_checkpoints_gives_the_same_bytes(place: Path, calm: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config()))
    places = [str(p) for p in (place, tmp_path / "work", tmp_path / "out", tmp_path / "config.json")]
    codes, logs = layout_fixtures.end(
        layout_fixtures.spawn("tests.fixtures.rl_fixtures", places, 1, {"TEST_DISTURB": "0 4 SIGKILL"})
    )
    assert codes == [-signal.SIGKILL], logs
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", config())
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(calm)


def test_a_replay_asks_the_teacher_again_and_the_sampler_never(
    place: Path, calm: Path, tmp_path: Path, without_sampler: None
) -> None:
    recorded = rl_fixtures.record(calm, tmp_path / "recorded")
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", config(), rollouts=recorded)
    assert rl_fixtures.trained(tmp_path / "out") == rl_fixtures.trained(calm)


def test_an_asynchronous_phase_replays_bit_for_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two updates a step, whose gaps are those before the first one."""
    settings = config(steps=3, updates=2, asynchronous={"max_staleness": 1}, release_checkpoint_interval=3)
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings)
    recorded = rl_fixtures.record(tmp_path / "out", tmp_path / "recorded")
    monkeypatch.setattr("stages.rl.policy.make_sampler", None)
    rl_fixtures.rlvr(place, tmp_path / "replay", tmp_path / "again", settings, rollouts=recorded)
    assert rl_fixtures.trained(tmp_path / "again") == rl_fixtures.trained(tmp_path / "out")


@pytest.mark.numeric
@at_length("training", 30)
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_two_processes_learn_like_one(place: Path, tmp_path: Path, layout: dict[str, int]) -> None:
    one, two = config(steps=2), config(steps=2, parallelism={"ranks": 2, **layout})
    rl_fixtures.rlvr(place, tmp_path / "one-work", tmp_path / "one", one)
    (tmp_path / "config.json").write_text(json.dumps(two))
    places = [str(p) for p in (place, tmp_path / "work", tmp_path / "two", tmp_path / "config.json")]
    codes, logs = layout_fixtures.end(layout_fixtures.spawn("tests.fixtures.rl_fixtures", places, 2))
    assert not any(codes), logs
    names = ("loss", "grad_norm", "tokens", "teacher_gap")
    for a, b in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=1e-4, abs=1e-6)


def test_a_teacher_of_another_tokenizer_or_of_other_sizes_is_refused(place: Path, tmp_path: Path) -> None:
    other = rl_fixtures.write_policy(tmp_path / "other", TEACHER, 1, tokenizer="sha256:other")
    with pytest.raises(AtomError, match=r"^distillation: the teacher other-test was trained on another tokenizer's"):
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", config(), teacher=other)
    wide = rl_fixtures.write_policy(tmp_path / "wide", {**TEACHER, "hidden_size": 64}, 1)
    with pytest.raises(AtomError, match="wide-test"):
        rl_fixtures.rlvr(place, tmp_path / "work-2", tmp_path / "out", config(), teacher=wide)


@pytest.mark.parametrize(
    ("phase", "model", "words"),
    [
        ({"algorithm": "gspo"}, {}, "algorithm = gspo has one ratio for an answer"),
        ({"max_resample_rounds": 1}, {}, "max_resample_rounds"),
        ({"clip_high": 0.3}, {}, "clip_high = 0.3 has no effect with updates = 1"),
        ({}, {"context_length": 32}, "the teacher reads 32 tokens, and its student answers in a context of 64"),
        ({"parallelism": {"ranks": 2, "tp": 2}}, {"heads": 1, "kv_heads": 1}, "as the teacher has the layout"),
    ],
)
def test_settings_that_cannot_work_are_refused(phase: dict[str, Any], model: dict[str, Any], words: str) -> None:
    settings = config(**phase)
    with pytest.raises(ValidationError) as refused:
        DistillationConfig.model_validate({**settings, "teacher": {**settings["teacher"], **model}})
    assert words in str(refused.value)
