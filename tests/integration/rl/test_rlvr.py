"""The loop of reinforcement learning: it learns, keeps every answer, comes back from any stop, and believes no verifier
that is out of order."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from pipeline.core.errors import AtomError, Interrupted
from pipeline.core.store import write_manifest
from stages.generation.in_process import InProcess
from stages.rl.config import RlTrainConfig
from stages.rl.protocols import Response, VerifierFailed
from stages.rl.rewards.frozen_scorer import Instructions
from stages.rl.rollout import rollouts
from tests.fixtures import layout_fixtures, rl_fixtures, train_fixtures
from tests.fixtures.rl_fixtures import place  # noqa: F401 - fixtures
from tests.fixtures.run_fixtures import SOAK
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP


@NEEDS_BUBBLEWRAP
def test_what_is_promised_and_what_stands_in_the_way_are_known_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.rl.rlvr import STAGE

    def make_config(**phase: object) -> RlTrainConfig:
        return RlTrainConfig.model_validate(rl_fixtures.config(**phase))

    assert STAGE.promise(make_config()) == "bitwise"
    assert STAGE.promise(make_config(sampling={"kind": "vllm", "max_new_tokens": 12})) == "numeric"
    rows = {"source": "rows", "path": "rows.jsonl", "digest": "sha256:" + "0" * 64, "verifier": "python-tests"}
    code = make_config(tasks=[{**rows, "kind": "code", "license": "CC0-1.0", "origin": "by hand"}])
    assert STAGE.lack(make_config()) is None and STAGE.lack(code) is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no bubblewrap
    assert "tasks of the verifier python-tests run what the model writes: " in (STAGE.lack(code) or "")
    assert STAGE.lack(make_config()) is None


@pytest.fixture(scope="module")
def calm(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    rl_fixtures.rlvr(place, folder / "work", folder / "out", rl_fixtures.config())
    return folder / "out"


@pytest.mark.numeric
def test_the_policy_learns(place: Path, tmp_path: Path) -> None:
    settings = rl_fixtures.config(steps=36, release_checkpoint_interval=36)
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings)
    lines = rl_fixtures.lines(tmp_path / "out")
    passed = [x["rates"]["letter/0"] for x in lines if "rates" in x]
    assert passed[-1] > passed[0] + 0.15, passed  # by 0.55 or more over 8 seeds


def test_every_answer_is_kept_and_says_what_became_of_it(calm: Path) -> None:
    answers = rollouts.read(calm / "rollouts.parquet")
    steps = [x for x in rl_fixtures.lines(calm) if "reward" in x]
    assert (
        len(answers) == sum(x["answers"] for x in steps) == json.loads((calm / "summary.json").read_text())["answers"]
    )
    assert len({(r.step, r.wave, r.group, r.sample) for r in answers}) == len({r.seed for r in answers}) == len(answers)
    assert {r.policy for r in answers if r.step == 1} != {r.policy for r in answers if r.step == 2}
    groups: dict[tuple[int, int, int], list[rollouts.Rollout]] = {}
    for r in answers:
        groups.setdefault((r.step, r.wave, r.group), []).append(r)
        assert len(r.ids) == len(r.logprobs) and max(r.logprobs) <= 0 and r.verifier == "instructions"
        assert r.finished == (r.ids[-1] in (1, 3)) and (r.finished or len(r.ids) == 12)
        answer = Response.parse(r.text, r.finished).answer
        assert r.reward == float(r.finished and "ex"[r.level] in answer)
    for group in groups.values():
        dull = len({r.reward for r in group}) == 1
        assert {r.dropped for r in group} <= ({"variance"} if dull else {"", "truncated"})
        assert all((r.dropped == "truncated") == (not r.finished) for r in group if not dull)
    for x in steps:
        alive = {(r.wave, r.group) for r in answers if r.step == x["step"] and r.dropped != "variance"}
        assert len(alive) == x["groups"] <= 4
    assert sum(r.wave > 0 for r in answers), "no group was ever replaced"


@pytest.mark.numeric
def test_sampler_and_trainer_agree_and_a_gap_stops_the_phase(place: Path, calm: Path, tmp_path: Path) -> None:
    gaps = [x["max_sampler_gap"] for x in rl_fixtures.lines(calm) if "max_sampler_gap" in x]
    assert max(gaps) == pytest.approx(0, abs=1e-4)
    with pytest.raises(
        AtomError, match=r"rlvr: sampler and trainer differ by \S+ in a token's log-probability at step 1"
    ):
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", rl_fixtures.config(max_logprob_diff=1e-12))


def test_answers_that_are_cut_off_raise_an_alarm_once_until_they_are_fewer(place: Path, tmp_path: Path) -> None:
    report = train_fixtures.Reporter()
    settings = rl_fixtures.config(steps=3, release_checkpoint_interval=3, max_truncated=0.01, max_looping=1.0)
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings, report)
    steps = [x for x in rl_fixtures.lines(tmp_path / "out") if "reward" in x]
    answers = rollouts.read(tmp_path / "out/rollouts.parquet")
    for x in steps:
        of_step = [r for r in answers if r.step == x["step"]]
        assert x["truncated"] == sum(not r.finished for r in of_step) / len(of_step) >= x["looping"]
        assert x.get("alarms", {}) == ({"truncated": 0.01} if x["truncated"] > 0.01 else {})
    assert any(x["truncated"] > 0.01 for x in steps), "nothing was cut off"
    assert [note for note in report.notes if "alarm: rlvr: " in note and "more than max_truncated = 0.01" in note]
    assert len([note for note in report.notes if "alarm" in note]) <= len(steps)


def test_tasks_that_are_solved_always_or_never_are_left_out(place: Path, tmp_path: Path) -> None:
    asked = json.loads("[" + ",".join((place / "tasks/tasks.jsonl").read_text().splitlines()) + "]")
    # Of level 0 one is never solved, and one always; of level 1 none is used.
    rates = {row["id"]: 0.5 if row["level"] == 0 else 1.0 for row in asked} | {"letter/0/3": 0.0, "letter/0/4": 1.0}
    (tmp_path / "rates").mkdir()
    (tmp_path / "rates/pass_rates.json").write_text(json.dumps(rates))
    artifact = write_manifest(tmp_path / "rates", "pass-rates-test")
    settings = rl_fixtures.config(steps=2, release_checkpoint_interval=2, pass_rates={})
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings, pass_rates=artifact)
    used = {r.task for r in rollouts.read(tmp_path / "out/rollouts.parquet")}
    assert used <= {row["id"] for row in asked if row["level"] == 0} - {"letter/0/3", "letter/0/4"}
    first, second = (x for x in rl_fixtures.lines(tmp_path / "out") if "reward" in x)
    assert first["filtered"] == {
        "letter/0": {"tasks": 12, "never": 1, "always": 1, "kept": 10},
        "letter/1": {"tasks": 12, "never": 0, "always": 12, "kept": 0},
    }
    assert set(first["rates"]) == {"letter/0"} and "filtered" not in second
    # A replay asks for the same tasks only with the same rates.
    recorded = rl_fixtures.record(tmp_path / "out", tmp_path / "recorded")
    rl_fixtures.rlvr(place, tmp_path / "w", tmp_path / "again", settings, rollouts=recorded, pass_rates=artifact)
    assert rl_fixtures.trained(tmp_path / "again") == rl_fixtures.trained(tmp_path / "out")


@pytest.mark.parametrize("at", [1, 3, 6])
def test_stopped_and_resumed_gives_the_same_bytes(place: Path, calm: Path, tmp_path: Path, at: int) -> None:
    with pytest.raises(Interrupted, match=f"stopped after step {at}"):
        rl_fixtures.rlvr(
            place,
            tmp_path / "work",
            tmp_path / "out",
            rl_fixtures.config(),
            train_fixtures.Reporter(at, signal.SIGTERM),
        )
    report = train_fixtures.Reporter()
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "again", rl_fixtures.config(), report)
    assert f"rlvr: going on after step {at}" in report.notes
    assert train_fixtures.digest(tmp_path / "again") == train_fixtures.digest(calm)


def test_killed_between_checkpoints_gives_the_same_bytes(place: Path, calm: Path, tmp_path: Path) -> None:
    """A kill loses the steps since the last work checkpoint, and none of the answers that were drawn in them."""
    (tmp_path / "config.json").write_text(json.dumps(rl_fixtures.config()))
    places = [str(p) for p in (place, tmp_path / "work", tmp_path / "out", tmp_path / "config.json")]
    codes, logs = layout_fixtures.end(
        layout_fixtures.spawn("tests.fixtures.rl_fixtures", places, 1, {"TEST_DISTURB": "0 4 SIGKILL"})
    )
    assert codes == [-signal.SIGKILL], logs
    files = {path.name: path.read_bytes() for path in (tmp_path / "work" / "rollouts").glob("000004-*.parquet")}
    assert files
    calls: list[int] = []
    generate = InProcess.generate

    def counted(self, prompts, greedy=False):
        calls.append(0 if greedy else len(prompts))
        return generate(self, prompts, greedy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcess, "generate", counted)
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", rl_fixtures.config())
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(calm)
    drawn = [r for r in rollouts.read(calm / "rollouts.parquet") if r.step > 4]
    assert sum(calls) == len(drawn), "answers that were on disk were drawn again"
    assert files == {name: (tmp_path / "work" / "rollouts" / name).read_bytes() for name in files}


def test_a_verifier_out_of_order_stops_the_step(
    place: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, calls = Instructions.score, [0]

    def broken(self, answers):
        calls[0] += 1
        if calls[0] > 5:
            raise VerifierFailed("verifier instructions: out of order")
        return score(self, answers)

    monkeypatch.setattr("stages.rl.rollout.generation.RETRY_SECONDS", 0.0)
    monkeypatch.setattr("stages.rl.rollout.generation.RETRIES", 1)
    monkeypatch.setattr(Instructions, "score", broken)
    with pytest.raises(VerifierFailed, match="out of order"):
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", rl_fixtures.config())
    monkeypatch.setattr(Instructions, "score", score)
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", rl_fixtures.config())
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(calm)


def test_a_verifier_that_recovers_is_retried(
    place: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, calls = Instructions.score, [0]

    def flaky(self, answers):
        calls[0] += 1
        if calls[0] % 3 == 2:
            raise VerifierFailed("verifier instructions: busy")
        return score(self, answers)

    monkeypatch.setattr("stages.rl.rollout.generation.RETRY_SECONDS", 0.0)
    monkeypatch.setattr("stages.rl.rollout.generation.RETRIES", 1)
    monkeypatch.setattr(Instructions, "score", flaky)
    report = train_fixtures.Reporter()
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", rl_fixtures.config(), report)
    assert "verifier instructions: busy; retrying" in report.notes
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(calm)


@pytest.mark.parametrize("spoil", ["flip", "other policy"])
def test_answers_on_disk_that_are_not_this_policys_are_drawn_again(
    place: Path, calm: Path, tmp_path: Path, spoil: str
) -> None:
    with pytest.raises(Interrupted):
        rl_fixtures.rlvr(
            place, tmp_path / "work", tmp_path / "out", rl_fixtures.config(), train_fixtures.Reporter(2, signal.SIGTERM)
        )
    folder = tmp_path / "work" / "rollouts"
    if spoil == "flip":
        (folder / "000003-0.parquet").write_bytes(b"PAR1 no Parquet at all PAR1")
    else:
        shutil.copyfile(folder / "000002-0.parquet", folder / "000003-0.parquet")
    report = train_fixtures.Reporter()
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "again", rl_fixtures.config(), report)
    assert any("000003-0.parquet" in note and "drawn again" in note for note in report.notes)
    assert train_fixtures.digest(tmp_path / "again") == train_fixtures.digest(calm)


def test_waves_that_another_attempt_needed_and_this_one_does_not_are_forgotten(
    place: Path, calm: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        rl_fixtures.rlvr(
            place, tmp_path / "work", tmp_path / "out", rl_fixtures.config(), train_fixtures.Reporter(2, signal.SIGTERM)
        )
    folder = tmp_path / "work" / "rollouts"
    for wave in (5, 6):
        shutil.copyfile(folder / "000002-0.parquet", folder / f"000003-{wave}.parquet")
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "again", rl_fixtures.config())
    assert train_fixtures.digest(tmp_path / "again") == train_fixtures.digest(calm)


def test_a_question_that_leaves_no_room_is_refused_before_the_first_answer(place: Path, tmp_path: Path) -> None:
    with pytest.raises(AtomError, match=r"task letter/0/0 has \d+ tokens, and sampling.max_new_tokens = 60 of model"):
        rl_fixtures.rlvr(
            place, tmp_path / "work", tmp_path / "out", rl_fixtures.config(sampling={"max_new_tokens": 60})
        )


OFF_POLICY = {"algorithm": "gspo", "updates": 2, "kl_coef": 0.1, "max_resample_rounds": 4}
"""Each step has groups enough for both of its updates."""


def test_several_updates_and_a_reference_come_back_after_a_stop(place: Path, tmp_path: Path) -> None:
    """The reference is the beginning of the phase, also for an attempt that starts in its middle."""
    settings = rl_fixtures.config(steps=4, **OFF_POLICY)
    rl_fixtures.rlvr(place, tmp_path / "calm-work", tmp_path / "calm", settings)
    with pytest.raises(Interrupted, match="stopped after step 2"):
        rl_fixtures.rlvr(
            place, tmp_path / "work", tmp_path / "out", settings, train_fixtures.Reporter(2, signal.SIGTERM)
        )
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "again", settings)
    assert train_fixtures.digest(tmp_path / "again") == train_fixtures.digest(tmp_path / "calm")
    lines = [x for x in rl_fixtures.lines(tmp_path / "calm") if "kl" in x]
    assert lines[0]["kl"] < lines[-1]["kl"], "the policy moves away from the reference"
    assert all(0 < x["clip_fraction"] < 1 for x in lines), "the second update of a step is clipped, and not the first"
    assert max(x["max_sampler_gap"] for x in lines) < 1e-4, "the gap is that before the first update"


def test_reading_the_reference_leaves_no_trace_in_the_policy(place: Path, calm: Path, tmp_path: Path) -> None:
    """A weight that is 0 in fp32 adds nothing: the policies are those of a run without a reference."""
    settings = rl_fixtures.config(steps=3, kl_coef=1e-60)
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings)
    with_reference, without = (
        [x for x in rl_fixtures.lines(folder) if "loss" in x][:3] for folder in (tmp_path / "out", calm)
    )
    distances = [x.pop("kl") for x in with_reference]
    assert with_reference == without
    assert distances[0] == 0 < min(distances[1:]), "the policy of the first step is the reference"


@pytest.mark.numeric
@pytest.mark.parametrize("settings", [{}, *([OFF_POLICY] if SOAK else [])], ids=["default", "off-policy"][: 1 + SOAK])
@pytest.mark.parametrize("layout", [{"ep": 2}, *(({"data": 2}, {"tp": 2}, {"pp": 2}) if SOAK else ())], ids=str)
def test_two_processes_learn_like_one(
    place: Path, tmp_path: Path, layout: dict[str, int], settings: dict[str, object]
) -> None:
    """From the same weights and answers: the files that one process drew are given to two."""
    parallelism = {"ranks": 2, **{k: v for k, v in layout.items() if k != "data"}}
    one = rl_fixtures.config(steps=2, **settings)
    two = rl_fixtures.config(steps=2, parallelism=parallelism, **settings)
    rl_fixtures.rlvr(place, tmp_path / "one-work", tmp_path / "one", one)
    (tmp_path / "config.json").write_text(json.dumps(two))
    places = [str(p) for p in (place, tmp_path / "work", tmp_path / "two", tmp_path / "config.json")]
    codes, logs = layout_fixtures.end(layout_fixtures.spawn("tests.fixtures.rl_fixtures", places, 2))
    assert not any(codes), logs
    runs = [[x for x in rl_fixtures.lines(tmp_path / name) if "reward" in x] for name in ("one", "two")]
    names = ("loss", "grad_norm", "aux_loss", "reward", "tokens", "importance_ratio", "answers", "policy")
    names += ("kl", "clip_fraction") if settings else ()
    first, second = ([{k: x[k] for k in names} for x in run] for run in runs)
    assert first[0]["policy"] == second[0]["policy"]
    for a, b in zip(first, second, strict=True):
        assert {k: v for k, v in a.items() if k != "policy"} == pytest.approx(
            {k: v for k, v in b.items() if k != "policy"}, rel=1e-4, abs=1e-6
        )
