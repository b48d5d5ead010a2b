"""Learning from preferences: pairs with their origin, an update that prefers the better answer, skills that stay, a reward
model that ranks better above worse, and the same bytes after a stop."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.core.errors import AtomError, Interrupted
from pipeline.core.store import Artifact, sha256_file, write_manifest
from stages.formats.table import read_table, write_jsonl
from stages.rl import dpo, reward_model, rlvr
from stages.rl.algorithms.preferences import best_and_worst
from stages.rl.protocols import Response, VerifierContext, VerifierFailed
from stages.rl.rewards.reward_model import RewardModel, RewardModelSettings, reward_input
from stages.rl.rollout import rollouts
from tests.fixtures import rl_fixtures, train_fixtures
from tests.fixtures.preference_fixtures import PHASE, REWARD, run, settings
from tests.fixtures.run_fixtures import RecordingReport


def test_a_weight_without_an_effect_is_refused() -> None:
    with pytest.raises(ValidationError, match="nll_coef = 0.2 has no effect without sft_tasks"):
        dpo.STAGE.config.model_validate(settings(PHASE, sft_tasks=None))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("rlhf")
    artifacts = rl_fixtures.make(folder)
    rows = [rl_fixtures.row(f"letter/{n}", "letter", 0, f"say {n}", "e") for n in range(40)]
    rows += [
        rl_fixtures.row(f"skill/{level}/{n}", "skill", level, f"do {n}", "x") for level in (0, 1) for n in range(20)
    ]
    (folder / "asked").mkdir()
    write_jsonl(folder / "asked" / "tasks.jsonl", rows)
    return artifacts | {"tasks": write_manifest(folder / "asked", "tasks-asked")}


@pytest.fixture(scope="module")
def calm(inputs: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    run(dpo, settings(PHASE), inputs, folder / "work", folder / "out")
    return folder / "out"


@pytest.mark.numeric
def test_the_policy_learns_what_the_reward_function_prefers(calm: Path) -> None:
    lines = [x for x in rl_fixtures.lines(calm) if "reward" in x]
    rewards = [x["reward"] for x in lines]
    # by 0.17 or more over 8 seeds
    assert len(rewards) == 8 and sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05, rewards
    assert any(x["anchors"] > 0 for x in lines)


def test_every_level_of_every_kind_is_asked(calm: Path) -> None:
    levels = {(r.kind, r.level) for r in rollouts.read(calm / "rollouts.parquet")}
    assert levels == {("letter", 0), ("skill", 0), ("skill", 1)}


@pytest.mark.numeric
def test_the_reference_is_the_policy_that_drew(calm: Path, inputs: dict[str, Artifact], tmp_path: Path) -> None:
    gaps = [x["max_sampler_gap"] for x in rl_fixtures.lines(calm) if "max_sampler_gap" in x]
    assert len(gaps) == 8 and max(gaps) == pytest.approx(0, abs=1e-4)
    with pytest.raises(AtomError, match=r"sampler and trainer differ by .*, more than dpo.max_logprob_diff = 1e-12"):
        run(dpo, settings(PHASE, max_logprob_diff=1e-12), inputs, tmp_path / "work", tmp_path / "out")


def test_a_round_of_too_few_pairs_teaches_nothing_and_says_so(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    run(
        dpo,
        settings(PHASE, steps=1, updates=50, optimizer={**PHASE["optimizer"], "warmup_steps": 1}),
        inputs,
        tmp_path / "w",
        tmp_path / "o",
    )
    pairs = read_table(tmp_path / "o" / "pairs.parquet").to_pylist()
    assert pairs and not any(pair["learnt"] for pair in pairs)
    assert {r.dropped for r in rollouts.read(tmp_path / "o" / "rollouts.parquet") if r.wave == 0} == {"idle", "between"}
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["pairs"] == 0


def test_pairs_say_where_they_come_from(calm: Path) -> None:
    pairs = read_table(calm / "pairs.parquet").to_pylist()
    answers = {(r.step, r.wave, r.task, r.sample): r for r in rollouts.read(calm / "rollouts.parquet")}
    trained_pairs = [pair for pair in pairs if pair["learnt"]]
    assert len(trained_pairs) == sum(x["pairs"] for x in rl_fixtures.lines(calm) if "pairs" in x) > 10
    assert len(pairs) > 2 * len(trained_pairs)
    for pair in pairs:
        for side in ("chosen", "rejected"):
            r = answers[pair["round"], 0, pair["task"], pair[f"{side}_sample"]]
            assert (r.text, r.reward, r.policy, r.verifier) == (
                pair[side],
                pair[f"{side}_reward"],
                pair["policy"],
                pair["judge"],
            )
            assert not pair["learnt"] or r.dropped == ""
        assert pair["chosen_reward"] > pair["rejected_reward"] and pair["chosen_finished"]
    for (_, wave, _, _), r in answers.items():
        assert wave == 0 or (r.dropped == "") == (r.reward == 1)


@pytest.mark.parametrize("at", [1, 4])
def test_stopped_and_resumed_gives_the_same_bytes(
    inputs: dict[str, Artifact], calm: Path, tmp_path: Path, at: int
) -> None:
    with pytest.raises(Interrupted):
        run(
            dpo, settings(PHASE), inputs, tmp_path / "work", tmp_path / "a", train_fixtures.Reporter(at, signal.SIGTERM)
        )
    run(dpo, settings(PHASE), inputs, tmp_path / "work", tmp_path / "b")
    assert train_fixtures.digest(tmp_path / "b") == train_fixtures.digest(calm)


def test_recorded_answers_move_the_same_weights(
    inputs: dict[str, Artifact], calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rounds of answers to two kinds of tasks, by a replay that draws and scores nothing."""
    assert {r.wave for r in rollouts.read(calm / "rollouts.parquet")} == {0, 1}
    recorded = {**inputs, "rollouts": rl_fixtures.record(calm, tmp_path / "recorded")}
    del recorded["items"]  # measurements need a sampler
    monkeypatch.setattr("stages.rl.policy.make_sampler", None)
    run(dpo, settings(PHASE), recorded, tmp_path / "work", tmp_path / "out")
    assert rl_fixtures.trained(tmp_path / "out") == rl_fixtures.trained(calm)


@pytest.fixture(scope="module")
def trained(inputs: dict[str, Artifact], calm: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("reward")
    artifacts = {"pairs": write_manifest(calm, "dpo-test"), "init": inputs["init"], "tokenizer": inputs["tokenizer"]}
    run(reward_model, settings(REWARD), artifacts, folder / "work", folder / "out")
    return write_manifest(folder / "out", "reward-test")


def test_the_reward_model_learns_what_the_reward_function_prefers(trained: Artifact) -> None:
    summary = trained.json("summary.json")
    assert summary["heldout_accuracy"]["last"] > 0.8, summary  # 0.93 or more over 8 seeds, 0.59 to 0.81 before
    assert summary["pairs"] + summary["heldout_pairs"] > 10


def test_the_reward_model_scores_as_it_was_trained(
    trained: Artifact, inputs: dict[str, Artifact], calm: Path, tmp_path: Path
) -> None:
    """Exported, it gives pairs the order that the trainer measured; an answer that did not end earns nothing."""
    from stages.export import hf
    from stages.rl.rollout.generation import Chat

    artifacts = {"checkpoint": trained, "tokenizer": inputs["tokenizer"]}
    run(
        hf,
        {"model": rl_fixtures.MODEL, "padded_vocab_size": rl_fixtures.PADDED},
        artifacts,
        tmp_path / "work",
        tmp_path / "out",
    )
    verifier_inputs = {"reward": trained, "reward_model": write_manifest(tmp_path / "out", "export-test")}
    verifier = RewardModel(VerifierContext(RewardModelSettings(), verifier_inputs, Chat(inputs["tokenizer"])))
    pairs = read_table(calm / "pairs.parquet").to_pylist()
    rows = [rl_fixtures.row("p", "letter", 0, pair["question"]) for pair in pairs]
    scores = {
        side: verifier.score(
            [(r, Response.parse(p[side], p[f"{side}_finished"])) for r, p in zip(rows, pairs, strict=True)]
        )
        for side in ("chosen", "rejected")
    }
    better = [a["reward"] > b["reward"] for a, b in zip(scores["chosen"], scores["rejected"], strict=True)]
    assert sum(better) / len(better) > 0.75
    middling = sum(s["reward"] for samples in scores.values() for s in samples) / (2 * len(pairs))
    assert 0.25 < middling < 0.75, "rewards lie on both sides of the middle"
    (cut,) = verifier.score([(rows[0], Response.parse("eee", False))])
    assert cut["reward"] == 0.0 and verifier.version == "export-test"
    assert reward_input(verifier.chat, [{"role": "user", "content": "say"}], "e", True)[-2:] == [3, 1]
    (spelled_out,) = verifier.score([(rows[0], Response.parse("<|im_start|>" * 20, True))])
    assert spelled_out["reward"] == 0.0, "its twenty tokens are 240 characters to the reward model"
    with pytest.raises(VerifierFailed, match="tokens are more than its context of 64; allow shorter answers"):
        verifier.score([(rows[0], Response.parse("e" * 70, True))])
    other = Artifact("", "", tmp_path / "other", ())
    write_other_tokenizer(inputs["tokenizer"], other.path)
    with pytest.raises(AtomError, match="^the reward model export-test has another tokenizer than the policy, whose"):
        RewardModel(VerifierContext(RewardModelSettings(), verifier_inputs, Chat(other)))


def write_other_tokenizer(tokenizer: Artifact, folder: Path) -> None:
    """The same tokens, of which two have each other's ids."""
    content = tokenizer.json("tokenizer.json")
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_policy_or_reference_of_another_tokenizer_is_refused(
    inputs: dict[str, Artifact], tmp_path: Path, with_reference: bool
) -> None:
    shutil.copytree(inputs["init"].path, tmp_path / "init")
    state = tmp_path / "init" / "step-000003" / "state.json"
    digest = sha256_file(inputs["tokenizer"] / "tokenizer.json")
    state.write_text(json.dumps({**json.loads(state.read_text()), "tokenizer": digest}))
    config = rl_fixtures.config(steps=1, optimizer={**rl_fixtures.OPTIMIZER, "warmup_steps": 0})
    if with_reference:
        config["phase"]["kl_coef"] = 0.1
    init = {**inputs, "init": write_manifest(tmp_path / "init", "sft-test")}
    run(rlvr, config, init, tmp_path / "work", tmp_path / "out")
    write_other_tokenizer(inputs["tokenizer"], tmp_path / "other")
    words = (
        "^rlvr: the policy sft-test and reference of the phase was trained on another tokenizer's tokens; begin with"
    )
    with pytest.raises(AtomError, match=words):
        other = {**init, "tokenizer": write_manifest(tmp_path / "other", "tokenizer-other")}
        run(rlvr, config, other, tmp_path / "other-work", tmp_path / "other-out")


def test_too_few_pairs_are_refused(inputs: dict[str, Artifact], calm: Path, tmp_path: Path) -> None:
    artifacts = {"pairs": write_manifest(calm, "dpo-test"), "init": inputs["init"], "tokenizer": inputs["tokenizer"]}
    with pytest.raises(
        AtomError, match=r"reward: \d+ pairs to learn from and 0 held out are too few; draw more in dpo"
    ):
        run(reward_model, settings(REWARD, heldout_fraction=1e-9), artifacts, tmp_path / "work", tmp_path / "out")


def test_a_failing_reward_function_makes_no_pair(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self, answers):
        raise VerifierFailed("verifier instructions: gone")

    monkeypatch.setattr("stages.rl.rewards.frozen_scorer.Instructions.score", broken)
    monkeypatch.setattr("stages.rl.rollout.generation.RETRY_SECONDS", 0.0)
    with pytest.raises(VerifierFailed, match="gone"):
        run(
            dpo,
            settings(PHASE, validate_every=6),
            inputs,
            tmp_path / "work",
            tmp_path / "out",
            RecordingReport(),
        )
    assert not list((tmp_path / "out").iterdir())


def rollout(reward_: float, finished: bool, sample: int) -> rollouts.Rollout:
    return rollouts.Rollout(
        step=1, wave=0, group=0, sample=sample, task="t", kind="k", level=0, policy="", seed=0, prompt_ids=[], ids=[],
        logprobs=[], text="", finished=finished, reward=reward_, parts={}, verifier="", verifier_version="", dropped="",
    )  # fmt: skip


def test_which_answers_make_a_pair() -> None:
    group = [rollout(0.5, True, 0), rollout(0.9, True, 1), rollout(0.0, False, 2), rollout(0.9, True, 3)]
    best, worst = best_and_worst(group, 0.05) or pytest.fail("a pair")
    assert (best.sample, worst.sample) == (1, 2)
    assert best_and_worst(group[:1] * 2, 0.0) is None, "equal answers are no pair"
    assert best_and_worst([rollout(1.0, False, 0), rollout(0.0, False, 1)], 0.0) is None, "no answer ended"
    assert best_and_worst([rollout(0.50, True, 0), rollout(0.46, True, 1)], 0.05) is None
