"""The rehearsal of a costly phase: two steps, a checkpoint, a restart, the same next step, and the speed of ten more."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import provenance
from pipeline.core.errors import CheckFailed, Kind, Restart
from pipeline.core.store import Artifact, Store
from pipeline.graph import dag, plan
from pipeline.graph import recipe as recipes
from pipeline.launch import cluster_profile, slurm
from pipeline.launch.cluster_profile import Profile
from pipeline.operations.fit import estimate_costs
from release.checks import learning
from release.facts import run_facts
from stages.train import rehearsal
from stages.train.engine import Engine
from stages.train.rehearsal_stage import STAGE
from stages.train.rehearsal_trainer import Rehearsal
from tests.fixtures import train_fixtures
from tests.fixtures.recipe_fixtures import write
from tests.fixtures.release_fixtures import opened
from tests.fixtures.run_fixtures import DATA, at_length, atom, copy_sealed
from tests.fixtures.train_fixtures import Reporter

STEPS = 16


@pytest.fixture(scope="module")
def longer_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer")
    train_fixtures.make(folder, {"steps": STEPS})
    return folder


def start(corpus: Path, folder: Path, planned: float = 0.0, **section: Any) -> Reporter:
    """Makes the next start of a rehearsal in `folder`."""
    for name in ("work", "out"):
        (folder / name).mkdir(exist_ok=True)
    phase = {**train_fixtures.PHASE, "steps": STEPS}
    config = rehearsal.RehearsalConfig.model_validate(
        {**train_fixtures.config(), "phase": phase, "layout": {}, **section}
    )
    inputs, report = {role: Artifact.open(corpus / role) for role in ("tokens", "order")}, Reporter()
    report.planned_tokens_per_s = planned
    report.lease = 1 + len(list(folder.glob("work/starts/*")))
    STAGE.run(config, inputs, folder / "work", folder / "out", report)
    return report


def before(corpus: Path, folder: Path) -> None:
    """Makes the first start, which ends with the step that the next one repeats."""
    with pytest.raises(Restart, match="step 3 is taken once, and taken again after a restart from step 2"):
        start(corpus, folder)
    assert not any((folder / "out").iterdir())


def test_a_good_rehearsal_is_recorded(longer_corpus: Path, tmp_path: Path) -> None:
    before(longer_corpus, tmp_path)
    report = start(longer_corpus, tmp_path)

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rehearsal.json"]
    body = json.loads((tmp_path / "out/rehearsal.json").read_text())
    assert body["before"] == body["after"] and body["exact"] and (body["ranks"], body["restored_step"]) == (1, 2)
    (step,) = [line for line in body["after"] if "loss" in line]
    train_fixtures.pretrain(
        longer_corpus, tmp_path / "phase/work", tmp_path / "phase/out", train_fixtures.config(steps=STEPS)
    )
    assert step["step"] == 3 and step["loss"] == train_fixtures.losses(tmp_path / "phase/out")[2]
    record = json.loads((tmp_path / "work/starts/0002.json").read_text())["rehearsed"]
    assert record["tokens_per_s"] > 0 and record["planned_tokens_per_s"] is None
    assert (record["slow"], record["nodes"], record["moved_ranks"]) == (False, 1, 0)
    assert "a step came out equal after a restart, of 0 of 1 ranks on another node" in report.notes[-1]


@pytest.mark.parametrize("killed", [False, True])
def test_a_restart_with_other_weights_fails(
    longer_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    before(longer_corpus, tmp_path)
    load = Engine.load_state

    def load_wrongly(engine: Engine, *args: Any, **options: Any) -> None:
        load(engine, *args, **options)
        _, tensors = next(iter(engine.state()))
        tensors["weight"].data.mul_(1 + 1e-6)

    if killed:  # before it recorded the nodes
        (tmp_path / "work/nodes.json").unlink()
    monkeypatch.setattr(Engine, "load_state", load_wrongly)
    sentence = "rehearsal of pretrain failed: after the restart, 1 of 1 ranks, the first of them rank 0, hold not what was saved"
    with pytest.raises(CheckFailed, match=sentence):
        start(longer_corpus, tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("loss", r"loss was 1.25, is \d"),
        ("digests", "1 of 1 ranks, the first of them rank 0, hold other weights or states"),
    ],
)
def test_another_next_step_fails(longer_corpus: Path, tmp_path: Path, name: str, sentence: str) -> None:
    before(longer_corpus, tmp_path)
    (path,) = tmp_path.glob("work/attempt-*/training.jsonl")
    *earlier, step, digests = [json.loads(line) for line in path.read_text().splitlines()]
    (step if name == "loss" else digests)[name] = 1.25 if name == "loss" else ["0" * 64]
    path.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in (*earlier, step, digests)))
    with pytest.raises(CheckFailed, match=f"step 3 after the restart is not the one before it: {sentence}"):
        start(longer_corpus, tmp_path)
    # No later start is compared with one that differs.
    before(longer_corpus, tmp_path)
    start(longer_corpus, tmp_path)


def test_a_lost_checkpoint_fails(longer_corpus: Path, tmp_path: Path) -> None:
    before(longer_corpus, tmp_path)
    (attempt,) = tmp_path.glob("work/attempt-*")
    shutil.rmtree(attempt)
    with pytest.raises(CheckFailed, match="did not find what the one before had saved"):
        start(longer_corpus, tmp_path)
    before(longer_corpus, tmp_path)


def test_a_start_that_was_killed_before_its_end_is_made_again(longer_corpus: Path, tmp_path: Path) -> None:
    before(longer_corpus, tmp_path)
    (tmp_path / "work/nodes.json").unlink()
    before(longer_corpus, tmp_path)
    start(longer_corpus, tmp_path)


def test_a_damaged_checkpoint_fails_and_the_next_run_rehearses_anew(longer_corpus: Path, tmp_path: Path) -> None:
    before(longer_corpus, tmp_path)
    files = [path for path in tmp_path.glob("work/attempt-*/**/*") if path.is_file() and path.name != "training.jsonl"]
    largest = max(files, key=lambda path: path.stat().st_size)
    body = bytearray(largest.read_bytes())
    body[len(body) // 2] ^= 1
    largest.chmod(0o644)
    largest.write_bytes(body)
    with pytest.raises(CheckFailed, match="every work checkpoint in .* is damaged"):
        start(longer_corpus, tmp_path)
    before(longer_corpus, tmp_path)


def test_rounding_is_allowed_where_kernels_may_round_otherwise(
    longer_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rehearsal, "_is_exact", False)
    for change in (1.01, 1.0001):
        before(longer_corpus, tmp_path)
        (path,) = tmp_path.glob("work/attempt-*/training.jsonl")
        *earlier, step, digests = [json.loads(line) for line in path.read_text().splitlines()]
        step["loss"], digests["digests"] = step["loss"] * change, ["0" * 64]
        path.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in (*earlier, step, digests)))
        if change == 1.01:
            with pytest.raises(CheckFailed, match="and may differ by 0.001 of it"):
                start(longer_corpus, tmp_path)
    start(longer_corpus, tmp_path)
    assert json.loads((tmp_path / "out/rehearsal.json").read_text())["exact"] is False


def test_a_slow_phase_is_a_finding(longer_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 tokens in each step of one second, by a clock that counts how often it is asked."""
    monkeypatch.setattr(Rehearsal, "clock", itertools.count().__next__)
    before(longer_corpus, tmp_path)
    sentence = r"256 tokens a second are 51% of the planned 500, less than 70% \(rehearsal.least_of_plan\)"
    with pytest.raises(CheckFailed, match=f"rehearsal of pretrain failed: {sentence}"):
        start(longer_corpus, tmp_path, 500.0, slow="stop")
    before(longer_corpus, tmp_path)
    report = start(longer_corpus, tmp_path, 500.0)
    assert "are 51% of the planned 500, less than 70%" in report.notes[-1]
    record = json.loads(max(tmp_path.glob("work/starts/*.json")).read_text())["rehearsed"]
    assert record["slow"] and record["planned_tokens_per_s"] == 500.0 and record["tokens_per_s"] == 256.0

    fast = tmp_path / "fast"
    fast.mkdir()
    before(longer_corpus, fast)
    assert "(102% of the plan)" in start(longer_corpus, fast, 250.0, slow="stop").notes[-1]


OTHER_WEIGHTS = """
import os, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name != "stages.train.rehearsal_trainer" or os.environ.get("RANK") != "1":
            return None
        sys.meta_path.remove(self)
        from stages.train.engine import Engine
        load = Engine.load_state
        def load_wrongly(engine, *args, **options):
            load(engine, *args, **options)
            next(iter(engine.state()))[1]["weight"].data.mul_(1 + 1e-6)
        Engine.load_state = load_wrongly
sys.meta_path.insert(0, Finder())
"""
"""For a sitecustomize.py: rank 1 restores other weights."""


def rehearsed_recipe(folder: Path, **changes: Any) -> str:
    """atom-smoke on two ranks, with a few steps of pretraining, that is rehearsed."""
    phase = {"batch": {"global_tokens": 1536, "micro_tokens": 768}, "parallelism": {"ranks": 2, "ep": 2}, "steps": 24}
    settings = {f"pretrain__{name}": value for name, value in phase.items()}
    return write(folder / "r.yaml", **settings, **{"rehearsal": {"above_gpu_hours": 0.0}, **changes})


def test_a_phase_on_two_ranks_follows_its_rehearsal(smoke_data: Path, tmp_path: Path) -> None:
    """By the local launcher. That the bytes are those without a rehearsal is tested on Slurm for two ranks, and below."""
    home = tmp_path / "home"
    copy_sealed(smoke_data, home, *DATA)
    output = atom(home, "run", rehearsed_recipe(tmp_path), "--until", "pretrain").stdout
    assert len(list((home / "artifacts").glob("pretrain-*"))) == 1
    (folder,) = (home / "artifacts").glob("rehearsal-*")
    assert folder.name.startswith("rehearsal-pretrain-") and "a step came out equal after a restart" in output
    body = json.loads((folder / "rehearsal.json").read_text())
    assert body["ranks"] == 2 and body["before"] == body["after"]
    (row,) = [line for line in body["after"] if "digests" in line]
    assert len(set(row["digests"])) == 2, "each rank has experts of its own"
    stages = {row["name"]: row for row in json.loads(atom(home, "status", "--json").stdout)["stages"]}
    assert stages["rehearsal-pretrain"]["state"] == "sealed"
    bodies = [body for _, body in provenance.read(home / "ledger", folder.name)]
    assert sorted(map(str, map(provenance.kind, bodies))) == ["None", Kind.RESTART]
    assert sum(run_facts.usage_by_stage(bodies)["rehearsal"][name] for name in ("attempts", "failed")) == 2


def test_a_failed_rehearsal_stops_the_run(smoke_data: Path, tmp_path: Path) -> None:
    home, path = tmp_path / "home", rehearsed_recipe(tmp_path)
    copy_sealed(smoke_data, home, *DATA)
    bug = tmp_path / "sitecustomize.py"
    bug.write_text(OTHER_WEIGHTS)
    failed = atom(home, "run", path, "--until", "pretrain", code=1, PYTHONPATH=str(tmp_path))
    assert "the rehearsal of pretrain failed: after the restart, 1 of 2 ranks, the" in (failed.stderr)
    assert "first of them rank 1, hold not what was saved after step 2; have the nodes" in failed.stderr
    assert not list((home / "artifacts").glob("pretrain-*")) and not list((home / "artifacts").glob("rehearsal-*"))


def test_the_plan_lists_the_rehearsals_of_costly_phases(tmp_path: Path) -> None:
    body = json.loads(atom(tmp_path, "plan", rehearsed_recipe(tmp_path), "--json").stdout)
    plans = {row["name"]: row for row in body["stages"]}
    names = list(plans)
    assert names.index("rehearsal-pretrain") + 1 == names.index("pretrain")
    assert plans["rehearsal-pretrain"]["training"]["steps"] == rehearsal.STEPS
    assert plans["rehearsal-pretrain"]["tokens"] * 24 == plans["pretrain"]["tokens"] * rehearsal.STEPS
    assert plans["rehearsal-pretrain"]["published_bytes"] == 0
    # Below the budget nothing changes.
    calm = json.loads(atom(tmp_path, "plan", rehearsed_recipe(tmp_path, rehearsal={}), "--json").stdout)
    keys = {row["name"]: row["key"] for row in calm["stages"]}
    assert keys == {name: row["key"] for name, row in plans.items() if not name.startswith("rehearsal-")}


@at_length("training", 60)
def test_the_release_has_the_rehearsals(smoke_home: Path, tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "home/releases/atom-smoke-0.1.0"
    shutil.copytree(smoke_home, home)  # with the logs, which a release holds
    path = write(tmp_path / "r.yaml", rehearsal={"above_gpu_hours": 0.0})
    planned = {row["name"] for row in json.loads(atom(home, "plan", path, "--json").stdout)["stages"]}
    assert not any(name.startswith("rehearsal-") for name in planned), "a sealed phase is not rehearsed"
    for artifact in (home / "artifacts").iterdir():
        if re.match("sft(@[0-9]+)?-", artifact.name):
            shutil.rmtree(artifact)
    atom(home, "run", path)
    without, rehearsed = (next((place / "artifacts").glob("sft-*")) for place in (smoke_home, home))
    assert (rehearsed.name, train_fixtures.digest(rehearsed)) == (without.name, train_fixtures.digest(without))
    atom(home, "build", path)

    gate = json.loads((folder / "evidence/gates.json").read_text())["rehearsals"]
    assert gate == {"ok": True, "detail": "1 phases were rehearsed: a step after a restart is equal"}
    second = [sys.executable, str(folder / "evidence/independent_verifier.py"), str(folder)]
    assert subprocess.run(second, check=False).returncode == 0
    checks = json.loads(atom(home, "verify", str(folder), "--json").stdout)["checks"]
    assert [check["ok"] for check in checks if check["name"] == "rehearsals"] == [True]
    card = (folder / "model/README.md").read_text()
    assert card.count("| 1 | 0; 1 | bit for bit | ") == 1 and card.count("| no plan |") == 1

    shown = json.loads(atom(home, "show", str(folder), "--json").stdout)["rehearsals"]
    assert list(shown) == ["sft"] and all(row["tokens_per_s"] > 0 for row in shown.values())

    published = folder / "evidence/rehearsals/sft.json"
    body = json.loads(published.read_text())
    body["after"][0]["loss"] += 1e-6
    published.write_text(json.dumps(body))
    (problem,) = learning.rehearsals(opened(folder)).problems
    assert "rehearsals/sft.json: the step after the restart is not the one before it: loss was" in problem
    published.unlink()
    assert learning.rehearsals(opened(folder)).problems == ["evidence/rehearsals/sft.json is missing"]


@pytest.mark.parametrize("utilization", [None, 0.4])
def test_the_speed_is_compared_with_that_of_the_plan(utilization: float | None, tmp_path: Path) -> None:
    """The model of training time, and a measured rate."""
    graph, profile = (
        dag.compose(recipes.load("atom-1b-a300m"), Store(tmp_path), True),
        cluster_profile.load("h100-pyxis"),
    )
    if utilization is not None:
        body = profile.model_dump()
        body["gpu"]["bf16"]["utilization"] = utilization
        profile = Profile.model_validate(body)
    node = graph.nodes["rehearsal-pretrain"]
    (row,) = plan.plan(graph, dag.states(graph, Store(tmp_path)), [node.name])
    (use,) = estimate_costs([row], profile, small=False).uses
    gpus = slurm.allocation_of(profile.cluster(), node).gpus
    assert row.estimate.tokens is not None
    assert slurm.planned_speed(node, profile, gpus) == pytest.approx(row.estimate.tokens / use.hours / 3600)
    assert slurm.planned_speed(graph.nodes["tokenize"], profile, 0) == 0.0
