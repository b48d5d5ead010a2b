"""The gates that are judged between the phases of a recipe: their stages, which phases wait, and when each is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import CheckFailed
from pipeline.core.store import Store, write_manifest
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from pipeline.graph.dag import Graph
from pipeline.launch import cluster_profile, slurm
from stages.confidence import Mean
from stages.evaluation import gates, gates_stage
from stages.formats.table import write_json
from tests.fixtures.recipe_fixtures import write
from tests.fixtures.run_fixtures import RecordingReport
from tests.fixtures.slurm_line_fixtures import programs

STOP = {"evaluation__stop_at_gates": True}
MERGED = {"pretrain__release_checkpoint_interval": 25, "pretrain__merge": {"last": 3}}
CLUSTER_RECIPES = ("atom-1b-a300m", "atom-30b-a3b", "atom-235b-a22b")


def composed(folder: Path, **changes: Any) -> Graph:
    return dag.compose(recipes.load(write(folder / "r.yaml", **changes)), Store(folder / "home"), without_data=True)


def keys(graph: Graph) -> dict[str, str]:
    return {name: node.key for name, node in graph.nodes.items() if not name.startswith("gates-")}


def test_the_setting_adds_stages_for_which_the_next_phase_waits_and_changes_no_key(tmp_path: Path) -> None:
    plain, stopping = composed(tmp_path), composed(tmp_path, **STOP)
    assert not any(name.startswith("gates-") or node.after for name, node in plain.nodes.items())
    assert keys(stopping) == keys(plain)
    assert set(stopping.nodes) - set(plain.nodes) == {"gates-pretrain", "gates-midtrain", "gates-rlvr"}
    waiting = {name: node.after for name, node in stopping.nodes.items() if node.after}
    # No gate judges sft alone, so what follows it waits for the one before.
    assert waiting == {"midtrain": ("gates-pretrain",), "sft": ("gates-midtrain",), "rlvr": ("gates-midtrain",)}
    assert {"evaluate-init", "evaluate-base"} <= set(stopping.nodes["gates-pretrain"].inputs.values())
    assert {"gates-pretrain", "evaluate-base"} <= stopping.upstream({"midtrain"})
    names = list(stopping.nodes)
    for name, node in stopping.nodes.items():
        assert all(names.index(other) < names.index(name) for other in node.precursors), name


def test_on_slurm_the_job_of_the_next_phase_waits_for_that_of_the_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", sbatch=""))
    graph, store = composed(tmp_path, **STOP), Store(tmp_path / "home")
    slurm.dry_run(graph, store, graph.select("midtrain", None), cluster_profile.load("dev"))
    script = (tmp_path / "home/dry-run/atom-smoke/midtrain.sh").read_text().splitlines()[1]
    assert script == "# waits for: tokenize, order-midtrain, pretrain, gates-pretrain"


def test_an_order_without_gates_is_left_as_it_is(tmp_path: Path) -> None:
    nodes = [dag.NodeSpec(name, "x", {}, inputs) for name, inputs in (("b", {}), ("a", {"in": "b"}), ("c", {}))]
    assert [spec.name for spec in dag.in_order(nodes)] == ["b", "a", "c"]


def test_a_threshold_or_a_waiver_changes_the_key_of_the_gates_alone(tmp_path: Path) -> None:
    before = composed(tmp_path, **STOP)
    waived = {"pretraining_lowers_bits_per_byte": "an example"}
    after = composed(tmp_path, **STOP, evaluation__waived_gates=waived, evaluation__bits_per_byte_tolerance=0.1)
    assert keys(after) == keys(before)
    assert all(after.nodes[name].key != before.nodes[name].key for name in ("gates-pretrain", "gates-midtrain"))


def test_gates_of_a_merged_phase_read_the_merged_model(tmp_path: Path) -> None:
    node = composed(tmp_path, **STOP, **MERGED).nodes["gates-pretrain"]
    assert set(node.inputs) == {"evaluate-init", "evaluate-base", "order-pretrain"}


@pytest.mark.parametrize("name", CLUSTER_RECIPES)
def test_cluster_recipes_judge_every_gate_before_the_next_phase(name: str, tmp_path: Path) -> None:
    graph = dag.compose(recipes.load(name), Store(tmp_path), without_data=True)
    planned = dag.gates(graph, graph.nodes)
    assert {gate.name for gate in planned} == gates.RULES.keys()
    for gate in planned:
        assert gate.judged_by == f"gates-{gate.phase}"
        assert gate.name in graph.nodes[gate.judged_by].config.gates  # type: ignore[attr-defined]
    assert set(graph.nodes["longcontext-1"].after) - {"rehearsal-longcontext-1"} == {"gates-midtrain"}
    # Keys may be found only once all phases have lengthened the context.
    assert [gate.phase for gate in planned if gate.name == "longcontext_finds_passkeys"] == ["longcontext-2"]
    # No policy learns from a reward model that orders pairs no better than their length does.
    assert "gates-reward" in graph.nodes["online-rlhf"].after and "gates-dpo" in graph.nodes["reward"].after
    assert set(graph.nodes["gates-reward"].inputs) >= {"reward"}
    assert graph.nodes["gates-longcontext-1"].config.later["longcontext_finds_passkeys"] == "longcontext-2"  # type: ignore[attr-defined]


def test_a_waived_gate_keeps_its_reason_in_the_plan(tmp_path: Path) -> None:
    planned = dag.gates(composed(tmp_path), {"rlvr"})
    reasons = yaml.safe_load((tmp_path / "r.yaml").read_text())["evaluation"]["waived_gates"]
    assert [(gate.name, gate.judged_by, gate.waived) for gate in planned] == [
        ("rlvr_raises_pass_at_1", "atom build", reasons["rlvr_raises_pass_at_1"])
    ]


def judge(folder: Path, base: float, waived: dict[str, str] | None = None) -> tuple[Path, RecordingReport]:
    """The stage after pre-training, which found these bits per byte; those of the untrained model are 8."""
    inputs = {}
    for name, value in (("init", 8.0), ("base", base)):
        bits = {source: {"value": value, "se": 0.01, "bytes": 100} for source in ("prose", "unread")}
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "scores.json", {"bits_per_byte": bits})
        inputs[f"evaluate-{name}"] = write_manifest(folder / name, f"evaluate-{name}")
    (folder / "order").mkdir()
    write_json(folder / "order/meta.json", {"sources": {"prose": {"rows": 3}, "unread": {"rows": 0}}})
    inputs["order-pretrain"] = write_manifest(folder / "order", "order-pretrain")
    config = gates_stage.GatesConfig(
        phase="pretrain", gates=("pretraining_lowers_bits_per_byte",), later={"rlvr_raises_pass_at_1": "rlvr"},
        models=("init", "base"), phases=("pretrain",), context=64, thresholds={}, waived=waived or {},
    )  # fmt: skip
    report, out = RecordingReport(), folder / "out"
    out.mkdir()
    gates_stage.run(config, inputs, folder / "work", out, report)
    return out, report


def test_the_stage_writes_what_passed_and_what_comes_later(tmp_path: Path) -> None:
    out, report = judge(tmp_path, base=3.0)
    sealed = yaml.safe_load((out / "gates.json").read_text())
    assert sealed == {
        "phase": "pretrain",
        "gates": {"pretraining_lowers_bits_per_byte": {"ok": True, "detail": "bits per byte prose 8.0000 → 3.0000"}},
        "later": {"rlvr_raises_pass_at_1": "rlvr"},
    }
    assert report.notes == [
        "gate pretraining_lowers_bits_per_byte: passed, bits per byte prose 8.0000 → 3.0000",
        "gate rlvr_raises_pass_at_1: cannot be judged before rlvr",
    ]


def test_a_failed_gate_is_one_sentence_with_two_ways_on(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed) as error:
        judge(tmp_path / "failed", base=8.0)
    assert str(error.value) == (
        "after pretrain, the gate pretraining_lowers_bits_per_byte failed: bits per byte prose 8.0000 → 8.0000; change "
        "the recipe's pretrain section and run again, or waive it by evaluation.waived_gates: "
        "{pretraining_lowers_bits_per_byte: REASON}, which repeats no phase"
    )
    out, _ = judge(tmp_path / "waived", base=8.0, waived={"pretraining_lowers_bits_per_byte": "an example"})
    (result,) = yaml.safe_load((out / "gates.json").read_text())["gates"].values()
    assert result["ok"] is None and result["detail"].startswith(
        "waived by the recipe (an example); bits per byte prose"
    )


@pytest.mark.parametrize("rule", ["midtraining_raises_accuracy", "rlvr_raises_pass_at_1", "longcontext_finds_passkeys"])
@pytest.mark.parametrize("later, ok", [(1.0, True), (0.9, False)])
def test_every_gain_knows_its_ceiling(rule: str, later: float, ok: bool) -> None:
    before, after = mean(1.0), mean(later)
    scores: list[Any] = [{"accuracy_all": share, "passkey": {"128": share}} for share in (before, after)]
    measured = gates.Measurements(
        scores={"base": scores[0], "mid": scores[rule.startswith("mid")], "long-1": scores[1]},
        sources={}, pass_at_1={"sft": before, "rlvr": after}, preferences={}, positions=lambda model: (),
        context=lambda: 64,
    )  # fmt: skip
    judgement = gates.RULES[rule].judge(measured, {"min_accuracy_gain": 0.0, "chat": {"min_gain": 0.0}})
    assert judgement is not None and judgement.ok == ok, judgement


def mean(value: float) -> Mean:
    return {"value": value, "se": (value * (1 - value) / 1000) ** 0.5, "n": 1000}
