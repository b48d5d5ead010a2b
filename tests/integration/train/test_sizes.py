"""Smaller models of a recipe: trained on the rows of its pre-training, published, and checked."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline.core.errors import RecipeError
from pipeline.core.stage import identity
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from release.assembly import assemble
from release.audit import openness
from release.audit.replay import replay
from release.cards import tables
from release.checks import learning as check_of_sizes
from release.facts import run_facts
from release.facts.run_facts import read_checkpoints
from release.layout import RECIPE, sizes_of, when
from release.opened_release import Release
from release.prediction import sealing
from release.tracing import documents
from release.tracing.release_data import ReleaseData
from stages.evaluation.bits_per_byte import DOCUMENT_SCORES
from stages.formats.table import write_rows
from stages.models.registry import parse
from tests.fixtures import ROOT, release_fixtures, train_fixtures
from tests.fixtures.replay_fixtures import build
from tests.fixtures.run_fixtures import DATA, at_length, atom, copy_sealed

SIZES: list[dict[str, Any]] = [
    {"model": {"hidden_size": 32, "heads": 2, "kv_heads": 1}},
    {
        "model": {"layers": 1, "hidden_size": 16, "moe_intermediate_size": 16},
        "optimizer": {"lr": 4e-3, "final_lr": 1e-3, "warmup_steps": 10},
    },
]


START = {"repo": "local/base", "digest": f"sha256:{'1' * 64}", "license": "MIT"}


def recipe(folder: Path, sizes: Any = SIZES, **changed: Any) -> str:
    """atom-smoke with smaller models. changed: settings of sections; None removes one."""
    body = yaml.safe_load((ROOT / "pipeline/recipes/atom-smoke.yaml").read_text()) | {"sizes": sizes}
    for section, settings in changed.items():
        body[section] |= settings
    path = folder / "sized.yaml"
    path.write_text(yaml.safe_dump(body))
    return str(path)


def graph(path: str) -> dag.Graph:
    return dag.compose(recipes.load(path), Store(Path("none")))


def test_sizes_read_the_order_of_pretraining_and_change_no_key(tmp_path: Path) -> None:
    plain, sized = graph("atom-smoke").nodes, graph(recipe(tmp_path)).nodes
    assert {name: node.key for name, node in sized.items() if name in plain} == {
        name: node.key for name, node in plain.items()
    }
    assert [*sized][-2:] == ["size-1", "size-2"] and sized.keys() - plain.keys() == {"size-1", "size-2"}
    assert sized["size-1"].inputs == plain["pretrain"].inputs
    configs: list[Any] = [sized[name].config for name in ("pretrain", "size-1", "size-2")]
    assert [(c.model.hidden_size, c.model.layers, c.phase.optimizer.lr) for c in configs] == [
        (64, 2, 3e-3), (32, 2, 3e-3), (16, 1, 4e-3),
    ]  # fmt: skip
    assert configs[1].phase.release_checkpoint_interval == configs[1].phase.steps == configs[0].phase.steps


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ([{"model": {"hidden_size": 128}}], r"sizes\.0 has 3\d+ parameters, and the model 1\d+; name settings"),
        ([{"model": {"hiden_size": 32}}], r"sizes\.0\.model\.hiden_size: Extra inputs are not permitted; correct it"),
        ([{"model": {"hidden_size": 32, "experts": "many"}}], r"sizes\.0\.model\.experts: "),
        ([{"hidden_size": 32}], r"sizes\.0\."),
        (
            [{"model": {"architecture": "qwen3", "intermediate_size": 100}, "twin": True}],
            r"sizes\.0 needs 0\.0008202 GFLOP for a token and the model 0\.0008878; .* by at most 2%; nearest: "
            r"intermediate_size = 129$",
        ),
        ([{"model": {"hidden_size": 32}, "twin": True}], r"sizes\.0\.twin = true is for a model of architecture qwen3"),
        ([{"model": {"architecture": "qwen4"}}], r"sizes\.0\.model: .*architecture = 'qwen4' is unknown"),
    ],
)
def test_a_section_that_contradicts_the_recipe_is_refused(tmp_path: Path, sizes: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence) as caught:
        graph(recipe(tmp_path, sizes))
    assert "\n" not in str(caught.value)


def test_a_twin_is_dense_and_evaluated_like_the_base_model(tmp_path: Path) -> None:
    dense = {"model": {"architecture": "qwen3", "intermediate_size": 129}}
    nodes = graph(recipe(tmp_path, [dense, {**dense, "twin": True}])).nodes
    assert [*nodes][-4:] == ["size-1", "size-2", "size-2-export", "size-2-scores"]
    assert nodes["size-1"].config.model == nodes["size-2"].config.model
    models: Any = [nodes[name].config.model for name in ("size-2", "pretrain")]
    flops = [model.flops_per_token(320, 64) for model in models]
    assert models[0].routing is None and flops[0] == pytest.approx(flops[1], rel=0.02)
    assert nodes["size-2-export"].inputs == {"tokenizer": "tokenizer", "checkpoint": "size-2"}
    scores, base = nodes["size-2-scores"], nodes["evaluate-base"]
    assert scores.inputs == {**base.inputs, "model": "size-2-export"}
    assert identity(scores.config) == identity(base.config)


def test_sizes_need_the_whole_of_pretraining(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="sizes begin with the first step of pretrain"):
        graph(recipe(tmp_path, pretrain={"continue_from": "pretrain@30"}))
    path = recipe(tmp_path)
    body = yaml.safe_load(Path(path).read_text()) | {"start_from": START}
    for sections, sentence in (
        (body, "sizes begin with random weights, and pretrain with those of start_from"),
        (body | {"pretrain": None}, "sizes are trained on the rows of pretrain, which the recipe does not have"),
    ):
        Path(path).write_text(yaml.safe_dump(sections))
        with pytest.raises(RecipeError, match=sentence):
            graph(path)


def test_a_smaller_model_has_the_rotary_embedding_of_pretraining_unless_it_states_another(tmp_path: Path) -> None:
    sizes = [{"model": {"hidden_size": 32}}, {"model": {"hidden_size": 32, "rope_theta": 3e4}}]
    nodes = graph(recipe(tmp_path, sizes, pretrain={"rope": {"theta": 2e4}})).nodes
    configs: list[Any] = [nodes[name].config for name in ("pretrain", "size-1", "size-2")]
    assert [config.model.rope_theta for config in configs] == [2e4, 2e4, 3e4]


MODEL = identity(parse(train_fixtures.MODEL | {"hidden_size": 64, "context_length": 256}))
YARN = {"factor": 2, "original_length": 128}
PHASE = {"steps": 2, "release_checkpoint_interval": 1, "optimizer": {"lr": 1e-3}}
STATED: list[dict[str, Any]] = [
    {"model": {"hidden_size": 32}},
    {"model": {"layers": 1, "yarn": YARN}, "optimizer": {"lr": 2e-3}},
]
COMMON = {"seed": 0, "padded_vocab_size": 320}
CONFIGS: dict[str, Any] = {
    # Smaller models have no checkpoints at listed steps.
    "pretrain": {"model": MODEL, "phase": PHASE | {"release_checkpoint_steps": [1]}, **COMMON},
    "size-1": {
        "model": MODEL | {"hidden_size": 32}, "phase": PHASE | {"release_checkpoint_interval": 2}, "name": "size-1",
        **COMMON,
    },
    "size-2": {
        "model": identity(parse(MODEL | {"layers": 1, "yarn": YARN})), "name": "size-2", **COMMON,
        "phase": PHASE | {"release_checkpoint_interval": 2, "optimizer": {"lr": 2e-3}},
    },
}  # fmt: skip
INPUTS = {
    "tokenize": [], "order-pretrain": ["tokenize"],
    **{name: ["tokenize", "order-pretrain"] for name in ("pretrain", "size-1", "size-2")},
}  # fmt: skip


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a release has of a model and its smaller ones: checkpoints, records of training, manifests, statements."""
    run, folder = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("release")
    artifacts, statements = release_fixtures.make_run(run, INPUTS, configs=CONFIGS)
    source: Any = SimpleNamespace(artifacts=artifacts, earlier={}, references={})
    draft = assemble.Draft(folder, source)
    assemble.place_artifacts(draft)
    for path in statements:
        draft.copy(path, f"evidence/statements/{path.name}")
    draft.json(RECIPE, {"sizes": STATED})
    return folder


def test_sizes_are_placed_and_read(evidence: Path) -> None:
    assert [(size.name, size.total, dict(size.settings)) for size in run_facts.read_sizes(evidence)] == [
        ("pretrain", 40000, {}), ("size-1", 20000, {"hidden_size": 32}), ("size-2", 10000, {"layers": 1, "yarn": YARN}),
    ]  # fmt: skip
    findings = check_of_sizes.sizes(Release(evidence))
    assert not findings.problems and findings.summary == "2 smaller models, trained on the rows of pretrain"
    assert sizes_of(["size-10", "size-2", "pretrain"]) == ["size-2", "size-10"]
    assert (evidence / "checkpoints/size-1-step-2/model.safetensors").exists()
    rows = "\n".join(tables.checkpoints(read_checkpoints(evidence / "checkpoints")))
    assert "| `size-1-step-2` | smaller model 1 | 2 |" in rows


def test_a_checkpoint_of_a_size_is_traced_by_the_order_that_it_read(evidence: Path) -> None:
    data = ReleaseData(Release(evidence))
    for first_use, expected in (
        ((when("pretrain"), 2), ["pretrain-step-2", "size-1-step-2", "size-2-step-2"]),
        ((when("pretrain"), 3), []),
        ((when("midtrain"), 1), []),
    ):
        folders, _ = documents._trained_on(data, first_use)
        assert folders == expected


def change_json(path: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def apply(release: Path) -> None:
        body = json.loads((release / path).read_text())
        change(body)
        (release / path).write_text(json.dumps(body))

    return apply


def change_statement(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Rewrites what the statement about a node says of its config."""

    def apply(release: Path) -> None:
        for path in (release / "evidence/statements").glob("*.json"):
            body = json.loads(path.read_text())
            parameters = body["predicate"]["buildDefinition"]["externalParameters"]
            if parameters["node"] == name:
                change(parameters["config"])
                path.write_text(json.dumps(body))

    return apply


def score(release: Path, model: str, bits: list[float], size: int = 100) -> None:
    """Writes the scores of documents of a model."""
    folder = release / "dataset/evaluation" / model
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"source": "text", "id": str(number), "work": str(number), "bytes": size, "tokens": 50, "nll_bits": nll}
        for number, nll in enumerate(bits)
    ]
    write_rows(folder / "documents.parquet", DOCUMENT_SCORES, rows)


def test_a_twin_is_compared_with_the_base_model_on_the_same_documents(evidence: Path, tmp_path: Path) -> None:
    shutil.copytree(evidence / "evidence", tmp_path / "evidence")
    disagreement = (
        "evidence/recipe.json and dataset/evaluation disagree: size-1 is a twin there, or has scores here, but not both"
    )
    score(tmp_path, "base", [200.0, 300.0, 250.0])
    score(tmp_path, "size-1", [210.0, 312.0, 263.0])
    problems = check_of_sizes.sizes(Release(tmp_path)).problems
    assert problems == [disagreement]
    change_json(RECIPE, lambda body: body["sizes"][0].update(twin=True))(tmp_path)
    release = Release(tmp_path)
    assert not check_of_sizes.sizes(release).problems
    base, twin, other = release.sizes
    assert base.bits is not None and base.bits["value"] == 2.5 and other.bits is None
    assert twin.difference is not None and twin.difference["value"] == pytest.approx(35 / 300)
    # differences of 10, 12 and 13 bits in 100 bytes each: their standard deviation over the root of three documents,
    # and Student's interval of two degrees of freedom
    assert twin.difference["se"] == pytest.approx(statistics.stdev([0.10, 0.12, 0.13]) / 3**0.5)
    row = tables.twins(release.sizes)[-1]
    assert "| `size-1` | 20,000 |" in row and "| 2.617±0.295 | +0.117 (+0.079 to +0.155) |" in row
    assert tables.twins([base, other]) == tables.twins([]) == []

    score(tmp_path, "size-1", [210.0, 312.0, 263.0], size=99)
    problems = check_of_sizes.sizes(Release(tmp_path)).problems
    assert problems == ["dataset/evaluation/size-1 is of other documents than dataset/evaluation/base"]
    shutil.rmtree(tmp_path / "dataset/evaluation/size-1")
    problems = check_of_sizes.sizes(Release(tmp_path)).problems
    assert problems == [disagreement]


SUMMARY = "evidence/training/size-1/summary.json"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (change_json(SUMMARY, lambda b: b["heldout_loss"].update(last=1.0)), "its heldout_loss is 1.0, and the log ends"),
        (change_json(SUMMARY, lambda b: b.update(tokens=1)), "its tokens is 1, and the log ends with 256"),
        (change_json(SUMMARY, lambda b: b["parameters"].update(total=40000)), "size-1 has 40000 parameters, and the"),
        (change_json(RECIPE, lambda b: b["sizes"].pop()), "states the smaller models size-1, and evidence/training has"),
        (
            change_json(RECIPE, lambda b: b["sizes"][0]["model"].update(hidden_size=33)),
            "size-1 was trained with hidden_size = 32, and evidence/recipe.json states 33",
        ),
        (
            change_json(RECIPE, lambda b: b["sizes"][0]["model"].pop("hidden_size")),
            "size-1 was trained with hidden_size = 32, and evidence/recipe.json states 64",
        ),
        (
            change_json(RECIPE, lambda b: b["sizes"][0]["model"].update(heads=3)),
            "evidence/recipe.json states settings of size-1 that make no model: ",
        ),
        (change_json(RECIPE, lambda b: b["sizes"][1].pop("optimizer")), "size-2 was trained with another phase than"),
        (change_statement("size-1", lambda c: c.update(seed=1)), "size-1 was trained with another seed than"),
        (change_statement("size-1", lambda c: c["phase"].update(steps=9)), "size-1 was trained with another phase than"),
        (lambda r: shutil.rmtree(r / "evidence/training/size-2"), "and evidence/training has size-1"),
    ],
)  # fmt: skip
def test_a_changed_figure_or_recipe_is_found(
    evidence: Path, tmp_path: Path, change: Callable[[Path], None], problem: str
) -> None:
    shutil.copytree(evidence / "evidence", tmp_path / "evidence")
    subject = Release(tmp_path)
    assert not check_of_sizes.sizes(subject).problems
    change(tmp_path)
    problems = check_of_sizes.sizes(Release(tmp_path)).problems
    assert any(problem in text for text in problems), problems


@at_length("release", 12)
def test_a_size_is_trained(smoke_data: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    copy_sealed(smoke_data, home, *DATA)
    path = recipe(tmp_path)
    atom(home, "run", path, "--until", "size-1")
    store = Store(home)
    artifact = sealing.sealed(dag.compose(recipes.load(path), store), "size-1", store, "size-1")
    summary = artifact.json("summary.json")
    assert summary["heldout_loss"]["last"] < summary["heldout_loss"]["first"] - 1 and summary["phase"] == "size-1"
    assert sorted(folder.name for folder in artifact.path.glob("step-*")) == ["step-000000", "step-000060"]
    assert artifact.json("step-000060/state.json")["config"]["model"]["hidden_size"] == 32
    assert not list(store.artifacts.glob("pretrain-*"))


@at_length("release", 90)
def test_a_whole_release_answers_the_question_and_its_sizes_are_replayed(
    smoke_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(shutil.copytree(smoke_home, tmp_path / "home"))
    path = recipe(tmp_path)
    atom(home, "run", path)
    release = build(home, path, tmp_path)
    row = list(openness.rows(release))[-1]
    assert row.answer == "Y" and "size-1 of " in row.reason and "size-2 of " in row.reason
    monkeypatch.setattr(openness, "LEAST_SIZES", 3)
    assert list(openness.rows(release))[-1].answer == "P"
    result = replay(release, "size-1", None, None, lambda text: None, True)
    assert result.ok and result.first == 0
