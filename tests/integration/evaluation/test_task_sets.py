"""The packaged task sets from a Hub on this machine, with copies of their rows in the exact format: read, sealed, searched
for in training data and tasks, and answered by a model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.store import Artifact, write_manifest
from release.hub.local import server
from release.hub.local.store import Commit, HubStore, Repo
from stages.data.curate.decontamination import ContaminationIndex
from stages.data.recipe import load as load_data_recipe
from stages.evaluation import benchmark_scoring, harness
from stages.formats.table import read_table
from stages.rl.sandbox import missing
from stages.tasks import benchmarks
from stages.tasks.benchmarks import TASK_SETS, HarnessSection
from tests.fixtures import ROOT, miniature_hub, release_fixtures
from tests.fixtures.run_fixtures import at_length

LIMIT, CONTEXT = 2, 256
# One task of each, since every configuration of a dataset takes time.
SETS = {name: each.model_copy(update={"tasks": each.tasks[:1]}) for name, each in TASK_SETS.items()}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The benchmarks stage in a process of its own, which reads the Hub as on a cluster."""
    folder = tmp_path_factory.mktemp("sets")
    store = HubStore(folder / "hub")
    for name, task_set in SETS.items():
        repo = Repo("dataset", miniature_hub.BENCHMARKS[name][0], False, miniature_hub.DATE)
        files = miniature_hub.benchmark_files(name, 1).items()
        entries = {
            path: store.text_file(body) if path == "README.md" else store.lfs_file(store.put(body))
            for path, body in files
        }
        head = repo.add("main", Commit(None, "copies", "", "local", miniature_hub.DATE, entries))
        repo.commits[str(task_set.revision)] = repo.commits.pop(head)
        repo.branches["main"] = str(task_set.revision)
        store.save(repo)
    out = folder / "benchmarks"
    config = benchmarks.BenchmarksConfig(sets=tuple(SETS.values()), limit=LIMIT)
    code = (
        "import sys\nfrom pathlib import Path\nfrom stages.tasks import benchmarks\n"
        "from tests.fixtures.train_fixtures import Reporter\n"
        "config = benchmarks.BenchmarksConfig.model_validate_json(sys.argv[1])\n"
        "benchmarks.run(config, {}, Path(sys.argv[2]), Path(sys.argv[2]), Reporter())\n"
    )
    out.mkdir()
    with server.running(folder / "hub") as endpoint:
        run_with_hub(code, [config.model_dump_json(), str(out)], endpoint, folder / "hf")
    return write_manifest(out, "benchmarks")


def run_with_hub(code: str, arguments: list[str], endpoint: str, cache: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@at_length("miniatures", 20)
def test_each_set_is_answered_in_its_forms(
    sealed: Artifact, tmp_path: Path, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every set by a random model: all items, the examples that it states, and figures that a verifier gives."""
    if reason := missing():
        pytest.skip(reason)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    stated = sealed.json("tasks.json")
    assert {name: row["shots"] for name, row in stated.items()} == {
        "arc": 5, "hellaswag": 5, "gsm8k": 5, "mmlu": 5, "truthfulqa": 0, "math": 4, "humaneval": 0, "mbpp": 0,
    }  # fmt: skip
    before = sorted(path.name for path in sealed.path.rglob("*"))
    assert (sealed / "data/mmlu_abstract_algebra/dev.parquet").is_file(), "the examples of MMLU are sealed"
    monkeypatch.setattr(harness, "BATCH", 4)
    release_fixtures.save_model(tmp_path / "export/model", 1, context=CONTEXT)
    section = HarnessSection(sets=tuple(SETS), max_new_tokens=6, every_model=True)
    few = {name: row for name, row in section.forms(True).items() if name in ("humaneval", "math", "gsm8k", "mbpp")}
    config = {"sets": tuple(SETS.values()), "limit": LIMIT, "forms": section.forms(True), "max_new_tokens": 6}
    # Raw answers of MATH and HumanEval are as long as their tasks have it: too long for a test on each push.
    config["forms"] |= {name: ("chat",) for name in few}
    inputs = {"model": write_manifest(tmp_path / "export", "export-1"), "benchmarks": sealed}
    scored = run_stage(harness.STAGE, config, inputs)
    rows = read_table(scored / "items.parquet").to_pylist()
    metrics = {(row["set"], row["metric"], row["form"]) for row in rows}
    assert {("hellaswag", "acc_norm", "raw"), ("mmlu", "acc", "raw"), ("math", "solved", "chat"),
            ("humaneval", "solved", "chat"), ("mbpp", "solved", "chat"), ("gsm8k", "cut_off", "chat")} <= metrics  # fmt: skip
    assert {row["set"] for row in rows} == set(SETS)
    assert all(
        sum(r["set"] == name and r["metric"] == m for r in rows) == LIMIT for name, m, _ in metrics if name != "gsm8k"
    )
    assert sorted(path.name for path in sealed.path.rglob("*")) == before, (
        "Python compiles nothing into a sealed folder"
    )


def test_items_of_every_set_are_found_in_training_text(sealed: Artifact) -> None:
    """A document that quotes an item is removed for it, and one that does not stays."""
    texts = dict(benchmarks.texts_of(sealed))
    assert {id.split("/")[0] for id in texts} == set(SETS) and len(texts) == LIMIT * len(SETS)
    index = ContaminationIndex(texts.items(), 13)
    for id, text in texts.items():
        found = index.find(f"Somebody wrote this down: {text.upper()} And then went home.")
        assert found is not None and found[0].split("/")[0] == id.split("/")[0], id
    assert index.find("The parser reads one line after the other and gives back what it has found so far.") is None


def test_right_and_wrong_answers_to_tasks_of_this_project() -> None:
    """MATH by math-verify, code in the sandbox: blocks, completions, and what ends a process."""
    rows = {name: miniature_hub.BENCHMARKS[name][2]("test", "algebra", 1) for name in ("math", "humaneval", "mbpp")}
    boxed = benchmark_scoring.last_box(rows["math"]["solution"])
    assert benchmark_scoring.math_results(rows["math"], [f"So it is {boxed}."]) == {"solved": 1}
    assert benchmark_scoring.math_results(rows["math"], ["\\boxed{1}"]) == {"solved": 0}
    assert benchmark_scoring.last_box(r"\boxed{1} then \boxed{\frac{1}{2}}.") == r"\boxed{\frac{1}{2}}"
    assert benchmark_scoring.last_box("nothing") == ""
    if reason := missing():
        pytest.skip(reason)
    solution, prompt = rows["humaneval"]["canonical_solution"], rows["humaneval"]["prompt"]
    right = [
        solution,
        solution.strip(),
        f"Here:\n```python\n{prompt}{solution}```",
        f"{solution}\ndef more():\n    pass\n",
    ]
    for answer in right:
        assert benchmark_scoring.humaneval_results(rows["humaneval"], [answer]) == {"solved": 1}, answer
    for answer in ("", "    return xs\n", "    import os\n    os._exit(0)\n"):
        assert benchmark_scoring.humaneval_results(rows["humaneval"], [answer]) == {"solved": 0}, answer
    code = rows["mbpp"]["code"]
    assert benchmark_scoring.mbpp_results(rows["mbpp"], [f"```\n{code}```"]) == {"solved": 1}
    assert benchmark_scoring.mbpp_results(rows["mbpp"], [code.replace("+", "-")]) == {"solved": 0}


def test_a_machine_without_the_sandbox_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*names: str, forms: tuple[str, ...] = ("chat",)) -> str | None:
        config = {"sets": [SETS[name] for name in names], "forms": dict.fromkeys(names, forms)}
        return harness.lack(harness.HarnessConfig.model_validate(config))

    monkeypatch.setenv("PATH", "")
    assert "run what the model writes" in str(lack("arc", "mbpp"))
    assert lack("arc", "math") is lack("mbpp", forms=()) is None, "a model that is not asked needs no sandbox"


def test_no_recipe_trains_on_a_test_split_or_on_ifeval() -> None:
    """Neither sources nor tasks: of a repository with items, at most other files than its test split."""
    text = "".join(
        path.read_text() for path in (*ROOT.glob("data_recipes/*.yaml"), *ROOT.glob("pipeline/recipes/*.yaml"))
    )
    assert "ifeval" not in text.lower().replace("# ifeval", "")
    repos = {repo for repo, _, _ in miniature_hub.BENCHMARKS.values()}
    used = [line for line in text.splitlines() if any(f"repo: {repo}," in line for repo in repos)]
    assert used and all("revision" in line for line in used)
    patterns = [line for line in text.splitlines() if "pattern: full/" in line or "pattern: main/" in line]
    assert patterns and all("train-" in line for line in patterns)
    assert load_data_recipe("open").name == "open"
