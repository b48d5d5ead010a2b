"""`atom plan --search`: the fastest layouts of a phase, and the distance of the cluster recipes from them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.cli import recipe_commands
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from pipeline.launch import cluster_profile
from pipeline.operations.layout_search import HEADROOM, SHOWN, search
from stages.train.config import TrainConfig
from stages.train.estimate import estimate, training_time

PROFILE = cluster_profile.load("h100-pyxis")
LIMIT = HEADROOM * 76 * 2**30


@cache
def composed(name: str) -> dag.Graph:
    return dag.compose(recipes.load(name), Store(Path("none")), without_data=True)


@pytest.mark.parametrize("phase", ["pretrain", "midtrain", "longcontext-1", "longcontext-2", "sft"])
@pytest.mark.parametrize("name", ["atom-1b-a300m", "atom-30b-a3b", "atom-235b-a22b"])
def test_cluster_recipes_are_near_the_fastest_layout_that_fits(name: str, phase: str) -> None:
    """A recipe may give up a tenth of the speed for a simpler layout, and needs nothing that the image lacks."""
    result = search(composed(name), phase, PROFILE)
    assert result.best is not None and result.written.package is None and result.written.memory_bytes <= LIMIT
    assert result.written.tokens_per_second >= 0.9 * result.best.tokens_per_second, result.best.settings


def small_phase() -> dag.Graph:
    """atom-1b-a300m with all 20 layers on 4 GPUs, and batches of 8 and 16 rows."""
    graph = composed("atom-1b-a300m")
    body = graph.nodes["pretrain"].config.model_dump()
    body["phase"]["parallelism"] = {"ranks": 4}
    body["phase"]["batch"] = {
        "global_tokens": 65536, "micro_tokens": 4096, "ramp": [{"until_step": 2000, "global_tokens": 32768}],
    }  # fmt: skip
    node = replace(graph.nodes["pretrain"], config=TrainConfig.model_validate(body))
    return replace(graph, nodes=graph.nodes | {"pretrain": node})


def test_the_search_finds_what_trying_all_layouts_finds() -> None:
    """Of all layouts of 4 GPUs that the config accepts, each validated, timed and measured by itself."""
    graph = small_phase()
    body, accelerator = graph.nodes["pretrain"].config.model_dump(), PROFILE.accelerator
    assert accelerator is not None
    fastest = 0.0
    for tp, pp, ep, etp, rows, recompute, vpp in itertools.product(
        (1, 2, 4), (1, 2, 4), (1, 2, 4), (None, 1), (1, 2, 4, 8), ("none", "selective", "layer"), (1, 5, 10)
    ):
        body["phase"]["parallelism"] = {
            "ranks": 4, "tp": tp, "pp": pp, "ep": ep, "etp": etp, "recompute": recompute, "vpp": vpp,
        }  # fmt: skip
        body["phase"]["batch"]["micro_tokens"] = rows * 4096
        try:
            config = TrainConfig.model_validate(body)
        except ValidationError:
            continue
        cost = estimate(config)
        assert cost.memory_bytes is not None and cost.tokens is not None
        if cost.memory_bytes <= LIMIT:
            fastest = max(fastest, cost.tokens / training_time(config, accelerator).seconds / 4)

    best = search(graph, "pretrain", PROFILE).best

    assert best is not None and best.tokens_per_second == pytest.approx(fastest, rel=1e-3)


def test_found_layouts_are_ranked_fit_and_say_what_they_need() -> None:
    graph = small_phase()
    result = search(graph, "pretrain", PROFILE)
    runnable = [layout for layout in result.found if layout.package is None]
    (other,) = [layout for layout in result.found if layout.package]

    speeds = [layout.tokens_per_second for layout in result.found]
    assert speeds == pytest.approx(sorted(speeds, reverse=True), rel=1e-3) and len(runnable) == SHOWN
    assert other.package == "deep_ep" and other.settings["parallelism"]["dispatcher"] == "flex"
    for layout in result.found:
        assert layout.memory_bytes <= LIMIT and layout.settings["parallelism"]["ranks"] == 4
        assert layout.gpu_hours == pytest.approx(4 * layout.hours)
        assert layout.cost == pytest.approx(2.5 * layout.gpu_hours)
    assert "median 11%, largest 81%" in result.assumed[0]


@pytest.mark.parametrize(
    "stage, changed, sentence",
    [
        ("tokenize", {}, "only layouts of training on text are searched; name one of pretrain, midtrain"),
        ("pretrain", {"gpu": None}, "has no section gpu, with peaks and bandwidths"),
        ("pretrain", {"gpu": {"memory_gb": None}}, "needs the section slurm, and memory_gb, memory_tb_s"),
    ],
)
def test_what_a_search_needs(stage: str, changed: dict[str, Any], sentence: str) -> None:
    gpu = PROFILE.gpu
    assert gpu is not None
    if changed.get("gpu"):
        changed = {"gpu": gpu.model_copy(update=changed["gpu"])}
    with pytest.raises(RecipeError, match=sentence):
        search(small_phase(), stage, PROFILE.model_copy(update=changed))


def test_a_cluster_with_too_few_nodes_is_refused_at_once() -> None:
    slurm = PROFILE.slurm
    assert slurm is not None
    few = slurm.model_copy(update={"train": slurm.train.model_copy(update={"nodes": 4})})
    with pytest.raises(RecipeError, match=r"it needs 8 nodes, and there are 4 \(slurm.train.nodes\)"):
        search(composed("atom-1b-a300m"), "pretrain", PROFILE.model_copy(update={"slurm": few}))


def test_nothing_fits_a_small_gpu() -> None:
    assert PROFILE.gpu is not None
    profile = PROFILE.model_copy(update={"gpu": PROFILE.gpu.model_copy(update={"memory_gb": 1.0})})
    result = search(small_phase(), "pretrain", profile)
    assert result.found == () and result.best is None and result.written.memory_bytes > 2**30


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table and the JSON state the same figures; an option without the one that it needs is refused."""
    monkeypatch.setenv("ATOM_HOME", str(tmp_path))
    options: dict[str, Any] = {"cluster": "h100-pyxis", "search": True, "stage": "sft"}

    recipe_commands.plan("atom-1b-a300m", **options, as_json=True)
    body = json.loads(capsys.readouterr().out)
    recipe_commands.plan("atom-1b-a300m", **options)
    text = capsys.readouterr().out

    assert body["phase"] == "sft" and body["profile"] == "h100-pyxis" and body["currency"] == "USD"
    for layout in (body["written"], *body["found"]):
        assert f"{layout['tokens_per_second']:,.0f}" in text and f"{layout['cost']:,.2f}" in text
    best = next(layout for layout in body["found"] if layout["package"] is None)
    assert f"  parallelism: {json.dumps(best['settings']['parallelism'])}\n" in text and "needs deep_ep" in text
    for refused in ({"search": True}, {"stage": "sft", "cluster": "h100-pyxis"}):
        with pytest.raises(AtomError, match="--search needs --cluster"):
            recipe_commands.plan("atom-1b-a300m", **refused)
