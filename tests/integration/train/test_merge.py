"""Averages of a phase's checkpoints, and a phase that carries over the optimizer of the phase before it."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.core.errors import AtomError
from pipeline.core.stage import Stage
from pipeline.core.store import Artifact, write_manifest
from release.checks import weights
from release.opened_release import Release
from stages.train import merge, pretrain
from stages.train.checkpoint import release_checkpoint
from stages.train.estimate import estimate
from tests.fixtures import layout_fixtures, train_fixtures

STEPS = 12
CONSTANT = {"lr": 3e-3, "final_lr": 3e-3, "warmup_steps": 0, "weight_decay": 0.05}
MERGE = {
    "phase": "pretrain",
    "steps": [6, 12],
    "model": train_fixtures.MODEL,
    "padded_vocab_size": train_fixtures.VOCAB,
}


def half(orders: Path, folder: Path, first: int) -> Artifact:
    """The half of an order that begins with a step, as the order of a phase of its own."""
    folder.mkdir()
    table = pq.read_table(orders / "part-00000.parquet")
    steps = pc.subtract(table["step"], first - 1)
    table = table.set_column(table.column_names.index("step"), "step", steps)
    table = table.filter(pc.and_(pc.greater(steps, 0), pc.less_equal(steps, STEPS // 2)))
    pq.write_table(table, folder / "part-00000.parquet")
    meta = json.loads((orders / "meta.json").read_text()) | {"steps": STEPS // 2}
    rows = Counter(table["source"].to_pylist())
    meta["parts"] = [{"first_step": 1, "last_step": STEPS // 2, "rows": rows}]
    (folder / "meta.json").write_text(json.dumps(meta))
    return write_manifest(folder, "order-half")


def settings(steps: int, **phase: Any) -> dict[str, Any]:
    return train_fixtures.config(steps=steps, optimizer=CONSTANT, release_checkpoint_interval=6, **phase)


@pytest.fixture(scope="module")
def halves(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Artifact]]:
    """The inputs of two phases that together read the rows of one."""
    folder = tmp_path_factory.mktemp("halves")
    orders = [half(corpus / "order", folder / str(first), first) for first in (1, STEPS // 2 + 1)]
    return [{"tokens": Artifact.open(corpus / "tokens"), "order": order} for order in orders]


def test_merged_weights_are_the_average_to_the_bit(undisturbed: Path, run_stage: Any) -> None:
    phase = write_manifest(undisturbed, "pretrain-test")

    merged = run_stage(merge.STAGE, MERGE, {"checkpoint": phase})

    first, last = (load_file(undisturbed / f"step-{step:06d}/model.safetensors") for step in MERGE["steps"])
    averages = load_file(merged / "step-000012/model.safetensors")
    assert averages.keys() == first.keys()
    for name, average in averages.items():
        expected = (np.add(first[name], last[name], dtype=np.float64) / 2).astype(np.float32)
        assert average.dtype == np.float32 and np.array_equal(average, expected), name
    stated, state = merged.json("merge.json"), merged.json("step-000012/state.json")
    assert stated["files"] == {
        row.path: row.sha256 for row in phase.rows if row.path[5:11] in ("000006", "000012") and "model" in row.path
    }
    assert state["merge"] == stated and state["phase"] == "merge-pretrain" and state["optimizer_step"] == 0
    assert not list(merged.path.glob("*/optimizer*")), "an average has no optimizer"


def test_merging_holds_a_tensor_at_a_time_and_makes_equal_tensors_in_shards(
    undisturbed: Path, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = write_manifest(undisturbed, "pretrain-test")
    whole = run_stage(merge.STAGE, MERGE, {"checkpoint": phase})
    monkeypatch.setattr(release_checkpoint, "SHARD_BYTES", 20_000)

    shards = run_stage(merge.STAGE, MERGE, {"checkpoint": phase})

    tensors = [release_checkpoint.Tensors(merged / "step-000012") for merged in (whole, shards)]
    assert len(set(tensors[1].files.values())) > 3
    assert all(np.array_equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    needs = merge.STAGE.estimate(merge.STAGE.config.model_validate(MERGE))
    assert needs.disk_bytes == 4 * sum(tensor.numel() for tensor in tensors[0].values())


def test_a_missing_or_damaged_checkpoint_is_one_sentence(undisturbed: Path, run_stage: Any, tmp_path: Path) -> None:
    phase = write_manifest(undisturbed, "pretrain-test")
    with pytest.raises(
        AtomError, match=r"artifact pretrain-test has no sealed checkpoint of step 9; it has \[0, 6, 12\]"
    ):
        run_stage(merge.STAGE, MERGE | {"steps": [9, 12]}, {"checkpoint": phase})

    # Links of the files, one of which is replaced.
    for row in phase.rows:
        (tmp_path / "copy" / row.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / row.path).write_bytes((undisturbed / row.path).read_bytes())
    train_fixtures.damage(tmp_path / "copy/step-000006/model.safetensors")
    with pytest.raises(AtomError, match=r"step-000006/model.safetensors"):
        run_stage(merge.STAGE, MERGE, {"checkpoint": Artifact(phase.key, phase.digest, tmp_path / "copy", phase.rows)})


def test_the_next_phase_begins_with_the_average(
    undisturbed: Path, halves: list[dict[str, Artifact]], run_stage: Any
) -> None:
    merged = run_stage(merge.STAGE, MERGE, {"checkpoint": write_manifest(undisturbed, "pretrain-test")})

    later = run_stage(pretrain.MIDTRAIN, settings(STEPS // 2), halves[1] | {"init": merged})

    begin = (later / "step-000000/model.safetensors").read_bytes()
    assert begin == (merged / "step-000012/model.safetensors").read_bytes()
    assert begin != (undisturbed / "step-000012/model.safetensors").read_bytes()


CARRIED = settings(STEPS // 2, optimizer_state="carried")


@pytest.fixture(scope="module")
def later(halves: list[dict[str, Artifact]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The inputs of the second of two phases."""
    folder = tmp_path_factory.mktemp("first")
    return halves[1] | {"init": trained(pretrain.STAGE, settings(STEPS // 2), halves[0], folder)}


@pytest.fixture(scope="module")
def carried(later: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The second phase, with the states of the first."""
    return trained(pretrain.MIDTRAIN, CARRIED, later, tmp_path_factory.mktemp("carried"))


def trained(stage: Stage, config: dict[str, Any], inputs: dict[str, Artifact], folder: Path) -> Artifact:
    for name in ("work", "out"):
        (folder / name).mkdir()
    reporter = train_fixtures.Reporter()
    stage.run(stage.config.model_validate(config), inputs, folder / "work", folder / "out", reporter)
    return write_manifest(folder / "out", "trained-test")


def test_two_phases_with_carried_states_train_like_one(
    corpus: Path, later: dict[str, Artifact], carried: Artifact, run_stage: Any
) -> None:
    whole = {role: Artifact.open(corpus / role) for role in ("tokens", "order")}

    one = run_stage(pretrain.STAGE, settings(STEPS), whole)

    for file in ("model.safetensors", "optimizer.safetensors"):
        begin, end = (carried / f"step-{step:06d}" / file for step in (0, 6))
        assert begin.read_bytes() == (later["init"] / "step-000006" / file).read_bytes()
        assert end.read_bytes() == (one / "step-000012" / file).read_bytes(), file
    counts = [carried.json(f"step-{step:06d}/state.json")["optimizer_step"] for step in (0, 6)]
    assert counts == [6, 12]


def test_a_fresh_optimizer_has_no_states_and_trains_otherwise(
    later: dict[str, Artifact], carried: Artifact, run_stage: Any
) -> None:
    fresh = run_stage(pretrain.MIDTRAIN, settings(STEPS // 2), later)

    assert not (fresh / "step-000000/optimizer.safetensors").exists()
    ends = [phase / "step-000006/model.safetensors" for phase in (fresh, carried)]
    assert ends[0].read_bytes() != ends[1].read_bytes()


def test_a_stopped_phase_with_carried_states_ends_with_the_same_bytes(
    later: dict[str, Artifact], carried: Artifact, tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    config = pretrain.MIDTRAIN.config.model_validate(CARRIED)

    with pytest.raises(KeyboardInterrupt):
        pretrain.MIDTRAIN.run(config, later, work, out, train_fixtures.Reporter(3, signal.SIGTERM))
    pretrain.MIDTRAIN.run(config, later, work, out, train_fixtures.Reporter())

    assert train_fixtures.digest(out) == train_fixtures.digest(carried.path)


@pytest.mark.numeric
def test_another_layout_carries_the_same_states_over(
    later: dict[str, Artifact], carried: Artifact, tmp_path: Path
) -> None:
    for role, artifact in later.items():
        (tmp_path / role).symlink_to(artifact.path)
    phase = CARRIED["phase"] | {"parallelism": {"ranks": 2, "tp": 2}}
    (tmp_path / "config.json").write_text(json.dumps(CARRIED | {"phase": phase}))
    places = [str(tmp_path / name) for name in (".", "work", "out", "config.json")]

    codes, logs = layout_fixtures.end(layout_fixtures.spawn("tests.fixtures.train_fixtures", places, 2))

    assert codes == [0, 0], logs
    assert train_fixtures.losses(tmp_path / "out") == pytest.approx(train_fixtures.losses(carried.path), rel=1e-5)
    states = load_file(tmp_path / "out/step-000000/optimizer.safetensors")
    expected = load_file(later["init"] / "step-000006/optimizer.safetensors")
    assert all(np.array_equal(states[name], expected[name]) for name in expected)


def test_the_plan_counts_the_states_of_step_0() -> None:
    configs = [
        pretrain.MIDTRAIN.config.model_validate(settings(STEPS, optimizer_state=state))
        for state in ("fresh", "carried")
    ]

    fresh, carried = map(estimate, configs)

    states = fresh.training.checkpoint_bytes * 2 // 3  # type: ignore[union-attr]
    assert carried.disk_bytes - fresh.disk_bytes == states  # type: ignore[operator]
    assert carried.published_bytes - fresh.published_bytes == states


def state_recipe(release: Path, last: int | None, **sections: Any) -> None:
    """Writes the recipe of a release, with the number of checkpoints that pre-training averages."""
    (release / "evidence").mkdir(exist_ok=True)
    stated = {"pretrain": {"merge": {"last": last}} if last else {}, "midtrain": None, **sections}
    (release / "evidence/recipe.json").write_text(json.dumps(stated))


@pytest.fixture
def published(undisturbed: Path, run_stage: Any, tmp_path: Path) -> Path:
    """A release folder with the checkpoints of a phase and their average."""
    merged = run_stage(merge.STAGE, MERGE, {"checkpoint": write_manifest(undisturbed, "pretrain-test")})
    for source in (undisturbed, merged.path):
        for folder in source.glob("step-*"):
            name = "merge-pretrain" if source == merged.path else "pretrain"
            shutil.copytree(folder, tmp_path / f"release/checkpoints/{name}-step-{int(folder.name[5:])}")
    state_recipe(tmp_path / "release", 2)
    (tmp_path / "release/model/training").mkdir(parents=True)
    shutil.copy(merged / "merge.json", tmp_path / "release/model/training/merge-pretrain.json")
    return tmp_path / "release"


def test_the_check_computes_the_average_again(published: Path) -> None:
    findings = weights.merges(Release(published))

    assert findings.problems == []
    assert findings.detail == "pretrain: 32 tensors are the averages of those of steps 6, 12"
    alone = Release(published / "checkpoints/merge-pretrain-step-12", "checkpoint")
    assert weights.shards(alone).problems == [], "an average lacks no optimizer"


@pytest.mark.parametrize(
    ("branch", "sentence"),
    [
        ("merge-pretrain-step-12", "merge-pretrain-step-12: tensor output"),
        ("pretrain-step-6", "merge-pretrain-step-12/state.json states other digests than those of the checkpoints"),
    ],
)
def test_the_check_names_what_differs(published: Path, branch: str, sentence: str) -> None:
    path = published / "checkpoints" / branch / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].flat[-1] = np.nextafter(tensors[name].flat[-1], np.float32(9))
    save_file(tensors, path)

    problems = weights.merges(Release(published)).problems

    assert any(sentence.replace("output", name) in text for text in problems), problems


def test_the_check_wants_the_last_checkpoints(published: Path) -> None:
    path = published / "checkpoints/merge-pretrain-step-12/state.json"
    state = json.loads(path.read_text())
    state["merge"]["steps"] = [0, 12]
    path.write_text(json.dumps(state))

    problems = weights.merges(Release(published)).problems

    assert problems == [
        "model/training/merge-pretrain.json states another average than merge-pretrain-step-12/state.json",
        "merge-pretrain-step-12/state.json names other steps than those of the last checkpoints of pretrain",
    ]


@pytest.mark.parametrize(
    ("last", "sections", "sentence"),
    [
        (3, {}, "merge-pretrain-step-12/state.json averages 2 checkpoints, and evidence/recipe.json 3"),
        (None, {}, "merge-pretrain-step-12/state.json averages 2 checkpoints, and evidence/recipe.json none"),
        (
            2,
            {"long_context": [{}, {"merge": {"last": 4}}]},
            "evidence/recipe.json averages checkpoints of longcontext-2, and the release has no average",
        ),
    ],
)
def test_the_check_wants_as_many_as_the_recipe_averages(
    published: Path, last: int | None, sections: dict[str, Any], sentence: str
) -> None:
    state_recipe(published, last, **sections)

    assert weights.merges(Release(published)).problems == [sentence]
