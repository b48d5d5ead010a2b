"""The miniatures of the recipes for clusters: what they keep of a recipe, and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.store import Artifact, Store
from pipeline.graph import dag, recipe
from pipeline.operations import recipe_check
from release.hub.local import server
from stages.miniature import CAPS
from stages.models.parallel_layout import Layout
from stages.tasks import benchmarks
from tests.fixtures import ROOT, miniature_hub
from tests.fixtures.run_fixtures import at_length, atom

RECIPES = ("atom-1b-a300m", "atom-30b-a3b", "atom-235b-a22b")
# Sizes and places in time; everything else of a recipe stays as it is.
SIZES = {pattern.rsplit(".", 1)[-1].strip("*") for pattern in CAPS} | {
    "padded_vocab_size", "moe_intermediate_size",
    "name", "description", "data", "layers", "steps", "sequence_length", "context_length", "over", "original_length",
    "lengths", "short", "max_new_tokens", "max_tokens", "warmup_steps", "decay_steps", "rewind_steps", "until_step", "every",
    "validate_every", "release_checkpoint_interval", "checkpoint_interval", "release_checkpoint_steps", "global_tokens",
    "micro_tokens", "micro_batches", "ranks", "tp", "pp", "vpp", "cp", "ep", "validation", "problems",
}  # fmt: skip
LOOSER = {"above", "below", "min_margin", "waived_gates", "above_gpu_hours", "max_epochs", "limit", "heldout_fraction"}


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The values of a recipe by their paths; lists of numbers are values."""
    if isinstance(value, dict):
        return {place: leaf for name, each in value.items() for place, leaf in leaves(each, (*path, name)).items()}
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return leaves({str(number): each for number, each in enumerate(value)}, path)
    return {path: value}


def is_size(path: tuple[str, ...]) -> bool:
    return path[-1] in SIZES or path[-2:-1] in (("problems",), ("validation",))


@pytest.mark.parametrize("name", RECIPES)
def test_a_miniature_is_its_recipe_but_for_sizes(name: str, tmp_path: Path) -> None:
    """The stages with their inputs, the gates, the kinds of parallelism, and every setting that is no size."""
    path = recipe_check.write_miniature("mini", name, tmp_path)
    assert not recipe_check.check(str(path), Store(tmp_path / "home"), "local").problems
    full, small = (dag.compose(recipe.load(it), Store(tmp_path), without_data=True) for it in (name, str(path)))
    assert {node.name: (node.stage.name, node.inputs) for node in small.nodes.values()} == {
        node.name: (node.stage.name, node.inputs) for node in full.nodes.values()
    }
    before = leaves(yaml.safe_load((ROOT / f"pipeline/recipes/{name}.yaml").read_text()))
    after = leaves(yaml.safe_load(path.read_text()))
    before, after = (
        {place: leaf for place, leaf in each.items() if "preferences" not in place} for each in (before, after)
    )
    assert {place for place in before if place not in after} == {
        place for place in before if "engine" in place or place[-2:] == ("sampling", "kind")
    }
    assert {place[-1] for place in after if place not in before and place[-2] != "waived_gates"} <= LOOSER
    changed = {place for place, value in after.items() if place in before and value != before[place]}
    assert {place for place in changed if not is_size(place)} <= {("dpo", "min_margin")}
    lines = [line for line in path.read_text().splitlines() if line.startswith("# switched: ")]
    assert len(lines) == sum(value == "vllm" for value in before.values()) + 2, (
        "and the tasks of preferences, and pass rates"
    )
    for (_, was), (_, now) in zip(phases(full), phases(small), strict=True):
        assert kinds(was) == kinds(now) and was.recompute == now.recompute and now.ranks <= 8
        layers = before["model", "layers"], after["model", "layers"]
        dealt = [len(set(layout.chunk_layers(count))) > 1 for layout, count in zip((was, now), layers, strict=True)]
        assert dealt[0] == dealt[1], "layers are dealt unevenly in both or in none"


@pytest.mark.parametrize("name", ["atom-tiny-long", "atom-smoke-glm", "atom-smoke-mla"])
def test_other_recipes_have_miniatures_without_mistakes(name: str, tmp_path: Path) -> None:
    path = recipe_check.write_miniature("mini", name, tmp_path)
    assert not recipe_check.check(str(path), Store(tmp_path / "home"), "local").problems


def phases(graph: dag.Graph) -> list[tuple[str, Layout]]:
    """(node, layout) of each phase that trains."""
    named = ((node.name, getattr(node.config, "phase", None)) for node in graph.nodes.values())
    return [(name, phase.parallelism) for name, phase in named if phase and hasattr(phase, "parallelism")]


def kinds(layout: Layout) -> set[str]:
    """The kinds of parallelism of a layout that has several ranks of each."""
    return {kind for kind in ("tp", "pp", "vpp", "cp", "ep") if getattr(layout, kind) > 1}


def test_the_command(tmp_path: Path) -> None:
    """It writes two files, and no file twice; its plan has all stages, and none of the phases needs much."""
    command = ("init", "mini", "--from", RECIPES[0], "--miniature")
    atom(tmp_path, *command, cwd=tmp_path)
    assert "mini-data.yaml exists" in atom(tmp_path, *command, cwd=tmp_path, code=2).stderr
    plan = atom(tmp_path, "plan", "mini.yaml", cwd=tmp_path).stdout
    assert "118 of 118 stages to run" in plan
    refused = atom(tmp_path, "init", "other", "--miniature", "--ranks", "8", cwd=tmp_path, code=2).stderr
    assert refused.startswith("atom: --miniature sets the ranks")


@at_length("miniatures", 60)
def test_sources_and_benchmarks_come_from_a_local_hub(tmp_path: Path) -> None:
    """The beginning of a run: every source is pinned and probed, and a stage, whose environment turns downloads off, reads
    the benchmarks. `make soak PART=miniatures` runs miniatures whole."""
    path, home = recipe_check.write_miniature("mini", RECIPES[0], tmp_path), tmp_path / "home"
    text = path.read_text()
    assert "    - mmlu\n" in text
    path.write_text(text.replace("    - mmlu\n", ""))  # its 57 tasks take most of the time
    miniature_hub.write(str(path), tmp_path / "hub")
    with server.running(tmp_path / "hub") as endpoint:
        hub: Any = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}
        pinned = json.loads(atom(home, "pin", str(path), "--json", **hub).stdout)
        atom(home, "run", str(path), "--until", "benchmarks", **hub)
    probes = {source["name"]: source["probe"] for source in pinned["sources"]}
    assert len(probes) == 35 and all(probe["kept_documents"] for probe in probes.values()), probes
    sealed = Artifact.open(next(home.glob("artifacts/benchmarks-*")))
    sets = {name: len(stated["tasks"]) for name, stated in sealed.json("tasks.json").items()}
    assert sets == {"arc": 2, "hellaswag": 1, "gsm8k": 1, "truthfulqa": 2, "math": 7, "humaneval": 1, "mbpp": 1}
    texts = dict(benchmarks.texts_of(sealed))
    assert len(texts) == 2 * 15 and texts["arc/arc_easy/000000"].startswith("Question: ")
