"""`atom replay` of phases that learn from answers, on real releases: honest ones come out bit for bit, and nothing is
drawn or scored again. tests/integration/rl/test_recorded_rollouts.py changes the answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import sha256_file
from release.audit.replay import certificate, replay, text
from tests.fixtures.home_fixtures import SMOKE
from tests.fixtures.release_fixtures import resum
from tests.fixtures.replay_fixtures import build, validated
from tests.fixtures.run_fixtures import DATA, at_length, atom, copy_sealed

ROLLOUTS = "dataset/rl/rlvr/rollouts.parquet"
WAIVED = ("rlhf_keeps_skills", "dpo_is_preferred", "online-rlhf_is_preferred")
PREFERENCES = """
dpo:
  preferences:
    tasks: [{source: instructions, levels: [1], count: 60, acknowledged_reward: 1.0}]
    count: 24
    num_generations: 4
  sft_tasks: {tasks: [{source: problems, task: add, levels: [0], count: 20}], count: 8, num_generations: 2}
  sampling: {max_new_tokens: 48}
  steps: 2
  updates: 2
  beta: 5.0
  min_margin: 0.01
  micro_batches: 2
  optimizer: {lr: 2.0e-4, final_lr: 2.0e-5, warmup_steps: 1, weight_decay: 0.0, beta1: 0.9, beta2: 0.99, clip: 1.0}
  validate_every: 2
  release_checkpoint_interval: 1

reward_model:
  pairs: 4
  steps: 4
  micro_batches: 1
  optimizer: {lr: 5.0e-4, final_lr: 5.0e-5, warmup_steps: 1, weight_decay: 0.01, beta1: 0.9, beta2: 0.99, clip: 1.0}
  validate_every: 2
  release_checkpoint_interval: 2

online_rlhf:
  tasks:
    - {source: courtesies, count: 20, verifier: reward-model}
    - {source: instructions, levels: [1], count: 20, acknowledged_reward: 1.0}
  prompts_per_step: 6
  num_generations: 4
  updates: 2
  kl_coef: 0.05
  steps: 4
  asynchronous: {max_staleness: 1}
  sampling: {max_new_tokens: 48}
  micro_batches: 2
  optimizer: {lr: 1.0e-4, final_lr: 1.0e-4, warmup_steps: 1, weight_decay: 0.0, beta1: 0.9, beta2: 0.99, clip: 1.0}
  validate_every: 2
  release_checkpoint_interval: 2

evaluation:"""
"""Every phase of post-training on next to no work, for the recipe of atom-smoke; the last one is asynchronous."""


@pytest.fixture(scope="module")
def release(smoke_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(smoke_home, "atom-smoke", tmp_path_factory.mktemp("home"))


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / release.name))


def test_a_phase_comes_out_bit_for_bit_without_a_sampler_or_verifiers(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a replay draws and scores nothing")

    monkeypatch.setattr("stages.rl.policy.make_sampler", refuse)
    monkeypatch.setattr("stages.rl.policy.make_verifiers", refuse)
    result = replay(release, "rlvr")
    assert (result.first, result.last, result.verdict, result.different) == (0, 4, "bitwise", {})
    assert (result.state, result.diverges, result.ranks, result.environment) == ((), None, 1, ())
    assert result.tensors == 96
    assert text(result).startswith("rlvr, steps 1 to 4, retrained from the checkpoint of step 40 of sft: bitwise")

    predicate = validated(certificate(result, release))
    passed = ["token_shards", "answers", "state", "tensors_within_tolerance", "tensors_bitwise", "log"]
    assert (predicate["result"], predicate["passedTests"]) == ("PASSED", passed)
    materials = {each["name"]: each["digest"]["sha256"] for each in predicate["configuration"] if "digest" in each}
    start = "checkpoints/sft-step-40/model.safetensors"
    for name in (ROLLOUTS, "dataset/rl/rlvr/tasks.jsonl", "dataset/order/rlvr/part-00000.parquet", start):
        assert materials[name] == sha256_file(release / name)
    assert any(name.endswith("train/worked/part-00000.bin") for name in materials)


def test_answers_of_another_policy_than_the_log_says_are_named(copy: Path) -> None:
    table = pq.read_table(copy / ROLLOUTS)
    rows = table.to_pylist()
    next(row for row in rows if row["step"] == 3)["policy"] = "sha256:0"
    pq.write_table(pa.Table.from_pylist(rows, table.schema), copy / ROLLOUTS)
    resum(copy)
    with pytest.raises(
        CheckFailed,
        match=r"the answers of step 3 are of sha256:0, tensors-sha256:\w+, and the log says tensors-sha256:",
    ):
        replay(copy, "rlvr")


def test_files_that_lack_something_are_refused(copy: Path) -> None:
    table = pq.read_table(copy / ROLLOUTS)
    pq.write_table(table.drop_columns(["logprobs"]), copy / ROLLOUTS)
    with pytest.raises(CheckFailed, match=f"{ROLLOUTS} is altered"):
        replay(copy, "rlvr")
    resum(copy)
    with pytest.raises(AtomError, match=r"rollouts.parquet has no column logprobs of type list<.*float>"):
        replay(copy, "rlvr")
    pq.write_table(table, copy / ROLLOUTS)
    (copy / "checkpoints/sft-step-40/model.safetensors").unlink()
    resum(copy)
    with pytest.raises(AtomError):
        replay(copy, "rlvr")
    shutil.rmtree(copy / "checkpoints/sft-step-40")
    resum(copy)
    with pytest.raises(CheckFailed, match="sft-step-40/state.json is not in the release, and a replay needs it"):
        replay(copy, "rlvr")
    (copy / ROLLOUTS).unlink()
    resum(copy)
    with pytest.raises(CheckFailed, match="is not in the release, and a replay needs it"):
        replay(copy, "rlvr")


@at_length("training", 240)
def test_all_of_post_training_comes_out_bit_for_bit(smoke_home: Path, tmp_path: Path) -> None:
    home, recipe = Path(shutil.copytree(smoke_home, tmp_path / "home")), tmp_path / "atom-smoke-rlhf.yaml"
    named = SMOKE.read_text().replace("name: atom-smoke", "name: atom-smoke-rlhf")
    named = named.replace("\nevaluation:", PREFERENCES, 1)
    waived = "".join(f"    {gate}: so few steps\n" for gate in WAIVED)
    recipe.write_text(named.replace("  waived_gates:\n", f"  waived_gates:\n{waived}"))
    atom(home, "run", str(recipe), timeout=1800)
    release = build(home, str(recipe), tmp_path)
    segments = {"rlvr": [(0, 4)], "dpo": [(0, 1), (1, 2)], "reward": [(0, 2), (2, 4)], "online-rlhf": [(0, 2), (2, 4)]}
    for phase, spans in segments.items():
        for span in spans:
            result = replay(release, phase, *span)
            assert (result.verdict, result.different, result.state, result.diverges) == ("bitwise", {}, (), None), phase
            assert validated(certificate(result, release))["result"] == "PASSED"

    copy = Path(shutil.copytree(release, tmp_path / "copy"))
    pairs = pq.read_table(copy / "dataset/rl/dpo/pairs.parquet")
    for changed in (pairs.slice(1), pairs.take([1, 0, *range(2, len(pairs))])):
        pq.write_table(changed, copy / "dataset/rl/dpo/pairs.parquet")
        resum(copy)
        with pytest.raises(CheckFailed, match="the pairs of round 1 are not those of the answers in rollouts.parquet"):
            replay(copy, "reward")

    online = copy / "dataset/rl/online-rlhf/rollouts.parquet"
    answers = pq.read_table(online)
    in_last_step = answers.filter(pc.field("step") == 4).num_rows
    start = len(answers) - in_last_step
    pq.write_table(
        answers.take(
            [*range(start), *range(start + 4, start + 8), *range(start, start + 4), *range(start + 8, len(answers))]
        ),
        online,
    )
    resum(copy)
    with pytest.raises(CheckFailed, match="answers of step 4 are not those that the log says were taken, or stand in"):
        replay(copy, "online-rlhf")


@at_length("training", 100)
def test_a_phase_of_two_ranks_comes_out_within_tolerance(smoke_home: Path, tmp_path: Path) -> None:
    """Rank 0 of two draws; one process trains again from the recorded answers, which adds in another order."""
    home, recipe = tmp_path / "home", tmp_path / "atom-smoke-ranks.yaml"
    exported = [
        f"{stage}-{model}" for stage in ("export", "evaluate", "solve") for model in ("init", "base", "mid", "sft")
    ]
    copy_sealed(smoke_home, home, *DATA, "pretrain", "midtrain", "sft", *exported)
    named = SMOKE.read_text().replace("name: atom-smoke", "name: atom-smoke-ranks")
    learning = "  replay: {mix: {courtesies: 0.5, worked: 0.5}, rows: 4"
    assert learning in named
    recipe.write_text(named.replace(learning, f"  parallelism: {{ranks: 2, ep: 2}}\n{learning}"))
    atom(home, "run", str(recipe), timeout=1800)
    result = replay(build(home, str(recipe), tmp_path), "rlvr")
    assert (result.verdict, result.ok, result.ranks, result.state) == ("within tolerance", True, 2, ())
    assert "2 ranks trained the phase and one replayed it" in text(result)
