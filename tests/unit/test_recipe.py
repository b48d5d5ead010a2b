"""Recipes: every mistake is one sentence that names the recipe, the field and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import RecipeError
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from pipeline.launch import cluster_profile
from tests.fixtures import ROOT
from tests.fixtures.recipe_fixtures import SMOKE, write


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pretrain__stepz": 3}, "recipe r: pretrain.stepz is not a field; did you mean steps?"),
        ({"colour": 3}, "recipe r: colour is not a field; known: "),
        ({"pretrain__steps": None}, "recipe r: pretrain.steps is missing"),
        ({"pretrain__parallelism": {"tps": 2}}, "recipe r: pretrain.parallelism.tps is not a field; did you mean tp?"),
        ({"pretrain__steps": "many"}, "recipe r: pretrain.steps = 'many': input should be a valid integer"),
        (
            {"pretrain__batch": {"global_tokens": 3000, "micro_tokens": 512}, "pretrain__sequence_length": 512},
            "recipe r: pretrain.batch.global_tokens = 3000 is not a multiple of sequence_length 512; nearest: 2560 or 3072",
        ),
        ({"model__kv_heads": 3}, "recipe r: model.kv_heads = 3 does not divide heads = 4; nearest: 2 or 4"),
        ({"model__num_experts_per_tok": 1}, "recipe r: model.num_experts_per_tok = 1 gives the router no gradient"),
        ({"model__heads": 10**10, "model__kv_heads": 3}, "recipe r: model.heads = 10000000000: input should be less than or equal to 1024"),
        ({"pretrain__steps": 10**40}, "recipe r: pretrain.steps = a number of about 39 digits: input should be less than or equal to 100000000"),
        ({"model__num_experts_per_tok": 9}, "recipe r: model.num_experts_per_tok = 9 is more than experts = 4"),
        ({"midtrain__sequence_length": 512, "midtrain__batch": {"global_tokens": 512, "micro_tokens": 512}},
         "recipe r: midtrain.sequence_length = 512 is longer than model.context_length = 256"),
        ({"pretrain__mix": {"docstrings": 0.5, "cod": 0.5}}, "recipe r: pretrain.mix names cod, which data recipe smoke"),
        (
            {"release__maker": {"sources": {"cod": "public"}}},
            "recipe r: release.maker.sources names cod, which data recipe smoke",
        ),
        ({"release__maker": {"market_date": "2026-02-30"}}, "recipe r: release.maker.market_date = '2026-02-30' is no date of the calendar"),
        ({"pretrain__mix": {"docstrings": 0.5, "code": 0.4}}, "recipe r: pretrain.mix sums to 0.9; the shares must sum to 1"),
        ({"data": "smok"}, "there is no data recipe smok, neither packaged nor a file; did you mean smoke?"),
        # no threshold of a gate is so low that the gate cannot refuse; what refuses nothing is named
        ({"evaluation__min_accuracy_gain": -1.0}, "recipe r: evaluation.min_accuracy_gain = -1.0: input should be greater than or equal to 0"),
        ({"evaluation__chat__min_gain": -1.0}, "recipe r: evaluation.chat.min_gain = -1.0: input should be greater than or equal to 0"),
        ({"evaluation__chat__min_win_rate": 0.0}, "recipe r: evaluation.chat.min_win_rate = 0.0: input should be greater than or equal to 0.5"),
        ({"evaluation__chat__skill_tolerance": 1.0}, "recipe r: evaluation.chat.skill_tolerance = 1.0: input should be less than or equal to 0.25"),
        ({"evaluation__bits_per_byte_tolerance": 8.0}, "recipe r: evaluation.bits_per_byte_tolerance = 8.0: input should be less than or equal to 0.5"),
        ({"evaluation__parity_tolerance": 1.0}, "recipe r: evaluation.parity_tolerance = 1.0: input should be less than"),
        ({"rlvr__max_logprob_diff": 100.0}, "recipe r: rlvr.max_logprob_diff = 100.0: input should be less than or equal to 1"),
        ({"evaluation__waived_gates": {"no_secrets": "it is slow"}}, "recipe r: evaluation.waived_gates.no_secrets = 'no_secrets': "),
        ({"evaluation__waived_gates": {"rlvr_raises_pass_at_1": ""}}, "recipe r: evaluation.waived_gates.rlvr_raises_pass_at_1 = '' is empty"),
        ({"evaluation__waived_gates": {"dpo_is_preferred": "few steps"}},
         "recipe r: evaluation.waived_gates names dpo_is_preferred, which judges dpo, and the recipe has no dpo; leave it out"),
        ({"version": "1"}, "recipe r: version = '1' is no semantic version, such as 0.1.0"),
    ],
)  # fmt: skip
def test_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as error:
        dag.compose(recipes.load(write(tmp_path / "r.yaml", **changes)), Store(tmp_path))
    assert str(error.value).startswith(sentence), str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_gate_would_refuse_after_training_is_refused_before(tmp_path: Path) -> None:
    data = (ROOT / "data_recipes/smoke.yaml").read_text().replace("heldout_fraction: 0.1\n", "heldout_fraction: 0.0\n")
    (tmp_path / "own.yaml").write_text(data)
    recipe = recipes.load(write(tmp_path / "r.yaml", data="own.yaml", pretrain__mix={"sums": 1.0}))
    (sentence,) = dag.problems(recipe)
    assert sentence.startswith(
        "pretrain.mix has no source with held-out documents, by which the gate pretraining_lowers"
    )

    text = (ROOT / "pipeline/recipes/atom-tiny-long.yaml").read_text()
    shorter = text.replace("700, 1024, 1500, 2500, 4096]", "500]").replace("256, 512, ", "256, ")
    shorter = shorter.replace("short: 512", "short: 64")
    (tmp_path / "long.yaml").write_text(shorter)
    (sentence,) = dag.problems(recipes.load(str(tmp_path / "long.yaml")))
    assert sentence.startswith("evaluation.context.lengths end with 500, and the gate longcontext_finds_passkeys asks")
    waived = "  waived_gates: {longcontext_finds_passkeys: an example}\n  context:"
    (tmp_path / "long.yaml").write_text(shorter.replace("  context:", waived))
    assert list(dag.problems(recipes.load(str(tmp_path / "long.yaml")))) == []


def test_a_field_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(SMOKE.read_text() + "\nseed: 4\n")
    with pytest.raises(RecipeError, match=r"recipe r: line \d+ is not valid YAML: 'seed' stands twice"):
        recipes.load(str(path))


def test_not_yaml_and_not_there(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match=r"recipe r: line \d is not valid YAML"):
        recipes.load(str(tmp_path / "r.yaml"))
    with pytest.raises(
        RecipeError, match="there is no recipe atom-tinny, neither packaged nor a file; did you mean atom-tiny?"
    ):
        recipes.load("atom-tinny")


def keys(reference: str) -> dict[str, str]:
    return {name: node.key for name, node in dag.compose(recipes.load(reference), Store(Path("none"))).nodes.items()}


def changed_keys(tmp_path: Path, **changes: Any) -> set[str]:
    before, after = keys(str(SMOKE)), keys(write(tmp_path / "r.yaml", **changes))
    return {name for name in before if before[name] != after[name]}


def test_a_changed_field_changes_the_keys_of_what_depends_on_it_and_no_others(tmp_path: Path) -> None:
    models, chatty = ("mid", "sft", "rlvr"), ("sft", "rlvr")
    after_midtrain = {f"{stage}-{model}" for stage in ("export", "evaluate") for model in models} | {"sft", "rlvr"}
    after_midtrain |= {"fresh", "contamination", "baselines", "prefer-rlvr"}
    after_midtrain |= {f"{stage}-{model}" for stage in ("solve", "fresh-solve") for model in chatty}
    assert changed_keys(tmp_path, midtrain__optimizer__lr=1e-3) == {"midtrain"} | after_midtrain
    assert changed_keys(tmp_path, midtrain__steps=200) == {"order-midtrain", "midtrain"} | after_midtrain
    evaluated = {f"evaluate-{model}" for model in ("init", "base", *models)}
    assert changed_keys(tmp_path, evaluation__max_new_tokens=9) == evaluated | {"contamination", "baselines"}
    assert changed_keys(tmp_path, rlvr__tis_cap=1.5) == {name for name in after_midtrain if "rlvr" in name} | {
        "fresh", "contamination", "baselines", "fresh-solve-sft",
    }  # fmt: skip
    assert changed_keys(tmp_path, tokenizer__vocab_size=400) == {
        name
        for name in keys(str(SMOKE))
        if not name.startswith(("acquire", "items", "filter", "duplicates", "representatives", "dedup", "tasks"))
    }
    assert changed_keys(tmp_path, seed=1) >= {"acquire-sums", "items", "filter", "dedup", "order-pretrain", "pretrain"}


def test_what_is_not_identity_changes_no_key(tmp_path: Path) -> None:
    assert changed_keys(tmp_path, pretrain__checkpoint_interval=7) == set()
    assert changed_keys(tmp_path, name="other", description="other", release__languages=["fr"]) == set()


def test_a_cluster_profile_is_data_and_is_checked(tmp_path: Path) -> None:
    assert cluster_profile.load("local").local.jobs >= 1
    (tmp_path / "p.yaml").write_text("name: p\nlocal: {jobs: 0, stop_grace_seconds: 1}\npower: {watts_per_core: 1}\n")
    with pytest.raises(
        RecipeError, match="cluster profile p: local.jobs = 0: input should be greater than or equal to 1"
    ):
        cluster_profile.load(str(tmp_path / "p.yaml"))
