"""The recipes for clusters: every rank of every phase is what Megatron builds, all ranks together are the model, and it
fits; the plan works where the data is not."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from stages.data.acquire.sources import Source
from stages.data.recipe import load
from stages.mcore.hf_mapping import hf_config
from stages.mcore.memory import memory_share
from stages.models.mixture import Qwen3MoeConfig
from stages.models.parallel_layout import Layout
from stages.train.config import PhaseConfig
from tests.fixtures import ROOT, fake_rank_fixtures
from tests.fixtures.run_fixtures import SOAK, atom

RECIPES = ("atom-1b-a300m", "atom-30b-a3b", "atom-235b-a22b")
PUBLISHED = {"atom-30b-a3b": "Qwen3-30B-A3B", "atom-235b-a22b": "Qwen3-235B-A22B"}
"""Models of the same shape, in bench/anchors.csv."""
FITS = 75 * 2**30

each = pytest.mark.parametrize("name", RECIPES)


@cache
def composed(name: str) -> dag.Graph:
    return dag.compose(recipes.load(name), Store(Path("none")), without_data=True)


def trained(name: str) -> list[tuple[str, Any]]:
    """(phase, config of its training stage), in order."""
    graph = composed(name)
    return [(phase.node, graph.nodes[phase.node].config) for phase in graph.recipe.config.text_phases]


@each
def test_figures_that_a_recipe_states_are_those_of_its_model(name: str) -> None:
    """Total and active parameters: as a comment states them, counted by layers, and over every tensor."""
    config = composed(name).recipe.config
    model, vocabulary = config.model, config.tokenizer.padded_vocab_size
    counts = model.parameters(vocabulary)
    sizes = {tensor: math.prod(shape) for tensor, shape in model.shapes(vocabulary).items()}
    idle = sum(size for tensor, size in sizes.items() if ".experts." in tensor)
    active = sum(sizes.values()) - idle + idle * model.num_experts_per_tok // model.experts
    text = (ROOT / f"pipeline/recipes/{name}.yaml").read_text()
    assert f"# {counts['total']:,} parameters, of which a token uses {counts['active']:,}\n" in text
    assert (counts["total"], counts["active"]) == (sum(sizes.values()), active)


def test_shapes_are_the_published_ones() -> None:
    """Qwen3-30B-A3B and Qwen3-235B-A22B: 30.5 and 235 billion parameters, 3.3 and 22 billion active; ours between."""
    counts = {}
    for name in RECIPES:
        config = composed(name).recipe.config
        parameters = config.model.parameters(config.tokenizer.padded_vocab_size)
        counts[name] = parameters["total"], parameters["active"]
    assert counts["atom-30b-a3b"][0] == 30_532_122_624 and 3.3e9 < counts["atom-30b-a3b"][1] < 3.4e9
    assert counts["atom-235b-a22b"][0] == 235_093_634_560 and 22.0e9 < counts["atom-235b-a22b"][1] < 22.3e9
    assert 1.0e9 < counts["atom-1b-a300m"][0] < 1.3e9 and 0.29e9 < counts["atom-1b-a300m"][1] < 0.31e9


@pytest.mark.parametrize("name", RECIPES if SOAK else RECIPES[:2])
def test_every_rank_of_every_layout_is_what_megatron_builds(name: str) -> None:
    """Each distinct rank, built by Megatron on the meta device: its tensors have the shapes of the boxes that it is said
    to hold, its parameters are as many as the planner says, and the boxes of all ranks together cover each tensor
    of the model exactly, each held by as many ranks as share it."""
    built: dict[
        Any, fake_rank_fixtures.Part
    ] = {}  # layouts that differ in context and data ranks only give a place the same tensors
    for phase, config in trained(name):
        model, layout, vocabulary = config.model, config.phase.parallelism, config.padded_vocab_size
        full, numbers = model.shapes(vocabulary), fake_rank_fixtures.places(layout)
        assert len(numbers) == layout.ranks
        holders: dict[str, Counter[Any]] = {tensor: Counter() for tensor in full}
        sizes = (layout.tp, layout.pp, layout.vpp, layout.ep, layout.split_experts)
        for place, ranks in Counter(numbers).items():
            if (sizes, place) not in built:
                rank, phase_ = numbers.index(place), config.phase
                rank_place, part = fake_rank_fixtures.part(
                    model, vocabulary, layout, rank, phase_.precision, phase_.pack
                )
                assert rank_place == place
                for tensor, boxes in part.boxes.items():
                    each_size = [tuple(stop - start for start, stop in box) for box in boxes]
                    joined = (sum(size[0] for size in each_size), *each_size[0][1:])
                    assert part.shapes[tensor] == joined, f"{phase} {place} {tensor}"
                assert part.trained == memory_share(model, vocabulary, layout, place.pipeline).all, f"{phase} {place}"
                built[sizes, place] = part
            for tensor, boxes in built[sizes, place].boxes.items():
                for box in boxes:
                    holders[tensor][box] += ranks
        for tensor, pieces in holders.items():
            _require_exact_cover(tensor, full[tensor], list(pieces), f"{name} {phase}")
            assert set(pieces.values()) == {_expected_holders(tensor, layout, model)}, f"{name} {phase} {tensor}"


def _require_exact_cover(tensor: str, shape: tuple[int, ...], boxes: list[Any], where: str) -> None:
    """That distinct boxes do not overlap and leave nothing out: along the one dimension that is cut they are adjacent."""
    assert boxes, f"{where}: nobody holds {tensor}"
    for dimension, size in enumerate(shape):
        spans = sorted({box[dimension] for box in boxes})
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])] and spans[-1][1] == size, tensor
    assert sum(math.prod(stop - start for start, stop in box) for box in boxes) == math.prod(shape), f"{where} {tensor}"


def _expected_holders(tensor: str, layout: Layout, model: Qwen3MoeConfig) -> int:
    """Ranks that hold the same part of a tensor."""
    if ".experts." in tensor:
        return layout.ranks // (layout.split_experts * layout.ep * layout.pp)
    copies = layout.data * layout.cp
    if "layernorm" in tensor or "router" in tensor:
        copies *= layout.tp
    tied = model.tie_embeddings and tensor.startswith("embedding") and layout.pp > 1
    return copies * (2 if tied else 1)


@each
def test_every_phase_fits(name: str) -> None:
    """80 GB GPUs, a node's host memory, and no model parallelism beyond a node but experts' and long rows'."""
    for phase, config in trained(name):
        estimate = composed(name).nodes[phase].stage.estimate(config)
        assert estimate.memory_bytes < FITS, f"{phase}: {estimate.memory_bytes / 2**30:.1f} GiB"
        assert 8 * estimate.host_bytes < 200 * 2**30
        assert config.phase.parallelism.tp <= 8 and config.phase.parallelism.ranks % 8 == 0
    largest = max(composed(name).nodes[phase].stage.estimate(config).memory_bytes for phase, config in trained(name))
    (row,) = [x for x in (ROOT / "docs/training.md").read_text().splitlines() if x.startswith(f"| `{name}` |")]
    assert row.endswith(f" {largest / 2**30:.1f} GiB |"), f"docs/training.md states another figure than {largest}"


def test_balance_coefficients_are_the_published_ones() -> None:
    """Of Qwen3 in the terms of transformers, to whose config an export translates it; of OLMoE in those of megablocks,
    which takes the mean over layers."""
    for name in PUBLISHED:
        model = composed(name).recipe.config.model
        exported = hf_config(model, model.experts, 1, 0, "bfloat16")
        assert exported["router_aux_loss_coef"] == pytest.approx(1e-3, rel=1e-3), name
    olmoe = composed("atom-1b-a300m").recipe.config.model
    assert olmoe.aux_loss * olmoe.layers == pytest.approx(0.01)


@each
def test_each_recipe_leads_to_a_release(name: str) -> None:
    """Conversations with a license for each, tasks of all kinds at commits, preferences of the recipe's own policy, and
    task sets; every text and every question is compared with the items of the sets."""
    graph = composed(name)
    nodes, config = graph.nodes, graph.recipe.config
    chat = {source.name: source for source in graph.recipe.data.sources if source.kind == "chat"}
    assert set(chat) <= set(config.sft.mix) and sum(config.sft.mix.values()) == pytest.approx(1)
    for source in chat.values():
        assert source.license_allow if source.reader.gives_licenses else source.license != "LicenseRef-by-document"
        # Of one set no commit was seen; `atom pin` writes it.
        assert len(getattr(source.reader, "revision", "0" * 40)) == 40 or source.name == "code_reasoning"
    tasks = nodes["tasks-rlvr"].config
    assert {source.verifier for source in tasks.sources} == {
        "exact", "math-verify", "python-tests", "reasoning-gym",
    }  # fmt: skip
    assert {source.verifier for source in config.dpo.preferences.tasks} <= {"courtesy"}
    assert nodes["dpo"].inputs["init"] == "rlvr"
    assert nodes["dpo"].inputs["preferences"] == nodes["reward"].inputs["preferences"] == "preferences"
    assert {source.preferred_by for source in config.preferences.sources} == {"humans"}
    stages = [node for node in nodes.values() if node.stage.name in ("filter", "tasks", "preferences", "contamination")]
    assert len(stages) >= 5 and all(node.inputs["benchmarks"] == "benchmarks" for node in stages)
    assert tasks.ngram == graph.recipe.data.curation.decontamination.ngram
    sets = {task_set.name: task_set.shots for task_set in nodes["benchmarks"].config.sets}
    assert sets == {
        "arc": 5, "hellaswag": 5, "mmlu": 5, "truthfulqa": 0, "gsm8k": 5, "math": 4, "humaneval": 0, "mbpp": 0,
    }  # fmt: skip
    measured = [name for name in nodes if name.startswith("harness-")]
    assert measured[0] == "harness-base" and measured[-1] == f"harness-{'online-rlhf' if config.online_rlhf else 'dpo'}"
    assert list(nodes["benchmark-changes"].inputs) == measured and len(measured) >= 7
    asked = {name: nodes[name].config.forms for name in measured}
    assert asked["harness-base"]["mbpp"] == () and asked["harness-base"]["gsm8k"] == ("raw",)
    assert asked["harness-rlvr"]["gsm8k"] == ("raw", "chat") and asked["harness-rlvr"]["mmlu"] == ("raw",)
    assert config.evaluation.harness.max_new_tokens == config.rlvr.sampling.max_new_tokens


@each
def test_the_story_of_a_recipe(name: str) -> None:
    """A decay begins where a release checkpoint is; rows grow to 128 thousand tokens; FP8 only where figures show it pays."""
    story = trained(name)
    pretrain: PhaseConfig = story[0][1].phase
    assert (pretrain.steps - (pretrain.optimizer.decay_steps or 0)) % pretrain.release_checkpoint_interval == 0
    rows = [config.phase.sequence_length for _, config in story]
    assert rows[:-1] == sorted(rows[:-1]) and rows[-2] == 131072 == story[-1][1].model.context_length
    assert story[-1][0] == "sft" and rows[-1] == 32768
    # One anneal: the rate of pre-training stays, and each later phase on text begins with the rate and moments before it.
    phases = [config.phase for _, config in story[:-1]]
    assert pretrain.optimizer.final_lr == pretrain.optimizer.lr and phases[-1].optimizer.final_lr == 0
    for before, after in pairwise(phases):
        assert after.optimizer_state == "carried" and not after.optimizer.warmup_steps
        assert after.optimizer.lr == before.optimizer.final_lr
    assert all(phase.output_z_loss and not phase.optimizer.decay_embeddings for phase in phases)
    evaluation = composed(name).recipe.config.evaluation
    assert evaluation.context.longest == 131072 and evaluation.left_out_tolerance
    assert story[0][1].model.balance == "global"
    for _, config in story:
        assert config.phase.precision == "bf16" or fp8_is_faster(PUBLISHED[name])
        assert len(config.phase.micro_batch_counts) == len(config.phase.batch.ramp) + 1


def fp8_is_faster(model: str) -> bool:
    """Whether published figures show FP8 to be faster than bf16 for a model on H100."""
    with open(ROOT / "bench" / "anchors.csv", newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if (row["system"], row["model"], row["run"]) == ("H100", model, "tuned")
        ]
    best = {row["precision"]: float(row["tflops"]) for row in rows}
    return best.get("fp8", 0.0) > best.get("bf16", math.inf)


def test_where_fp8_pays_on_h100() -> None:
    assert [fp8_is_faster(model) for model in ("Qwen3-30B-A3B", "Qwen3-235B-A22B", "DeepSeek-V3")] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("name", RECIPES if SOAK else RECIPES[:2])
def test_plan_without_the_data(name: str, tmp_path: Path) -> None:
    """Plan shows everything and says what is absent; run refuses, in one sentence."""
    plan = atom(tmp_path, "plan", name).stdout
    lines = plan.splitlines()
    unpinned = "source web: common-pile/cccc_filtered is not pinned in open.lock.yaml; run `atom pin RECIPE`"
    assert f"{unpinned} before running; keys below are provisional" in lines
    assert max(map(len, lines)) <= 160
    if f"$ atom plan {name}\n" in (page := (ROOT / "docs/operators.md").read_text()):
        shown = page.partition(f"$ atom plan {name}\n")[2].partition("```")[0].splitlines()
        assert set(shown) <= {line.rstrip() for line in lines}, "docs/operators.md shows what the plan says"
    phases = [line.split()[0] for line in lines if "Gi  " in line and not line.startswith("rehearsal-")]
    assert phases[:8] == [*(phase for phase, _ in trained(name)), "rlvr", "dpo", "reward"]
    body = json.loads(atom(tmp_path, "plan", name, "--json").stdout)
    assert len(body["absent"]) == 35 and body["absent"][0] in lines
    training = {stage["name"]: stage["training"] for stage in body["stages"] if stage["training"]}
    assert training["pretrain"]["gflop_per_token"] > 2 and training["longcontext-2"]["sequence_length"] == 131072
    for command in ("run", name), ("submit", name, "--cluster", "h100-pyxis"):
        assert atom(tmp_path, *command, code=2).stderr == f"atom: {unpinned}\n"


def test_plan_of_a_cluster_recipe_is_light() -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.graph import dag, plan, recipe\nfrom pipeline.cli import tables\n"
        "from pipeline.core.store import Store\n"
        "store = Store(Path('none'))\n"
        "found = dag.compose(recipe.load('atom-235b-a22b'), store, True)\n"
        "rows = plan.plan(found, dag.states(found, store), list(found.nodes))\n"
        "assert tables.phases_table(rows).row_count == 13\n"
        "assert tables.supply_table(dag.supply(found)).row_count == 37\n"
        "heavy = {'torch', 'megatron', 'numpy', 'pyarrow', 'transformers', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0, process.stderr


def test_absent_and_present_sources(tmp_path: Path) -> None:
    """A source whose files are there has its digest; one that is pinned keeps its pin, and its keys are final."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "x"}\n')
    source = {"kind": "prose", "license": "MIT", "license_evidence": "LICENSE", "origin": "here"}
    readers = {"one": folder, "two": tmp_path / "gone", "three": tmp_path / "gone"}
    pin = "sha256:" + "0" * 64
    sources = [
        {**source, "name": name, "reader": {"reader": "jsonl", "path": str(path)}} for name, path in readers.items()
    ]
    recipe = load("smoke").model_validate({"name": "r", "description": "d", "sources": sources})
    pinned = recipe.sources[2].model_copy(update={"tree_digest": pin})
    recipe = recipe.model_copy(update={"sources": (*recipe.sources[:2], pinned)})
    resolved, absent = recipe.present()
    assert [s.tree_digest[:10] for s in resolved.sources][1:] == ["auto", pin[:10]]
    assert resolved.sources[0].tree_digest == Source.model_validate(resolved.sources[0].model_dump(
        include=set(Source.model_fields))).tree_digest != "auto"  # fmt: skip
    where = f"no .jsonl or .jsonl.gz or .jsonl.zst file at {tmp_path}/gone; put it there before running"
    assert absent == (f"source two: {where}; keys below are provisional", f"source three: {where}")
