"""lm-evaluation-harness on a release's model: an offline task from a YAML file, against plain transformers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import identity
from pipeline.core.store import Artifact, FileRow, Store, sha256_file, write_manifest
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from release.audit import harness
from release.cards import tables
from release.checks.scores import score_problems
from release.facts.score_facts import read_harness
from release.layout import folders_of
from release.published_files import placement
from stages.evaluation import benchmark_changes
from stages.evaluation import harness as harness_stage
from stages.evaluation.harness import language_model
from stages.evaluation.model_evaluation import load_tokenizer
from stages.formats.table import read_table, write_json, write_rows
from stages.formats.tokenizer import without_special
from stages.rl.rollout import tasks
from stages.tasks import benchmarks, eval_set, to_row
from stages.tasks.benchmarks import TASK_SETS, HarnessSection
from tests.fixtures import ROOT, release_fixtures
from tests.fixtures.harness_fixtures import CHOICES, OWN_TASKS, TASK, section_of, write_tasks
from tests.fixtures.run_fixtures import evaluate_in_shards


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    release_fixtures.save_model(folder / "model", seed=3)
    return folder


def log_probability(folder: Path, context: str, text: str) -> float:
    """log p(text | context) by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before, after = tokenizer(context).input_ids, tokenizer(text).input_ids
    with torch.inference_mode():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return float(torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(after)[:, None]).sum())


def test_a_task_from_a_yaml_file_runs_offline_and_scores_as_transformers_does(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [
        {"question": "the quick brown:", "choices": ["fox", "dog", "sum"], "label": 0},
        {"question": "2+2=", "choices": ["4", "5"], "label": 1},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/next_words.yaml").write_text(TASK.format(data=data))

    results = harness_stage.evaluate(
        language_model(release / "model"), ["next_words"], benchmarks.task_manager(tmp_path / "tasks")
    )

    right = 0
    for row, sample in zip(rows, sorted(results["samples"]["next_words"], key=lambda s: s["doc_id"]), strict=True):
        expected = [log_probability(release / "model", row["question"], choice) for choice in row["choices"]]
        assert [pair[0][0] for pair in sample["resps"]] == pytest.approx(expected, abs=1e-4)
        right += expected.index(max(expected)) == row["label"]
    assert results["results"]["next_words"]["acc,none"] == right / 2


def test_a_special_token_in_an_item_is_text(release: Path) -> None:
    """As in training, for one text and for several at once."""
    text, special = "a <|endoftext|> b<|im_start|> <think>", set(range(len(release_fixtures.SPECIAL)))
    for tokenizer in (language_model(release / "model").tokenizer, without_special(load_tokenizer(release / "model"))):
        for ids in (tokenizer.encode(text), *tokenizer([text, text])["input_ids"]):
            assert not special & set(ids) and tokenizer.decode(ids) == text
    assert not special & set(language_model(release / "model").tok_encode(text))


def test_what_is_missing_is_reported_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    messages = [line for line in lines if line.startswith("release.audit.harness: ")]
    assert "Traceback" not in "".join(lines) and len(messages) == 1
    assert "evidence/recipe.json" in messages[0]
    with pytest.raises(SystemExit):
        harness.main([str(tmp_path), "--limit", "0"])
    assert "--limit takes a number from 1 on" in capsys.readouterr().err


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "own")


def test_a_plan_counts_the_items_of_known_sets(tmp_path: Path) -> None:
    """Of MMLU 14,042; of a folder 2,000 a task, or the limit."""
    mmlu = HarnessSection(sets=("mmlu",))
    assert mmlu.tokens() == 14_042 * 500 * 6, "with five examples"
    assert HarnessSection(sets=("mmlu",), limit=10).tokens() == 57 * 10 * 500 * 6
    assert HarnessSection(sets=("truthfulqa",), limit=10_000).tokens() == 1634 * 500
    both = HarnessSection(sets=("gsm8k",), max_new_tokens=1000)
    assert both.tokens(True) == 1319 * (2 * 500 * 6 + 1000) and both.tokens() == 1319 * 500 * 6
    assert "items" not in identity(TASK_SETS["mmlu"])


def test_the_stage_seals_the_results_of_every_item(
    release: Path, own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_stage: Any
) -> None:
    """The sealed tasks are enough: neither the folder nor the network is read again, and any number
    of shards gives the same bytes."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    section = section_of(own_tasks, limit=2)
    config = {"sets": section.task_sets(tmp_path, "recipe"), "limit": section.limit}
    sealed = run_stage(benchmarks.STAGE, config, {})
    assert dict(benchmarks.texts_of(sealed)) == {
        "own/next_words/000000": "the quick brown:", "own/next_words/000001": "2+2=",
        "own/own_sums/000000": "0+0=", "own/own_sums/000001": "1+1=",
    }  # fmt: skip
    assert sealed.json("tasks.json")["own"]["license"] == "CC0-1.0"
    shutil.rmtree(own_tasks)
    inputs = {"model": write_model(release / "model", tmp_path), "benchmarks": sealed}
    scored = run_stage(harness_stage.STAGE, config, inputs)
    rows = read_table(scored / "items.parquet").to_pylist()
    for row, item in zip([row for row in rows if row["metric"] == "acc"], CHOICES, strict=False):
        expected = [log_probability(release / "model", str(item["question"]), choice) for choice in item["choices"]]
        assert [pair[0] for pair in json.loads(row["response"])] == pytest.approx(expected, abs=1e-4)
        assert row["value"] == (expected.index(max(expected)) == item["label"])
    assert [(row["task"], row["number"]) for row in rows] == [(task, n) for task in OWN_TASKS for n in (0, 1)]
    scores = scored.json("scores.json")
    assert scores == harness_stage.summary(rows) and scores["own"]["own_sums"]["exact_match,none"]["n"] == 2
    in_shards = evaluate_in_shards(harness_stage.STAGE, config, inputs, work := tmp_path / "shards", 2)
    assert len(list(work.iterdir())) == 2
    assert run_stage(harness_stage.STAGE, in_shards, inputs, work).digest == scored.digest


def test_no_task_shares_words_with_an_item_of_a_task_set(own_tasks: Path, tmp_path: Path, run_stage: Any) -> None:
    sets = section_of(own_tasks, limit=2).task_sets(tmp_path, "recipe")
    inputs = {
        "items": run_stage(eval_set.STAGE, {"problems": {"add": 3}, "seed": 3}, {}),
        "benchmarks": run_stage(benchmarks.STAGE, {"sets": sets, "limit": 2}, {}),
    }
    questions = ("After The quick,  BROWN what?", "The quick red fox?", "Which is brown: the quick?")
    rows = [  # with answers that differ, or one of them would earn the reward of all
        to_row(str(n), text, verifier="exact", kind="word", level=1, expected_answer=answer)
        for n, (text, answer) in enumerate(zip(questions, ("fox", "dog", "hen"), strict=True))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": "rows", "path": str(tmp_path / "rows.jsonl"), "verifier": "exact", "kind": "word"}
    source |= {"digest": f"sha256:{sha256_file(tmp_path / 'rows.jsonl')}", "license": "CC0-1.0", "origin": "this test"}
    everything = run_stage(tasks.STAGE, {"sources": [source], "seed": 0}, inputs)
    assert [row["id"] for row in tasks.read(everything)] == ["word/000001", "word/000002", "word/000003"]
    sealed = run_stage(tasks.STAGE, {"sources": [source], "seed": 0, "ngram": 13}, inputs)
    assert [row["id"] for row in tasks.read(sealed)] == ["word/000002", "word/000003"]


def test_each_task_set_names_tasks_of_the_harness_that_read_one_dataset() -> None:
    """By the YAML files alone: the harness's own index takes seconds. A revision is of one dataset."""
    from lm_eval import tasks as harness_tasks

    paths: dict[str, str] = {}
    folders = [Path(harness_tasks.__file__).parent / name for name in ("arc", "gsm8k", "hellaswag", "mmlu/default")]
    for folder in (*folders, Path(harness_tasks.__file__).parent / "truthfulqa", benchmarks.OWN_TASKS):
        for path in sorted(folder.glob("*.yaml")):
            loader = yaml.SafeLoader(path.read_text())
            loader.yaml_constructors = {**loader.yaml_constructors, "!function": lambda *_: None}
            body = loader.get_single_data()
            while isinstance(body.get("task"), str) and (base := body.pop("include", None)):
                body = {**yaml.safe_load((path.parent / base).read_text()), **body}
            if isinstance(body.get("task"), str):
                paths[body["task"]] = body["dataset_path"]
    datasets = {"arc": "allenai/ai2_arc", "gsm8k": "openai/gsm8k", "mmlu": "cais/mmlu"}
    datasets |= {"truthfulqa": "truthfulqa/truthful_qa", "hellaswag": "Rowan/hellaswag"}
    datasets |= {"math": "EleutherAI/hendrycks_math", "humaneval": "openai/openai_humaneval"}
    datasets |= {"mbpp": "google-research-datasets/mbpp"}
    assert TASK_SETS.keys() == datasets.keys()
    for name, task_set in TASK_SETS.items():
        assert {paths[task] for task in task_set.tasks} == {datasets[name]}
        assert re.fullmatch("[0-9a-f]{40}", str(task_set.revision))
    assert sum(task.startswith("mmlu_") for task in paths) == len(TASK_SETS["mmlu"].tasks) == 57


def write_model(folder: Path, tmp_path: Path) -> Artifact:
    shutil.copytree(folder, tmp_path / "export/model")
    return write_manifest(tmp_path / "export", "export-test")


def test_a_recipe_with_task_sets_decontaminates_for_them(own_tasks: Path, tmp_path: Path) -> None:
    text = (ROOT / "pipeline/recipes/atom-smoke.yaml").read_text()
    without = dag.compose(recipes.load("atom-smoke"), Store(tmp_path / "home"))
    body = yaml.safe_load(text)
    body["evaluation"]["harness"] = section_of(own_tasks, sets=["arc"]).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(body))
    graph = dag.compose(recipes.load(str(tmp_path / "recipe.yaml")), Store(tmp_path / "home"))
    assert graph.nodes.keys() - without.nodes.keys() == {"benchmarks", "harness-rlvr"}
    body["evaluation"]["harness"]["every_model"] = True
    (tmp_path / "every.yaml").write_text(yaml.safe_dump(body))
    every = dag.compose(recipes.load(str(tmp_path / "every.yaml")), Store(tmp_path / "home")).nodes
    measured = [name for name in every if name.startswith("harness-")]
    assert measured == ["harness-base", "harness-mid", "harness-sft", "harness-rlvr"]
    assert list(every["benchmark-changes"].inputs) == measured
    assert every["harness-rlvr"].key == graph.nodes["harness-rlvr"].key
    body["evaluation"]["harness"]["every_model"] = False
    assert graph.nodes["filter"].inputs["benchmarks"] == "benchmarks"
    assert graph.nodes["contamination"].inputs["benchmarks"] == "benchmarks"
    assert graph.nodes["tasks-rlvr"].inputs["benchmarks"] == "benchmarks"
    assert graph.nodes["tasks-rlvr"].config.ngram == 13 and without.nodes["tasks-rlvr"].config.ngram is None
    assert graph.nodes["items"].key == without.nodes["items"].key
    key = graph.nodes["benchmarks"].key
    shutil.move(own_tasks, tmp_path / "moved")
    body["evaluation"]["harness"]["folders"][0]["path"] = "moved"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(body))
    moved = dag.compose(recipes.load(str(tmp_path / "recipe.yaml")), Store(tmp_path / "home"))
    assert moved.nodes["benchmarks"].key == key, "the place of a folder is not part of the key"
    (tmp_path / "moved/rows.jsonl").write_text("{}\n")
    changed = dag.compose(recipes.load(str(tmp_path / "recipe.yaml")), Store(tmp_path / "home"))
    assert changed.nodes["benchmarks"].key != key


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"sets": ["arcs"]}, "unknown task set; known are arc"),
        ({}, "names no task set"),
        ({"sets": ["arc", "arc"]}, "has the task set arc twice"),
    ],
)
def test_a_faulty_section_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        HarnessSection.model_validate(settings)


def test_what_the_stage_lacks_is_reported_in_a_sentence(own_tasks: Path, tmp_path: Path, run_stage: Any) -> None:
    section = section_of(own_tasks)
    with pytest.raises(RecipeError, match="task set own needs a folder of at most 10,000 files with a YAML file"):
        section.task_sets(tmp_path / "elsewhere", "recipe r")
    pinned = section_of(own_tasks)
    pinned = pinned.model_copy(
        update={"folders": (pinned.folders[0].model_copy(update={"digest": f"sha256:{'0' * 64}"}),)}
    )
    with pytest.raises(RecipeError, match="recipe r: task set own is pinned to sha256:0000"):
        pinned.task_sets(tmp_path, "recipe r")
    (unknown,) = section.task_sets(tmp_path, "recipe r")
    with pytest.raises(AtomError, match="task set own: the harness has no task no_such"):
        run_stage(benchmarks.STAGE, {"sets": [unknown.model_copy(update={"tasks": ("no_such",)})]}, {})


def test_a_release_holds_the_results_and_verifies_them(tmp_path: Path) -> None:
    def placed(node: str, *names: str) -> list[tuple[str, str]]:
        rows = tuple(FileRow(name, 1, "0" * 64) for name in names)
        return list(placement(node, Artifact("key", "digest", tmp_path, rows), folders_of(["base", "mid"])))

    assert not placed("benchmarks", "items.parquet"), "the items belong to their sources"
    for name in ("scores.json", "tasks.json"):
        assert placed("harness-mid", name) == [
            (name, f"dataset/evaluation/harness/mid/{name}"),
            (name, f"model/evaluation/harness/{name}"),
        ]
    assert [place for _, place in placed("benchmark-changes", "changes.json")] == [
        f"{folder}/evaluation/harness/changes.json" for folder in ("dataset", "model-base", "model")
    ]
    folder = tmp_path / "evaluation/harness/mid"
    folder.mkdir(parents=True)
    rows: list[Any] = [
        {"set": "own", "task": "sums", "number": n, "filter": "none", "metric": "acc", "value": n % 2, "target": "1",
         "response": "1"}
        for n in range(4)
    ]  # fmt: skip
    write_rows(folder / "items.parquet", harness_stage.RESULTS, rows)
    write_json(folder / "scores.json", harness_stage.summary(rows))
    assert score_problems(tmp_path / "evaluation") == []
    stated = {"license": "CC0-1.0", "license_evidence": "this test", "revision": None, "pooled": False, "lower": []}
    write_json(folder / "tasks.json", {"own": stated})
    lines = tables.task_sets(read_harness(folder))
    assert "| own | sums | acc | as plain text | the task's | 4 | 0.500±0.289 |" in lines
    assert lines[-1] == "Licenses of the data: own: CC0-1.0 (this test)."
    assert tables.task_sets(read_harness(tmp_path)) == []
    # The changes follow from the tables of both models.
    later = [{**row, "value": 1} for row in rows]
    write_rows(folder.parent / "sft/items.parquet", harness_stage.RESULTS, later)
    write_json(folder.parent / "sft/scores.json", harness_stage.summary(later))
    write_json(folder.parent / "sft/tasks.json", {"own": stated})
    changed = benchmark_changes.changes({"mid": rows, "sft": later}, {name: {"own": stated} for name in ("mid", "sft")})
    write_json(folder.parent / "changes.json", changed)
    assert score_problems(tmp_path / "evaluation") == []
    changed["changes"][0]["verdict"] = "better"
    write_json(folder.parent / "changes.json", changed)
    problem = "evaluation/harness/changes.json is not what the tables of the models give"
    assert score_problems(tmp_path / "evaluation") == [problem]
    (folder.parent / "changes.json").unlink()
    rows[0]["value"] = 1.0
    write_json(folder / "scores.json", harness_stage.summary(rows))
    assert score_problems(tmp_path / "evaluation") == ["evaluation/harness/mid/scores.json is not what its tables give"]
