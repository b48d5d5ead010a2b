"""What stands in the training data is found, what does not is not; scores beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from pipeline.core.parts import part_file, part_slice
from pipeline.core.store import Artifact, write_manifest
from stages.data.curate.decontamination import ItemRuns
from stages.evaluation import contamination, generated_eval, pass_at_k
from stages.formats.table import KEPT, ORDER, read_jsonl, write_jsonl, write_rows
from stages.tasks import benchmarks, question
from stages.tasks.eval_set import chat_rows
from tests.fixtures import chat_fixtures

CONFIG: dict[str, Any] = {}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """add/00000 stands in a document that was read, add/00001 in one that was not, add/00002 in a prompt."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = chat_rows(chat_fixtures.sealed(chat_fixtures.items_stage.STAGE, chat_fixtures.ITEMS, {}, folder / "look"))
    questions = {row["id"]: question(row) for row in rows}
    spaced = questions["add/00000"].replace("+", " +\n")
    prose = [f"{n}. {chat_fixtures.TEXT}" for n in range(12)] + [
        f"So {spaced} it was.",
        f"Never read: {questions['add/00001']}",
    ]
    artifacts = chat_fixtures.make(folder / "inputs", {"prose": prose})
    tasks = read_jsonl(artifacts["tasks-rlvr"] / "tasks.jsonl")
    tasks[0]["responses_create_params"]["input"][0]["content"] = f"What is {questions['add/00002']}?"
    write_jsonl(artifacts["tasks-rlvr"] / "tasks.jsonl", tasks)
    artifacts["tasks-rlvr"] = write_manifest(artifacts["tasks-rlvr"].path, "tasks-rlvr")
    config = {"problems": {"add": 5}, "phases": {"pretrain": ["prose"]}}
    artifacts["fresh"] = chat_fixtures.sealed(generated_eval.STAGE, config, artifacts, folder / "fresh")
    solving = {"num_samples": 2, "max_new_tokens": 3, "seed": 0}
    artifacts["solve-sft"] = chat_fixtures.sealed(pass_at_k.STAGE, solving, artifacts, folder / "solve")
    artifacts["fresh-solve-sft"] = chat_fixtures.sealed(
        pass_at_k.STAGE, solving, {**artifacts, "items": artifacts["fresh"]}, folder / "fsolve"
    )
    return artifacts


def test_planted_items_are_found_and_no_others(run_stage, inputs) -> None:
    first, second = run_stage(contamination.STAGE, CONFIG, inputs), run_stage(contamination.STAGE, CONFIG, inputs)
    assert first.digest == second.digest
    rows, report = chat_fixtures.table(first, "items.parquet"), first.json("report.json")
    bad = {(row["id"], row["phase"]) for row in rows if row["verdict"] == "contaminated"}
    assert bad == {("add/00000", "pretrain"), ("add/00002", "prompts of rlvr")}
    assert {row["phase"] for row in rows} == {"pretrain", "prompts of rlvr"}
    assert {row["split"] for row in rows} == {"test", "validation", "fresh"}
    (match,) = (row for row in rows if (row["id"], row["phase"]) == ("add/00000", "pretrain"))
    assert (match["words"], match["longest"], match["overlap"]) == (3, 3, 1.0)
    assert report["items"]["test"]["contaminated"] == 2 and report["items"]["fresh"]["contaminated"] == 0
    assert report["phases"]["pretrain"]["test"]["contaminated"] == 1 and report["read"]["pretrain"] == 13
    assert {name: report[name] for name in ("items", "phases")} == contamination.summary(rows)


def test_items_of_task_sets_are_searched_for(run_stage, inputs, tmp_path: Path) -> None:
    texts = {"read": f"3. {chat_fixtures.TEXT}", "absent": "no document and no prompt has these eight words in it"}
    (tmp_path / "benchmarks").mkdir()
    write_rows(
        tmp_path / "benchmarks/items.parquet",
        benchmarks.ITEMS,
        [{"id": f"own/t/{name}", "set": "own", "task": "t", "number": n, "text": text}
         for n, (name, text) in enumerate(texts.items())],
    )  # fmt: skip
    sealed = write_manifest(tmp_path / "benchmarks", "benchmarks")
    report = run_stage(contamination.STAGE, CONFIG, {**inputs, "benchmarks": sealed}).json("report.json")
    assert report["phases"]["pretrain"]["task sets"] == {"clean": 1, "overlap": 0, "contaminated": 1}


FORMS = {
    "verbatim": "\n{}\n",
    "spacing": "\n{}\n",
    "case": "\n{}\n",
    "embedded": " (somebody asked: {}, and so on) ",
}


@pytest.mark.parametrize("form", FORMS)
def test_an_item_is_found_in_every_form(form: str) -> None:
    items = {"a": "How many apples are in 3 boxes of 12?", "b": "Sort 52410 by size, please, and count."}
    text = items["a"].swapcase() if form == "case" else items["a"]
    if form == "spacing":
        text = "  ".join(text.split())
    runs = ItemRuns(items)
    closed = runs.with_prefixes(runs.search(f"{chat_fixtures.TEXT}{FORMS[form].format(text)}{chat_fixtures.TEXT}"))
    assert runs.overlap("a", closed, 8)[0] == 1.0 and runs.overlap("b", closed, 8)[0] == 0.0


def test_scores_stand_beside_each_other(run_stage, inputs) -> None:
    scores = run_stage(contamination.STAGE, CONFIG, inputs).json("report.json")["scores"]
    assert set(scores) == {"solve-sft", "fresh-solve-sft"}
    add = scores["solve-sft"]["add"]
    assert (add["full"]["n"], add["clean"]["n"]) == (6, 4)
    assert scores["fresh-solve-sft"]["add"]["clean"]["n"] == 5


def test_subsets_by_hand() -> None:
    scores = {"a": ("add", 1.0), "b": ("add", 0.0), "c": ("add", 1.0), "d": ("add", 0.0)}
    subsets = contamination.scores_by_verdict(
        scores, {"a": "contaminated", "b": "overlap", "c": "clean", "d": "clean"}
    )["add"]
    assert [subsets[name]["value"] for name in ("full", "clean")] == [0.5, 0.5]
    assert contamination.scores_by_verdict(scores, dict.fromkeys("abcd", "overlap"))["add"]["clean"] is None


def test_runs_against_a_slow_way() -> None:
    """Longest common runs of words, by comparing everything with everything."""
    item = "sort the words of the line and sort the line"
    text = "Sort the words; the line and sort it: of the line and then."
    runs = ItemRuns({"a": item, "b": "nothing here", "c": ""})
    closed = runs.with_prefixes(runs.search(text))
    words, corpus = item.split(), " sort the words the line and sort it of the line and then "
    slow = [
        max((n for n in range(len(words) - s + 1) if f" {' '.join(words[s : s + n])} " in corpus or n == 0), default=0)
        for s in range(len(words))
    ]
    assert runs.lengths("a", closed) == slow
    assert runs.overlap("a", closed, 3) == (sum(n >= 3 for n in slow[:8]) / 8, max(slow))
    assert runs.overlap("b", closed, 3) == (0.0, 0) and runs.overlap("c", closed, 3) == (0.0, 0)


def test_artifacts_of_two_runs_are_refused_in_a_sentence(run_stage, inputs, tmp_path: Path) -> None:
    other = chat_fixtures.corpus(tmp_path, {"prose": ["only", "two"]})
    with pytest.raises(AtomError, match="documents of pretrain are not among the kept ones of dedup"):
        run_stage(contamination.STAGE, CONFIG, {**inputs, "dedup": other["dedup"]})


@pytest.fixture
def parted(inputs, tmp_path: Path) -> dict[str, Artifact]:
    """The same corpus in three parts of kept documents and two files of the order."""
    rows = chat_fixtures.table(inputs["dedup"], "kept/prose/part-00000.parquet")
    for part in range(3):
        rows_of_part = rows[part_slice(len(rows), part, 3)]
        write_rows(tmp_path / "dedup/kept/prose" / part_file(part), KEPT, rows_of_part)
    order = chat_fixtures.table(inputs["order-pretrain"], "part-00000.parquet")
    for part in range(2):
        write_rows(tmp_path / "order" / part_file(part), ORDER, order[part_slice(len(order), part, 2)])
    artifacts = {"dedup": tmp_path / "dedup", "order-pretrain": tmp_path / "order"}
    return {**inputs, **{role: write_manifest(folder, role) for role, folder in artifacts.items()}}


def test_parts_in_any_order_give_the_same_bytes(run_stage, inputs, parted, tmp_path: Path) -> None:
    for stage, config in (
        (contamination.STAGE, CONFIG),
        (generated_eval.STAGE, {"problems": {"add": 5}, "phases": {"pretrain": ["prose"]}}),
    ):
        expected = run_stage(stage, config, inputs)
        work, settings = tmp_path / stage.name, {**config, "parts": {"prose": 3}}
        model = stage.config.model_validate(settings)
        assert stage.shards(model) == 3
        work.mkdir()
        for part in (1, 2, 0):
            stage.run_shard(model, parted, work, part)
        damaged = next((work / "prose-00001").glob("*.npy"))
        damaged.write_bytes(damaged.read_bytes()[:-1])
        assert run_stage(stage, settings, parted, work).digest == expected.digest
        assert run_stage(stage, config, parted).digest == expected.digest
