"""Phases of a recipe whose checkpoints are averaged, and phases that carry over the optimizer of the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import RecipeError
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from release.cards import tables
from release.facts.model_facts import ModelFacts, Parameters
from release.facts.score_facts import merge_effects
from release.layout import folders_of, models_of, phases_of, trained_by, when
from stages.confidence import ratio
from tests.fixtures.recipe_fixtures import write
from tests.fixtures.release_fixtures import table

MERGED = {"pretrain__release_checkpoint_interval": 25, "pretrain__merge": {"last": 3}}
CARRIED = {"midtrain__optimizer_state": "carried"}
LONG = {"sequence_length": 512, "steps": 4, "mix": {"docstrings": 1.0}, "batch": {"global_tokens": 1024, "micro_tokens": 512},
        "optimizer": {"lr": 1e-3, "final_lr": 1e-4, "warmup_steps": 0}, "validation": {"every": 4, "rows": 4},
        "release_checkpoint_interval": 2, "optimizer_state": "carried", "merge": {"last": 2}}  # fmt: skip


def composed(folder: Path, **changes: Any) -> dag.Graph:
    return dag.compose(recipes.load(write(folder / "r.yaml", **changes)), Store(folder / "home"))


def test_later_nodes_read_the_average_and_the_phase_keeps_its_key(tmp_path: Path) -> None:
    plain = composed(tmp_path, pretrain__release_checkpoint_interval=25)

    graph = composed(tmp_path, **MERGED)

    assert graph.nodes["pretrain"].key == plain.nodes["pretrain"].key
    node = graph.nodes["merge-pretrain"]
    assert node.inputs == {"checkpoint": "pretrain"} and node.config.steps == (25, 50, 60)  # type: ignore[attr-defined]
    assert graph.nodes["midtrain"].inputs["init"] == graph.nodes["export-base"].inputs["checkpoint"] == node.name
    assert graph.nodes["export-unmerged-base"].inputs["checkpoint"] == "pretrain"
    assert "evaluate-unmerged-base" in graph.nodes and "solve-unmerged-base" not in graph.nodes
    assert set(graph.nodes) - set(plain.nodes) == {"merge-pretrain", "export-unmerged-base", "evaluate-unmerged-base"}


def test_post_training_begins_with_the_last_average(tmp_path: Path) -> None:
    changes = {"long_context": [LONG], "sft__merge": {"last": 2}, "sft__release_checkpoint_interval": 10}

    graph = composed(tmp_path, **changes)

    assert graph.nodes["sft"].inputs["init"] == "merge-longcontext-1"
    assert graph.nodes["longcontext-1"].inputs["init"] == "midtrain"
    assert graph.nodes["rlvr"].inputs["init"] == graph.nodes["export-sft"].inputs["checkpoint"] == "merge-sft"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pretrain__merge": {"last": 3}}, "pretrain.merge.last = 3 is more than the 2 release checkpoints after step 0; "
         "lower it or release_checkpoint_interval = 30"),
        ({"pretrain__merge": {"last": 1}}, "pretrain.merge.last = 1"),
        ({"sft__merge": {"last": 2}, "sft__lora": {"rank": 4, "alpha": 8}, "sft__release_checkpoint_interval": 10,
          "rlvr": None, "evaluation__waived_gates": None}, "leave out merge or lora"),
        ({"pretrain__optimizer_state": "carried"}, "pretrain.optimizer_state = carried, and no phase comes before"),
        ({**MERGED, **CARRIED}, "midtrain.optimizer_state = carried, and pretrain.merge averages weights"),
        ({"sft__optimizer_state": "carried", "sft__lora": {"rank": 4, "alpha": 8}, "rlvr": None,
          "evaluation__waived_gates": None},
         "sft.optimizer_state = carried, and sft.lora trains other tensors than midtrain"),
    ],
)  # fmt: skip
def test_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as error:
        composed(tmp_path, **changes)

    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_another_kind_of_optimizer_carries_nothing_over(tmp_path: Path) -> None:
    from stages.mcore.optimizer import Adam
    from stages.train.nodes import problems

    class Other(Adam):
        kind: Any = "other"

    phases = recipes.load(write(tmp_path / "r.yaml", **CARRIED)).config.text_phases  # type: ignore[attr-defined]
    assert not list(problems(phases))
    other = Other.model_validate(phases[0].config.optimizer.model_dump())
    phases[0].config.__dict__["optimizer"] = other

    assert [text.partition(";")[0] for text in problems(phases)] == [
        "midtrain.optimizer_state = carried, and pretrain trains with the optimizer other, whose states adam does not have"
    ]


def test_a_constant_rate_then_one_decay_without_warmup(tmp_path: Path) -> None:
    constant = {"lr": 3e-3, "final_lr": 3e-3, "warmup_steps": 20, "schedule": "wsd", "decay_steps": 1}
    anneal = {"lr": 3e-3, "final_lr": 0.0, "warmup_steps": 0}

    graph = composed(tmp_path, pretrain__optimizer=constant, midtrain__optimizer=anneal, **CARRIED)

    before, after = (graph.nodes[name].config.phase for name in ("pretrain", "midtrain"))  # type: ignore[attr-defined]
    assert {before.optimizer.learning_rate(step, before.steps) for step in range(20, before.steps + 1)} == {3e-3}
    assert after.optimizer.learning_rate(1, after.steps) == pytest.approx(3e-3, rel=1e-3)
    assert after.optimizer_state == "carried"


def test_names_of_averages_are_beside_those_of_their_phase() -> None:
    names = ["merge-pretrain", "long-2", "pretrain", "unmerged-long-2", "midtrain", "long-1", "base", "unmerged-base"]

    ordered = sorted(names, key=when)

    assert ordered == [
        "pretrain",
        "merge-pretrain",
        "unmerged-base",
        "base",
        "midtrain",
        "long-1",
        "unmerged-long-2",
        "long-2",
    ]
    assert phases_of(["merge-longcontext-1", "longcontext-1"]) == ["longcontext-1"]
    models = models_of(["export-sft", "export-unmerged-sft", "export-base", "evaluate-unmerged-base"])
    assert models == ["unmerged-base", "base", "unmerged-sft", "sft"]
    assert folders_of(models) == {"base": "model-base", "sft": "model"}
    assert [trained_by(name) for name in ("unmerged-base", "unmerged-long-2", "sft")] == [
        "pretrain",
        "longcontext-2",
        "sft",
    ]


def facts(bits: dict[str, float], **changes: Any) -> ModelFacts:
    scores: Any = {
        name: {"bits_per_byte_all": {"value": value, "se": 0.01}, "accuracy": {"add": {"value": 0.5, "se": 0.1}}}
        for name, value in bits.items()
    }
    return ModelFacts("Qwen3MoeForCausalLM", {}, "float32", Parameters(1, 1, 1), scores, **changes)


def test_the_card_states_the_averaged_steps_and_what_the_last_checkpoint_has() -> None:
    bits = {"init": 8.0, "unmerged-base": 2.1, "base": 2.0, "unmerged-long-2": 1.5, "long-2": 1.6}
    stated = {"pretrain": {"steps": [1000, 2000, 3000]}, "longcontext-2": {"steps": [2, 4]}}

    lines = tables.merges(facts(bits, merges=stated))

    assert lines == [
        "- The weights after pre-training are the average of its checkpoints at steps 1,000, 2,000 and 3,000: 2.000 ± "
        "0.010 bits per byte of held-out text, and 2.100 ± 0.010 of the last checkpoint alone.",
        "- The weights after long-context training 2 are the average of its checkpoints at steps 2 and 4: 1.600 ± 0.010 "
        "bits per byte of held-out text, and 1.500 ± 0.010 of the last checkpoint alone.",
    ]
    assert tables.merges(facts({"init": 8.0, "base": 2.0})) == []


def test_the_effect_is_a_difference_on_the_same_documents(tmp_path: Path) -> None:
    bits = {"unmerged-base": [40.0, 90.0, 60.0], "base": [38.0, 87.0, 60.0]}
    for model, values in bits.items():
        rows = [
            {"source": "code", "id": str(n), "work": str(n), "bytes": 20, "nll_bits": value}
            for n, value in enumerate(values)
        ]
        table(tmp_path / f"evaluation/{model}/documents.parquet", rows)

    effects = merge_effects(tmp_path, ["init", *bits])

    assert effects == {"pretrain": ratio([(-2.0, 20), (-3.0, 20), (0.0, 20)], works="012")}
    assert tables.merge_effects(effects)[-1] == "- pre-training: -0.0833 ± 0.0441"
    assert tables.merge_effects({}) == []


@pytest.mark.parametrize("names", [["init", "base"], ["init", "unmerged-base", "base"], ["init", "base", "mid", "sft"]])
def test_the_last_column_of_the_headline_is_the_model_itself(names: list[str]) -> None:
    lines = tables.headline(facts({name: 9.0 - number for number, name in enumerate(names)}))

    assert lines[0].endswith("| this model |")
    assert lines[-1].endswith(f"| {10 - len(names)}.000±0.010 |")
