"""What servers in jobs of their own, and what draws in the stage's own GPUs, add to a plan: by hand, and of a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.stage import Estimate, ServedWork
from pipeline.core.store import Store
from pipeline.graph import budget, dag, plan, registry
from pipeline.graph import recipe as recipes
from pipeline.graph.dag import State
from pipeline.launch import cluster_profile
from pipeline.launch.cluster_profile import Profile
from pipeline.operations import fit
from pipeline.operations.fit import Use, estimate_costs
from stages.evaluation.estimates import BASE_BYTES
from tests.fixtures import ROOT
from tests.fixtures.fit_fixtures import BODY, GIB, TRAINING
from tests.fixtures.run_fixtures import atom

SERVED = ServedWork(
    flops=5.76e17, gpu_flops=1e13, cpu_flops=1e13, overlaps=False, memory=lambda gpus: (gpus * 10 * GIB, 60 * GIB),
    assumed="answers at 10 TFLOP/s",
)  # fmt: skip
"""Two hours of two servers with four GPUs, or cores, each."""
PHASE = Estimate(flops=7.2e18 + 5.76e17, training=TRAINING, served=SERVED)
"""Of the other FLOPs, one hour of eight GPUs at a quarter of 1000 TFLOP/s."""
SERVERS = {"partition": "gpu", "minutes": 60, "gpus_per_node": 4, "cpus_per_task": 4, "count": 2}


def profile(servers: dict[str, Any] | None = SERVERS, **changed: Any) -> Profile:
    slurm = BODY["slurm"] | {"servers": servers} | changed
    prices = {"prices": {"gpu_hour": 2, "core_hour": 1}, "power": {"watts_per_core": 8, "watts_per_gpu": 500}}
    return Profile.model_validate(BODY | prices | {"slurm": slurm})


def row(estimate: Estimate = PHASE, takes_servers: bool = True) -> plan.StagePlan:
    return plan.StagePlan(State("it", "it-0", "to run"), estimate, {}, 8, {}, None, True, takes_servers=takes_servers)


@pytest.mark.parametrize(
    ("servers", "overlaps", "expected"),
    [
        # in turn: 1 + 2 hours of 8 and 8 GPUs
        (SERVERS, False, Use("it", 3, 48, 0, 96, 24_000, server_gpu_hours=24)),
        (SERVERS, True, Use("it", 2, 32, 0, 64, 16_000, server_gpu_hours=16)),
        (SERVERS | {"count": 8}, True, Use("it", 1, 40, 0, 80, 20_000, server_gpu_hours=32)),
        # on 2 x 4 cores, which are counted while they are busy
        (SERVERS | {"gpus_per_node": 0}, False, Use("it", 3, 24, 16, 64, 12_128, server_core_hours=16)),
        # by the GPU of rank 0, 16 hours
        (None, False, Use("it", 17, 136, 0, 272, 68_000)),
    ],
)
def test_hours_money_and_energy_by_hand(servers: dict[str, Any] | None, overlaps: bool, expected: Use) -> None:
    estimate = replace(PHASE, served=replace(SERVED, overlaps=overlaps))
    costs = estimate_costs([row(estimate)], profile(servers), small=False)
    assert costs.uses == (expected,) and costs.total == replace(expected, name="all")
    assert costs.json()["stages"] == [costs.uses[0].json()] and "server_gpu_hours" in costs.uses[0].json()
    on_gpus = servers is None or servers["gpus_per_node"] > 0
    assert ("assumed: answers at 10 TFLOP/s" in costs.assumed) == on_gpus
    limits: budget.Limits = {"gpu_hours": expected.gpu_hours - 1, "core_hours": None}
    (beyond,) = budget.foreseen(limits, {"gpu_hours": 0.5, "core_hours": 0}, costs.hours)
    assert f"{expected.gpu_hours:,.2f} hours to come" in beyond


def test_servers_of_a_stage_without_a_time_are_in_no_figure() -> None:
    body = profile().model_dump() | {"gpu": None}
    costs = estimate_costs([row()], Profile.model_validate(body), small=False)
    assert costs.total == Use("all")


def test_a_stage_that_takes_no_servers_gets_none() -> None:
    (use,) = estimate_costs([row(takes_servers=False)], profile(), small=False).uses
    assert (use.hours, use.gpu_hours, use.server_gpu_hours) == (17, 136, 0)
    of_others = replace(PHASE, served=replace(SERVED, places=4))
    (use,) = estimate_costs([row(of_others, takes_servers=False)], profile(), small=False).uses
    assert (use.hours, use.gpu_hours) == (5, 40)


@pytest.mark.parametrize(
    ("servers", "hours"), [(SERVERS, 2 + 1), (SERVERS | {"gpus_per_node": 0}, 2 + 1), (None, 16 + 1)]
)
def test_on_cores(servers: dict[str, Any] | None, hours: float) -> None:
    """Eight ranks compute for eight core hours, beside the 16 of drawing."""
    estimate = Estimate(cpu_seconds=24 * 3600, flops=1e18, served=SERVED)
    body = profile(servers, train=BODY["slurm"]["train"] | {"gpus_per_node": 0})
    (use,) = estimate_costs([row(estimate)], body, small=False).uses
    on_gpus = bool(servers and servers["gpus_per_node"])
    assert (use.hours, use.gpu_hours, use.server_gpu_hours) == (hours, 24 * on_gpus, 24 * on_gpus)
    assert (use.core_hours, use.server_core_hours) == (8 if on_gpus else 24, 16 if servers and not on_gpus else 0)


def test_servers_must_fit_and_a_checkpoint_comes_with_its_answers() -> None:
    """TRAINING saves ten times: a tenth of 3 hours fits into a start of 15 minutes no more."""
    short = profile(train=BODY["slurm"]["train"] | {"minutes": 15}, servers=SERVERS | {"memory_gb": 59})
    (use,) = estimate_costs([row()], short, small=False).uses
    (result,) = fit.fits([row()], {"it": use}, short)
    assert result.reasons == (
        "its server needs 60.0 GiB of memory, and its job has 59.0 (slurm.servers.memory_gb)",
        "to its next checkpoint it needs 0.3 hours in one start, and a job has 0.2 (slurm.train.minutes)",
    )
    (result,) = fit.fits([row()], {}, profile(SERVERS | {"gpus_per_node": 8}))
    assert result.reasons == ("its server needs 80.0 GiB of memory, and a GPU has 76.0 (gpu.memory_gb)",)
    assert fit.fits([row()], {}, profile(SERVERS | {"memory_gb": 60}))[0].reasons == ()


def planned(folder: Path) -> tuple[str, list[plan.StagePlan]]:
    """The plan of the smallest recipe in bf16, whose answers vLLM draws."""
    text = (ROOT / "pipeline/recipes/atom-smoke.yaml").read_text().replace("name: atom-smoke", "name: served")
    text = text.replace("\nrlvr:\n", "\nrlvr:\n  precision: bf16\n")
    body = yaml.safe_load(text)
    body["rlvr"]["sampling"] |= {"kind": "vllm"}
    (folder / "served.yaml").write_text(yaml.safe_dump(body))
    store = Store(folder / "home")
    graph = dag.compose(recipes.load(str(folder / "served.yaml")), store, without_data=True)
    return str(folder / "served.yaml"), plan.plan(graph, dag.states(graph, store), list(graph.nodes))


def test_the_phase_of_a_recipe(tmp_path: Path) -> None:
    """The model of training time gives the updates, servers draw, and the table has a column of theirs."""
    reference, rows = planned(tmp_path)
    body = yaml.safe_load((ROOT / "pipeline/clusters/h100-pyxis.yaml").read_text())
    body["slurm"] |= {"train": body["slurm"]["train"] | {"tasks_per_node": 1}, "servers": SERVERS}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(body))
    clusters = cluster_profile.load(str(tmp_path / "p.yaml"))
    costs = estimate_costs(rows, clusters, small=False)
    use = next(use for use in costs.uses if use.name == "rlvr")
    (phase,) = (row for row in rows if row.state.name == "rlvr")
    assert phase.time is not None and clusters.accelerator is not None and phase.estimate.served is not None
    updates, drawing = phase.time(clusters.accelerator).seconds, phase.estimate.served.flops / (8 * 7e12)
    assert use.hours == pytest.approx((updates + drawing) / 3600) and updates > 0 < drawing
    assert use.server_gpu_hours == pytest.approx(8 * use.hours) == use.gpu_hours - use.hours
    assert costs.total.server_gpu_hours == use.server_gpu_hours
    assert fit.fits(rows, {use.name: use for use in costs.uses}, clusters)

    shown = atom(tmp_path / "home", "plan", reference, "--cluster", str(tmp_path / "p.yaml"), "--only", "rlvr").stdout
    assert "of servers" in shown
    assert json.loads(json.dumps(costs.json()))["total"]["server_gpu_hours"] == use.server_gpu_hours


def test_evaluation_by_vllm_in_the_stages_own_gpus_is_counted() -> None:
    graph = dag.compose(recipes.load("atom-30b-a3b"), Store(Path("none")), without_data=True)
    names = [name for name in graph.nodes if name.startswith("evaluate-")]
    rows = plan.plan(graph, {name: State(name, f"{name}-0", "to run") for name in names}, names)
    costs = estimate_costs(rows, cluster_profile.load("h100-pyxis"), small=False)
    hours = sum((row.estimate.gpu_seconds or 0) / 3600 for row in rows)
    assert hours > 0 and costs.hours["gpu_hours"] == pytest.approx(hours)


def test_a_variant_is_compared_in_the_memory_of_the_host_whatever_gpus_its_engine_has() -> None:
    """Two models in fp32 by transformers, on cores: no part of what a GPU of the server holds."""
    expected = {"parameters": 10**10, "active": 10**9, "tokens": 10**6, "weight_bytes": 2 * 10**10}
    config = {"variant": "bf16", "expected": expected, "heldout_documents": 2, "max_new_tokens": 8}

    def estimate(**engine: Any) -> Estimate:
        stage = registry.stage("variant")
        return stage.estimate(stage.config.model_validate({**config, "engine": engine}))

    on_cores, on_gpus = estimate(kind="in-process"), estimate(kind="vllm", gpus=2)
    assert on_gpus.host_bytes == on_cores.memory_bytes == BASE_BYTES + 8 * 10**10
    assert on_gpus.memory_bytes == 10**10 and on_cores.host_bytes == 0
