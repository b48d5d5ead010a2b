"""A recipe that distills its final model: the nodes of the student, what they read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import RecipeError
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from stages.miniature import miniature
from stages.rl import estimates
from stages.train.config import SftPhase
from tests.fixtures import ROOT, recipe_fixtures
from tests.fixtures.distilled_fixtures import DISTILLATION, OPTIMIZER, SIZES
from tests.fixtures.recipe_fixtures import SMOKE

WITHOUT_RLVR = {"rlvr": None, "evaluation__waived_gates": {}}


def composed(folder: Path, **changes: Any) -> dag.Graph:
    settings = {"sizes": SIZES, "distillation": DISTILLATION, **changes}
    settings = {name: value for name, value in settings.items() if value != "absent"}
    path = recipe_fixtures.write(folder / "r.yaml", **settings)
    return dag.compose(recipes.load(path), Store(folder), without_data=True)


def test_the_student_is_a_smaller_model_and_the_teacher_the_final_one(tmp_path: Path) -> None:
    graph, without = composed(tmp_path), composed(tmp_path, sizes="absent", distillation="absent")
    nodes: Any = graph.nodes
    assert graph.nodes.keys() - without.nodes.keys() == {
        "size-1", "student", "tasks-distillation", "distillation", "distillation-export", "variant-distilled"
    }  # fmt: skip
    changed = {name for name, node in without.nodes.items() if graph.nodes[name].key != node.key}
    assert changed == {"fresh", "fresh-solve-sft", "fresh-solve-rlvr", "contamination"}, "they search the tasks"
    assert nodes["student"].inputs == {"tokens": "tokenize", "order": "order-sft", "init": "size-1"}
    inputs = nodes["distillation"].inputs
    assert (inputs["init"], inputs["teacher"]) == ("student", "rlvr")
    config = nodes["distillation"].config
    assert config.teacher == nodes["rlvr"].config.model and config.model == nodes["student"].config.model
    assert nodes["variant-distilled"].inputs["student"] == "distillation-export"
    # The plan counts what the teacher costs beside its student.
    teacher, student = (model.parameters(512)["active"] for model in (config.teacher, config.model))
    assert estimates.readings(config) == teacher / student
    assert estimates.teacher_bytes(config) == 4 * config.teacher.parameters(512)["total"]


def test_the_student_is_tuned_as_sft_is_but_for_its_optimizer(tmp_path: Path) -> None:
    own = {**DISTILLATION, "sft_optimizer": {**OPTIMIZER, "lr": 5e-3}}
    nodes: Any = composed(tmp_path, distillation=own).nodes
    student, sft = nodes["student"].config.phase, nodes["sft"].config.phase
    assert isinstance(sft, SftPhase)
    differ = {name for name, value in student if value != getattr(sft, name)}
    assert differ == {"optimizer"} and student.optimizer.lr == 5e-3


PROMPTS = {
    "source": "hub-prompts", "repo": "a/b", "revision": "0" * 40, "pattern": "x", "format": "jsonl", "prompt_field": "p",
    "kind": "chat", "count": 5, "license": "MIT", "license_evidence": "the card",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": "absent"}, "distillation.size = 1 names a smaller model, and sizes has 0; add it there"),
        ({"distillation": {**DISTILLATION, "size": 2}}, "distillation.size = 2 names a smaller model, and sizes has 1"),
        ({"sft": None, **WITHOUT_RLVR}, "distillation begins with a student that was fine-tuned on the rows of sft"),
        (
            {"sft__lora": {"rank": 2, "alpha": 2, "targets": ["attention"]}, **WITHOUT_RLVR},
            "sft.lora trains an adapter, and a teacher is a whole model",
        ),
        (
            {"sizes": [{"model": {**SIZES[0]["model"], "context_length": 64}}]},
            "sft.sequence_length = 128 is longer than the context of 64 tokens that sizes.0, the student of "
            "distillation, is pre-trained with; shorten the sequence, or leave out distillation",
        ),
        ({"distillation": {**DISTILLATION, "algorithm": "gspo"}}, "algorithm = gspo has one ratio for an answer"),
        ({"distillation": {**DISTILLATION, "sampling": {"max_new_tokens": 256}}}, "leaves no room for a question"),
        (
            {"distillation": {**DISTILLATION, "verifiers": {"reward-model": {"servers": 1}}}},
            "distillation.verifiers.reward-model.servers would score nothing",
        ),
        (
            {"distillation": {**DISTILLATION, "tasks": [PROMPTS]}},
            "distillation.tasks name the verifier reward-model, which only online_rlhf has",
        ),
        ({"release__variants": ["distilled"]}, "distilled is of a recipe with the section distillation, and needs no"),
    ],
)
def test_a_recipe_that_cannot_be_distilled_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        composed(tmp_path, **changes)
    assert words in str(refused.value)


def test_a_miniature_distills_too(tmp_path: Path) -> None:
    recipe, data = (yaml.safe_load(path.read_text()) for path in (SMOKE, ROOT / "data_recipes/smoke.yaml"))
    longer = {**DISTILLATION, "steps": 500, "release_checkpoint_interval": 500}
    small, _, _ = miniature({**recipe, "sizes": SIZES, "distillation": longer}, data)
    assert small["distillation"]["steps"] < 500
