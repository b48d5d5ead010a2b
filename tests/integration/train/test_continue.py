"""Going on from a release checkpoint of an earlier run: the order goes on, the ledger records it, nothing is repeated."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core import provenance
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.events import FileReport
from pipeline.core.lease import Lease
from pipeline.core.store import Artifact, Store, write_manifest
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from pipeline.graph.dag import Checkpoint
from pipeline.launch.attempt import Attempt, CheckpointArtifacts, Task
from pipeline.launch.rendezvous import Ranks
from stages.data.order import order_stage
from stages.formats.table import write_json
from tests.fixtures.order_fixtures import config as order_config
from tests.fixtures.order_fixtures import tokens
from tests.fixtures.recipe_fixtures import SMOKE, write
from tests.fixtures.run_fixtures import at_length, atom


def rows(artifact: Artifact) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = pq.read_table(artifact / "part-00000.parquet").to_pylist()
    return table


def checkpoint(folder: Path, artifact: Artifact, step: int) -> Artifact:
    """A release checkpoint after `step` of the phase that follows an order: its place in the data is all that counts."""
    meta = artifact.json("meta.json")
    read = Counter(row["source"] for row in rows(artifact) if row["step"] <= step)
    folder.mkdir()
    place = order_stage.position(meta, read, step)
    write_json(folder / "state.json", {"phase": meta["phase"], "step": step, "data_position": place})
    return write_manifest(folder, f"{meta['phase']}@{step}-000000000000")


def chunks(table: list[dict[str, Any]], source: str) -> list[tuple[str, int]]:
    return [(row["id"], row["offset"]) for row in table if row["source"] == source]


@pytest.mark.parametrize("steps", [(7,), (3, 4, 11)])
def test_an_unchanged_phase_reads_the_rows_that_were_to_come(
    tmp_path: Path, run_stage: Any, steps: tuple[int, ...]
) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    full_order = latest = run_stage(order_stage.STAGE, order_config(), inputs)
    for step in steps:
        at = checkpoint(tmp_path / f"c{step}", latest, step)
        latest = run_stage(order_stage.STAGE, order_config(first_step=step + 1), {**inputs, "continue": at})
    assert rows(latest) == [row for row in rows(full_order) if row["step"] > steps[-1]]
    assert latest.json("meta.json")["first_step"] == steps[-1] + 1


def test_after_a_changed_mix_each_source_goes_on_without_a_repeat(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    first = run_stage(order_stage.STAGE, order_config(), inputs)
    before = [row for row in rows(first) if row["step"] <= 6]
    at = checkpoint(tmp_path / "c6", first, 6)
    changes = {"first_step": 7, "steps": 30, "rows": 4, "mix": {"a": 0.25, "b": 0.75}, "seed": 5}
    second = run_stage(order_stage.STAGE, order_config(**changes), {**inputs, "continue": at})
    table = rows(second)
    assert [row["step"] for row in table] == [step for step in range(7, 31) for _ in range(4)]
    assert Counter(row["source"] for row in table) == {"a": 24, "b": 72}
    sizes = {"a": 16, "b": 50}
    for source, size in sizes.items():
        read = chunks(before + table, source)
        assert {len(set(read[i : i + size])) for i in range(0, len(read) - size, size)} == {size}, "an epoch is whole"
    # A source that is left out keeps its place: the third part goes on with it where the first stood.
    alone = order_config(**{**changes, "mix": {"b": 1.0}})
    only_b = run_stage(order_stage.STAGE, alone, {**inputs, "continue": at})
    next_config = order_config(first_step=21, steps=40, mix={"a": 0.5, "b": 0.5})
    third = run_stage(order_stage.STAGE, next_config, {**inputs, "continue": checkpoint(tmp_path / "c20", only_b, 20)})
    read = chunks(before + rows(third), "a")
    assert len(set(read[16:32])) == 16 and read[16 : len(chunks(before, "a")) + 5] != read[: len(chunks(before, "a"))]
    read_b = chunks(before + [row for row in rows(only_b) if row["step"] <= 20] + rows(third), "b")
    assert len(set(read_b[:50])) == len(set(read_b[50:100])) == 50


def test_rows_of_another_length_go_on_at_the_same_fraction_of_an_epoch(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    first = run_stage(order_stage.STAGE, order_config(), inputs)
    at = checkpoint(tmp_path / "c4", first, 4)
    longer = order_config(first_step=5, sequence_length=16)
    second = run_stage(order_stage.STAGE, longer, {**inputs, "continue": at}).json("meta.json")
    read, size = at.json("state.json")["data_position"]["rows"]["a"], second["sources"]["a"]["chunks"]
    assert size < 16 and second["start"]["rows"]["a"] == -(-read * size // 16)


def test_a_checkpoint_of_another_step_is_refused(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    at = checkpoint(tmp_path / "c4", run_stage(order_stage.STAGE, order_config(), inputs), 4)
    with pytest.raises(AtomError, match="stands after step 4 of pretrain, and the order was to begin with step 9"):
        run_stage(order_stage.STAGE, order_config(first_step=9), {**inputs, "continue": at})


def attempt_at(store: Store, recipe: str, run: str, phase: str = "pretrain") -> Attempt:
    """An attempt of a training stage, as the worker begins it; nothing is trained."""
    graph = dag.compose(recipes.load(recipe), store)
    node = graph.nodes[phase]
    materials = graph.materials(node)
    config = node.config.model_dump(mode="json")
    task = Task(str(store.home), run, phase, phase, config, materials, node.key, watts_per_core=1.0, ranks=1)
    attempt = Attempt(task, store, FileReport(store.logs / run / phase), Ranks())
    attempt.materials = {role: Artifact(key, "0" * 64, Path(), ()) for role, key in materials.items()}
    return attempt


def seal(store: Store, recipe: str, run: str, step: int, text: str = "{}", phase: str = "pretrain") -> Checkpoint:
    """A checkpoint of a recipe's phase, sealed as the worker seals it."""
    attempt = attempt_at(store, recipe, run, phase)
    product = store.home / "made" / run
    product.mkdir(parents=True, exist_ok=True)
    (product / "state.json").unlink(missing_ok=True)
    (product / "state.json").write_text(text)
    lease = Lease.take(store.work(attempt.task.key))
    assert lease is not None
    try:
        CheckpointArtifacts(attempt, lease).seal(step, product)
    finally:
        lease.release()
    return Checkpoint(attempt.task.key, step)


def test_a_checkpoint_is_an_artifact_with_a_statement_before_its_phase_ends(tmp_path: Path) -> None:
    store = Store(tmp_path)
    checkpoint = seal(store, str(SMOKE), "run-1", 30)
    artifact = store.open(checkpoint.key)
    artifact.verify()
    assert checkpoint.key.startswith("pretrain@30-") and not store.sealed(checkpoint.phase)
    assert os.path.samefile(artifact / "state.json", tmp_path / "made/run-1/state.json"), "a hard link"
    ((_, body),) = provenance.read(store.ledger, checkpoint.key)
    parameters = body["predicate"]["buildDefinition"]["externalParameters"]
    assert parameters["of"] == {"key": checkpoint.phase, "step": 30}
    assert (parameters["node"], parameters["key"], parameters["stage"]) == ("pretrain@30", checkpoint.key, "pretrain")
    assert parameters["config"]["phase"]["steps"] == 60 and set(provenance.materials_of(body)) == {"tokens", "order"}
    assert provenance.sealed(store.ledger, artifact) and provenance.usage(body)["energy_joules_estimate"] >= 0

    seal(store, str(SMOKE), "run-1", 30)
    assert len(list(provenance.read(store.ledger, checkpoint.key))) == 1, "the second time nothing is done"
    with pytest.raises(AtomError, match="with the same code in the same environment, so it is not reproducible"):
        seal(store, str(SMOKE), "run-1", 30, "{ }")
    assert store.open(checkpoint.key).digest == artifact.digest


def test_who_has_lost_the_lease_seals_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    attempt = attempt_at(store, str(SMOKE), "run-1")
    lease = Lease.take(store.work(attempt.task.key))
    assert lease is not None
    (store.work(attempt.task.key) / f"lease.{lease.number + 1}").touch()
    (tmp_path / "made").mkdir()
    with pytest.raises(AtomError, match=r"another worker took over pretrain-\w+ before pretrain@30 was sealed here"):
        CheckpointArtifacts(attempt, lease).seal(30, tmp_path / "made")
    lease.release()
    assert not store.artifacts.exists()


def composed(store: Store, path: Path, **changes: Any) -> dag.Graph:
    return dag.compose(recipes.load(write(path / "r.yaml", **changes)), store)


def test_a_checkpoint_is_found_by_step_and_is_an_input_of_order_and_phase(tmp_path: Path) -> None:
    store = Store(tmp_path)
    checkpoint = seal(store, str(SMOKE), "run-1", 30)
    short = composed(store, tmp_path, pretrain__continue_from="pretrain@30")
    for name in ("order-pretrain", "pretrain"):
        assert short.materials(short.nodes[name])["continue"] == checkpoint.key
    assert short.nodes["order-pretrain"].config.first_step == 31  # type: ignore[attr-defined]
    assert "checkpoint" not in short.nodes["export-init"].inputs, "random weights are drawn, since no step 0 is trained"
    long = composed(store, tmp_path, pretrain__continue_from=str(checkpoint))
    elsewhere = composed(Store(tmp_path / "none"), tmp_path, pretrain__continue_from=str(checkpoint))
    before = dag.compose(recipes.load(str(SMOKE)), store)
    keys = [{name: node.key for name, node in each.nodes.items()} for each in (short, long, elsewhere, before)]
    assert keys[0] == keys[1] == keys[2], "how it is written does not count"
    measured = ("evaluate", "solve", "fresh", "prefer", "contamination", "baselines")
    later = {n for n in keys[0] if n.startswith(("export", *measured))}
    changed = {"order-pretrain", "pretrain", "midtrain", "sft", "rlvr"} | later
    assert {n for n in keys[0] if keys[0][n] != keys[3][n]} == changed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"continue_from": "pretrain@30"}, "recipe r: pretrain.continue_from = pretrain@30 is not sealed under "),
        ({"continue_from": "pretrain@20"}, "there are pretrain@40, pretrain@50"),
        ({"continue_from": "pretrain@60"}, "recipe r: pretrain.steps = 60 leaves nothing to train after pretrain@60; use at least 61"),
        ({"continue_from": "midtrain@30"}, "recipe r: pretrain.continue_from = midtrain@30 is no checkpoint of pretrain; write pretrain@STEP"),
        ({"continue_from": "pretrain"}, "recipe r: pretrain.continue_from = pretrain is no checkpoint; write it as in pretrain@1200"),
        ({"continue_from": "pretrain@40"}, "recipe r: pretrain.continue_from = pretrain@40 fits 2 checkpoints: pretrain-"),
    ],
)  # fmt: skip
def test_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    store, other = Store(tmp_path), write(tmp_path / "other.yaml", pretrain__optimizer__lr=2e-3)
    checkpoints = [
        seal(store, str(SMOKE), "run-1", 40),
        seal(store, other, "run-2", 40),
        seal(store, other, "run-2", 50),
    ]
    with pytest.raises(RecipeError) as error:
        composed(store, tmp_path, **{f"pretrain__{name}": value for name, value in changes.items()})
    assert sentence in str(error.value) and "\n" not in str(error.value), str(error.value)
    if "fits" in sentence:
        for checkpoint, run in zip(checkpoints[:2], ("run-1", "run-2"), strict=True):
            assert f"{checkpoint} of run {run}" in str(error.value)
            assert composed(store, tmp_path, pretrain__continue_from=str(checkpoint))


def test_the_base_model_must_be_the_one_that_the_checkpoint_came_from(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(RecipeError, match="run the recipe to continue from first"):
        composed(store, tmp_path, midtrain__continue_from="midtrain@50")
    checkpoint = seal(store, str(SMOKE), "run-1", 50, phase="midtrain")
    changes = {"midtrain__continue_from": "midtrain@50", "midtrain__optimizer__lr": 2e-3}
    graph = composed(store, tmp_path, **changes)
    assert graph.materials(graph.nodes["midtrain"])["continue"] == checkpoint.key
    with pytest.raises(
        RecipeError, match=r"midtrain.continue_from = midtrain-\w+@50 began from pretrain-\w+, but this"
    ):
        composed(store, tmp_path, **changes, pretrain__optimizer__lr=2e-3)


def step_files(artifact: Artifact, step: int) -> dict[str, str]:
    """{file: sha256} of the tensors of one checkpoint of a phase."""
    return {r.path: r.sha256 for r in artifact.rows if r.path.startswith(f"step-{step:06d}/") and "state" not in r.path}


@at_length("release", 35)
def test_an_unchanged_run_goes_on_to_the_same_bytes(smoke_home: Path, tmp_path: Path) -> None:
    """The same rows, the same moments, so the very bytes that the earlier run ended with."""
    home = tmp_path / "home"
    shutil.copytree(smoke_home, home)
    store = Store(home)
    first = dag.compose(recipes.load(str(SMOKE)), store)
    same = write(tmp_path / "same.yaml", name="same", pretrain__continue_from="pretrain@30")
    planned = atom(home, "plan", same).stdout
    assert "\npretrain continues from pretrain@30 (key pretrain@30-" in planned
    atom(home, "run", same, "--until", "pretrain")
    continued = dag.compose(recipes.load(write(tmp_path / "r.yaml", pretrain__continue_from="pretrain@30")), store)
    artifact = store.open(continued.nodes["pretrain"].key)
    assert {p.name for p in artifact.path.glob("step-*")} == {"step-000060"}
    assert step_files(artifact, 60) == step_files(store.open(first.nodes["pretrain"].key), 60)
    atom(home, "run", same, "--until", "export-init")
    drawn, trained = (store.open(each.nodes["export-init"].key) for each in (continued, first))
    assert drawn.rows == trained.rows, "random weights by their seed are those of step 0"
    assert "fits 2 checkpoints" in atom(home, "plan", write(
        tmp_path / "r.yaml", pretrain__continue_from="pretrain@60", pretrain__steps=90), code=2).stderr  # fmt: skip


@at_length("release", 60)
def test_a_release_states_the_earlier_run_that_its_own_went_on_from(smoke_home: Path, tmp_path: Path) -> None:
    """Another rate and another mix from step 76 of mid-training on."""
    home = tmp_path / "home"
    shutil.copytree(smoke_home, home)
    store = Store(home)
    first = dag.compose(recipes.load(str(SMOKE)), store)
    mix = {"docstrings": 0.15, "code": 0.1, "worked": 0.75}
    changes = {"midtrain__continue_from": "midtrain@75", "midtrain__optimizer__lr": 2e-3, "midtrain__mix": mix}
    changed = write(tmp_path / "changed.yaml", name="changed", sft=None, rlvr=None, **changes)
    atom(home, "run", changed)
    changed_graph = dag.compose(recipes.load(changed), store)
    phase = store.open(changed_graph.nodes["midtrain"].key)
    lines = [json.loads(line) for line in (phase / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(76, 151))
    checkpoint = store.open(changed_graph.nodes["midtrain"].external["continue"])
    stated = provenance.sealed(store.ledger, phase)
    assert stated and provenance.materials_of(stated[1])["continue"] == checkpoint.digest
    config = stated[1]["predicate"]["buildDefinition"]["externalParameters"]["config"]
    assert config["phase"]["continue_from"] == f"{first.nodes['midtrain'].key}@75"
    before = rows(store.open(first.nodes["order-midtrain"].key))
    read = chunks(
        [r for r in before if r["step"] <= 75] + rows(store.open(changed_graph.nodes["order-midtrain"].key)), "code"
    )
    size = store.open(changed_graph.nodes["order-midtrain"].key).json("meta.json")["sources"]["code"]["chunks"]
    assert len(set(read[:size])) == min(size, len(read))

    atom(home, "build", changed)
    release = home / "releases" / "changed-0.1.0"
    assert "verified" in atom(home, "verify", "--deep", str(release)).stdout
    assert subprocess.run([sys.executable, "-I", release / "evidence/independent_verifier.py", release]).returncode == 0
    card = (release / "model/README.md").read_text()
    assert (
        f"- mid-training: steps 1 to 75 by `{first.nodes['midtrain'].key}`; from step 76 on with other settings: "
        in card
    )
    assert "`mix.sums` 0.05 → not set" in card and "`optimizer.lr` 0.003 → 0.002" in card
    assert "went on from" not in (release / "model-base/README.md").read_text()
    assert (release / "checkpoints/midtrain-step-75/optimizer.safetensors").exists()
    assert (release / f"dataset/earlier/{first.nodes['order-midtrain'].key}/part-00000.parquet").exists()

    (store.artifacts / first.nodes["order-midtrain"].key).rename(tmp_path / "lost")
    stderr = atom(home, "build", changed, code=2).stderr
    assert (
        f"{first.nodes['order-midtrain'].key} of an earlier run, which this one goes on from, is not sealed" in stderr
    )
