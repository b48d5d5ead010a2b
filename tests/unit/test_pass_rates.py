"""The pass rates of tasks before a phase: the stage on a tiny random model, the filter, and its place in the graph."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact, Store, write_manifest
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from release.cards import tables
from release.facts import training
from stages.evaluation import pass_rates as stage
from stages.formats.table import write_json
from stages.rl.config import RlPhase
from stages.rl.rollout.pass_rates import PASS_RATES, PassRateFilter, expected_tasks, filter_tasks
from stages.tasks import to_row
from tests.fixtures import ROOT, chat_fixtures, rl_fixtures
from tests.fixtures.run_fixtures import evaluate_in_shards

CONFIG = {"num_samples": 3, "max_new_tokens": 6, "seed": 0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    artifacts = chat_fixtures.make(tmp_path_factory.mktemp("inputs"))
    return {"model": artifacts["model"], "tasks": artifacts["tasks-rlvr"]}


def test_every_task_is_answered_and_has_the_mean_of_its_rewards(run_stage: Any, inputs: dict[str, Artifact]) -> None:
    sealed = run_stage(stage.STAGE, CONFIG, inputs)
    answers = chat_fixtures.table(sealed, "answers.parquet")
    rates = sealed.json(PASS_RATES)
    assert len(rates) == 30 and len(answers) == 90 and len({row["seed"] for row in answers}) == 90
    assert rates == stage.pass_rates(answers)  # type: ignore[arg-type]
    rewards = [{"id": "a", "reward": 1.0}, {"id": "a", "reward": -1.0}, {"id": "b", "reward": 3.0}]
    assert stage.pass_rates(rewards) == {"a": 0.5, "b": 1.0}  # type: ignore[arg-type]


def test_shards_give_the_same_bytes(
    run_stage: Any, inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "ITEMS_PER_BATCH", 8)
    whole = run_stage(stage.STAGE, CONFIG, inputs)
    config = evaluate_in_shards(stage.STAGE, CONFIG, inputs, tmp_path / "work", 2)
    monkeypatch.setattr(stage, "ChatModel", None)  # nothing is left to do
    assert run_stage(stage.STAGE, config, inputs, tmp_path / "work").digest == whole.digest


def rows_and_rates(folder: Path, rates: list[float]) -> tuple[list[Any], Artifact]:
    rows = [to_row(f"add/{n}", f"add {n}", "exact", "add", n % 2) for n in range(len(rates))]
    folder.mkdir(exist_ok=True)
    write_json(folder / PASS_RATES, {row["id"]: rate for row, rate in zip(rows, rates, strict=True)})
    return rows, write_manifest(folder, "pass-rates-test")


def test_what_is_kept_lies_between_the_bounds(tmp_path: Path) -> None:
    rows, artifact = rows_and_rates(tmp_path / "rates", [0.0, 0.1, 0.5, 0.9, 1.0, 1.0])
    for settings, kept in (
        ({}, [1, 2, 3]),
        ({"below": 0.9}, [1, 2]),
        ({"above": 0.1, "below": None}, [2, 3, 4, 5]),
        ({"above": None, "below": None}, [0, 1, 2, 3, 4, 5]),
    ):
        used, bins = filter_tasks(rows, artifact, PassRateFilter.model_validate(settings))
        assert [row["id"] for row in used] == [f"add/{n}" for n in kept]
        assert sum(row["kept"] for row in bins.values()) == len(kept)
    assert bins["add/1"] == {"tasks": 3, "never": 0, "always": 1, "kept": 3}
    with pytest.raises(RecipeError, match="leaves none of 2 tasks: the policy at the start solves each"):
        filter_tasks(*rows_and_rates(tmp_path / "ends", [0.0, 1.0]), PassRateFilter())
    with pytest.raises(AtomError, match="has the rates of other tasks"):
        filter_tasks(rows[1:], artifact, PassRateFilter())
    with pytest.raises(ValidationError, match=r"above = 0\.5 and below = 0\.5 leave no rate between"):
        PassRateFilter(above=0.5, below=0.5)


def test_a_recipe_with_the_filter_measures_the_model_before_the_phase(tmp_path: Path) -> None:
    text = (ROOT / "pipeline/recipes/atom-tiny.yaml").read_text()
    before, _, after = text.partition("\nrlvr:")
    comment, _, rest = after.partition("\n")
    (tmp_path / "r.yaml").write_text(f"{before}\nrlvr:{comment}\n  pass_rates: {{num_samples: 4}}\n{rest}")
    graph = dag.compose(recipes.load(str(tmp_path / "r.yaml")), Store(tmp_path))
    node = graph.nodes["pass-rates-rlvr"]
    assert node.inputs == {"model": "export-sft", "tasks": "tasks-rlvr"}
    assert graph.nodes["rlvr"].inputs["pass_rates"] == "pass-rates-rlvr"
    config = node.config
    assert isinstance(config, stage.PassRatesConfig) and config.expected is not None and config.num_samples == 4
    phase = graph.recipe.config.rlvr  # type: ignore[attr-defined]
    assert isinstance(phase, RlPhase) and config.max_new_tokens == phase.sampling.max_new_tokens
    assert config.expected.tokens == expected_tasks(phase.tasks) * 4 * (100 + config.max_new_tokens)
    plain = dag.compose(recipes.load("atom-tiny"), Store(tmp_path))
    assert "pass-rates-rlvr" not in plain.nodes and plain.nodes["tasks-rlvr"].key == graph.nodes["tasks-rlvr"].key


def test_tools_and_the_filter_exclude_each_other() -> None:
    tools = {"offered": [{"tool": "python"}], "max_turns": 2, "max_result_characters": 100}
    with pytest.raises(ValidationError, match="pass_rates measures answers without tools"):
        RlPhase.model_validate({**rl_fixtures.PHASE, "pass_rates": {}, "tools": tools})


def test_the_card_says_what_was_left_out() -> None:
    bins = {"add/1": {"tasks": 12, "never": 1, "always": 2, "kept": 9}, "sort/1": dict.fromkeys(("tasks", "never"), 3)}
    bins["sort/1"] |= {"always": 0, "kept": 0}
    log = training.log_facts([{"step": 1, "tokens": 1, "filtered": bins}])
    lines = tables.task_filter(SimpleNamespace(training={"rlvr": log}))  # type: ignore[arg-type]
    assert lines[-3].endswith("| `add/1` | 12 | 1 | 2 | 9 |") and lines[-1].endswith("| all | 15 | 4 | 2 | 9 |")
    assert tables.task_filter(SimpleNamespace(training={"sft": training.log_facts([{"step": 1, "tokens": 1}])})) == []  # type: ignore[arg-type]
