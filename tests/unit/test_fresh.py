"""Items that did not exist before the weights: drawn from their digest, and none that was trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.core.errors import RecipeError
from pipeline.core.store import Artifact, write_manifest
from stages.evaluation import generated_eval
from stages.formats.table import read_jsonl, write_jsonl
from stages.tasks.eval_set import chat_rows
from stages.tasks.synthetic import problems
from tests.fixtures import chat_fixtures

CONFIG = {"problems": {"add": 40, "sort": 10}, "phases": {"pretrain": ["prose"], "sft": ["prose", "chats"]}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Artifacts whose corpus, a task and an evaluation item ask what the model `model` will draw."""
    folder = tmp_path_factory.mktemp("inputs")
    drawn = generated_eval.draw(
        generated_eval.digest_of(chat_fixtures.model(folder / "a", 1) / "model"), CONFIG["problems"]
    )
    questions = [row["question"] for row in drawn]
    texts = {
        "prose": [
            chat_fixtures.TEXT,
            f"It is known that {questions[0]} = 17, or so.",
            f"9{questions[1]} is another sum.",
        ],
        "chats": [f"<|im_start|>user\n{questions[40].upper()}<|im_end|>\n", f"{questions[0]}", chat_fixtures.TEXT],
    }
    artifacts = chat_fixtures.make(folder / "inputs", texts)
    for role, name, question in (("tasks-rlvr", "tasks.jsonl", questions[2]), ("items", "chat.jsonl", questions[3])):
        rows = read_jsonl(artifacts[role] / name)
        rows[0]["responses_create_params"]["input"][0]["content"] = question
        write_jsonl(artifacts[role] / name, rows)
        artifacts[role] = write_manifest(artifacts[role].path, role)
    return artifacts


def test_anyone_with_the_weights_draws_the_same(run_stage, inputs, tmp_path: Path) -> None:
    first, second = run_stage(generated_eval.STAGE, CONFIG, inputs), run_stage(generated_eval.STAGE, CONFIG, inputs)
    assert first.digest == second.digest
    shutil.copytree(inputs["model"] / "model", tmp_path / "published")
    digest = generated_eval.digest_of(tmp_path / "published")
    about = first.json("meta.json")
    assert about["digest"] == digest == f"sha256:{about['seed']}"
    removed = {row["id"] for row in about["removed"]}
    redrawn = [row for row in generated_eval.draw(digest, about["problems"]) if row["id"] not in removed]
    assert redrawn == chat_rows(first)
    other = run_stage(generated_eval.STAGE, CONFIG, {**inputs, "model": inputs["before"]})
    ours, theirs = ({row["question"] for row in chat_rows(artifact)} for artifact in (first, other))
    assert len(ours & theirs) < 5


def test_what_stood_anywhere_is_taken_out_and_counted(run_stage, inputs) -> None:
    about = run_stage(generated_eval.STAGE, CONFIG, inputs).json("meta.json")
    places = {row["id"]: row["where"] for row in about["removed"]}
    assert places == {
        "fresh/add/00000": ["pretrain", "sft"],
        "fresh/add/00002": ["tasks-rlvr"],
        "fresh/add/00003": [generated_eval.EVALUATION],
        "fresh/sort/00000": ["sft"],
    }  # and not add/00001, whose digits stand in the corpus as a part of other ones
    assert (about["drawn"], about["kept"]) == (50, 46)


def test_rows_are_as_the_items_artifact_has_them(run_stage, inputs) -> None:
    fields = {frozenset(row) for row in chat_rows(inputs["items"]) if row["verifier"] == "exact"}
    assert {frozenset(row) for row in chat_rows(run_stage(generated_eval.STAGE, CONFIG, inputs))} == fields


def test_a_task_with_too_few_problems_is_one_sentence(monkeypatch) -> None:
    few = lambda rng: problems.Problem("sort", f"sort {rng.randrange(3)}", "", "")  # noqa: E731
    monkeypatch.setitem(problems.TASKS, "sort", few)
    with pytest.raises(RecipeError, match="task sort gave only 3 different problems of 4; ask for fewer"):
        generated_eval.draw("sha256:00", {"sort": 4})
