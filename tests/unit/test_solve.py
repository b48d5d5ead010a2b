"""Answers in conversation: estimators against enumeration, the stage on a tiny random model."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import identity
from pipeline.core.store import Artifact, Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from release.cards.chat_tables import sharpening
from stages.confidence import clustered, pass_at, powers_of_two, wilson
from stages.evaluation import pass_at_k
from stages.evaluation.settings import ChatSection, EvaluationSection
from tests.fixtures import ROOT, chat_fixtures
from tests.fixtures.run_fixtures import evaluate_in_shards

CONFIG = {"num_samples": 3, "max_new_tokens": 6, "seed": 0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return chat_fixtures.make(tmp_path_factory.mktemp("inputs"))


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    assert pass_at(4, 1, 2) == 0.5 and pass_at(4, 0, 4) == 0 and pass_at(4, 4, 1) == 1
    for n, right, k in ((8, 3, 2), (8, 3, 6), (5, 1, 4)):
        subsets = list(combinations([1] * right + [0] * (n - right), k))
        assert pass_at(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_small_estimators() -> None:
    assert powers_of_two(8) == [1, 2, 4, 8] and powers_of_two(6) == [1, 2, 4, 6] and powers_of_two(1) == [1]
    assert clustered([0.0, 1.0]) == {"value": 0.5, "se": 0.5, "n": 2}
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def answer(id: str, sample: int, text: str, reward: float, finished: bool = True, kind: str = "add") -> dict:
    return {"id": id, "kind": kind, "sample": sample, "text": text, "answer": text.split(">")[-1],
            "finished": finished, "tokens": 10, "reward": reward}  # fmt: skip


def test_scores_by_hand() -> None:
    rows = [
        answer("a", -1, "<think>x</think>1", 1), answer("a", 0, "1", 1), answer("a", 1, "1", 1), answer("a", 2, "2", 0),
        answer("b", -1, "1", 0), answer("b", 0, "1", 0), answer("b", 1, "2", 1), answer("b", 2, "", 0, False),
        answer("c", 0, "Dear", 0.4, kind="courtesy"), answer("d", 0, "Dear", 0.8, kind="courtesy"),
    ]  # fmt: skip
    summary = pass_at_k.summary(rows)
    add = summary["problems"]["add"]
    assert summary["problems_all"] == add
    assert add["greedy"]["accuracy"] == {"value": 0.5, "se": 0.5, "n": 2} and add["greedy"]["reasoning"] == 0.5
    assert add["samples"]["truncated"] == pytest.approx(1 / 6) and add["samples"]["accuracy"]["value"] == 0.5
    assert {k: part["tokens"] for k, part in add["at"].items()} == {"1": 10, "2": 20, "3": 30}
    assert add["at"]["2"]["pass"]["value"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["judged"]["courtesy"]["reward"]["value"] == pytest.approx(0.6)


def test_same_bytes_twice_and_after_a_cut(run_stage, inputs, tmp_path: Path) -> None:
    first, second = (run_stage(pass_at_k.STAGE, CONFIG, inputs, tmp_path / name) for name in ("a", "b"))
    assert first.digest == second.digest
    (tmp_path / "b" / "answers-00000.json").unlink()
    assert run_stage(pass_at_k.STAGE, CONFIG, inputs, tmp_path / "b").digest == first.digest
    rows = chat_fixtures.table(first, "answers.parquet")
    assert len(rows) == 10 * 4 + 12
    assert pass_at_k.summary(rows) == first.json("scores.json")
    assert all(json.loads(row["parts"])["reward"] == row["reward"] for row in rows)
    drawn = [row for row in rows if row["sample"] >= 0]
    assert len({row["seed"] for row in drawn}) == len(drawn)
    assert {row["verifier"] for row in rows if row["kind"] == "courtesy"} == {"courtesy"}
    scores = first.json("scores.json")
    assert scores["problems"]["add"]["greedy"]["accuracy"]["n"] == 6
    assert (
        list(scores["problems"]["add"]["at"]) == ["1", "2", "3"] and scores["judged"]["courtesy"]["reward"]["n"] == 12
    )
    assert math.isfinite(scores["judged"]["courtesy"]["reward"]["value"])


def test_any_number_of_shards_gives_the_same_bytes(run_stage, inputs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pass_at_k, "ITEMS_PER_BATCH", 8)
    whole = run_stage(pass_at_k.STAGE, CONFIG, inputs)
    for shards in (2, 3):
        work = tmp_path / str(shards)
        config = evaluate_in_shards(pass_at_k.STAGE, CONFIG, inputs, work, shards)
        with monkeypatch.context() as patch:
            patch.setattr(pass_at_k, "ChatModel", None)  # nothing is left to do
            assert run_stage(pass_at_k.STAGE, config, inputs, work).digest == whole.digest


def test_another_split_and_a_kind_with_one_item(run_stage, inputs, tmp_path: Path) -> None:
    rows = chat_fixtures.table(run_stage(pass_at_k.STAGE, {**CONFIG, "split": "validation"}, inputs), "answers.parquet")
    assert {row["id"].split("/")[0] for row in rows} == {"validation"}
    few = chat_fixtures.sealed(
        chat_fixtures.items_stage.STAGE,
        {"problems": {"add": 1}, "seed": 0, "chat": {"validation": {}}},
        {},
        tmp_path / "few",
    )
    with pytest.raises(AtomError, match="have one item of kind add, and two are needed for an error bar in split test"):
        run_stage(pass_at_k.STAGE, CONFIG, {**inputs, "items": few})
    with pytest.raises(AtomError, match="have no item in split validation; ask for more in evaluation.chat"):
        run_stage(pass_at_k.STAGE, {**CONFIG, "split": "validation"}, {**inputs, "items": few})


def test_further_answers_to_some_problems_leave_the_other_figures_as_they_are(run_stage, inputs) -> None:
    plain = run_stage(pass_at_k.STAGE, CONFIG, inputs)
    config = {**CONFIG, "pass_at_k": {"items": 2, "num_samples": 5}}

    further = run_stage(pass_at_k.STAGE, config, inputs)

    scores, before = further.json("scores.json"), plain.json("scores.json")
    for kind in ("add", "sort"):
        subset = scores["problems"][kind].pop("at_subset")
        assert {k: part["pass"]["n"] for k, part in subset.items()} == {"1": 2, "2": 2, "4": 2, "5": 2}
        # Answers of a random model are wrong, and as long as allowed or ended by chance.
        assert subset["5"]["tokens"] == pytest.approx(5 * subset["1"]["tokens"])
    assert scores["problems_all"].pop("at_subset")["5"]["pass"]["n"] == 4
    assert scores == before
    counts = Counter(row["id"] for row in chat_fixtures.table(further, "answers.parquet") if row["sample"] >= 0)
    assert Counter(counts.values()) == {5: 4, 3: 6, 1: 12}


def test_the_card_tells_learning_from_sharpening() -> None:
    def scores(right: list[int]) -> dict:
        rows = [
            answer(str(n), sample, "1", sample < k) for n, k in enumerate(right) for sample in range(4 + 4 * (n < 3))
        ]
        rows += [answer(str(n), -1, "1", 1) for n in range(len(right))]
        return dict(pass_at_k.summary(rows))

    before, after = scores([1, 4, 0, 2]), scores([8, 8, 0, 2])

    lines = sharpening({"sft": before, "rlvr": after, "dpo": {**before, "problems": {}, "problems_all": None}})

    head, _, *cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert head == ["kind", "k", "problems", "after SFT", "after RLVR", "change"]
    table = {(row[0], row[1]): row[2:] for row in cells}
    assert list(table) == [(kind, k) for kind in ("add", "all problems") for k in ("1", "2", "4", "8")]
    # Both models solve the same two problems of three: the second only more often.
    assert table["add", "1"] == ["3", "0.208 (0.027 to 0.718)", "0.667 (0.208 to 0.939)", "0.458 (-0.227 to 0.785)"]
    assert table["add", "8"][3].startswith("0.000 (-0.") and table["add", "8"][1] == "0.667 (0.208 to 0.939)"
    assert sharpening({}) == []


def test_further_answers_are_for_the_models_before_and_after_rlvr(tmp_path: Path) -> None:
    graph = dag.compose(recipes.load("atom-tiny"), Store(tmp_path))

    solved = {name: node.config for name, node in graph.nodes.items() if node.stage.name == "solve"}

    further = {name for name, config in solved.items() if config.pass_at_k}  # type: ignore[attr-defined]
    assert further == {"solve-sft", "solve-rlvr"} and len(solved) == 8
    assert "pass_at_k" not in identity(solved["solve-dpo"])
    without = ROOT.joinpath("pipeline/recipes/atom-tiny.yaml").read_text().partition("\nrlvr:")
    rest = without[2].partition("\nevaluation:")[2]
    (tmp_path / "r.yaml").write_text(f"{without[0]}\nevaluation:{rest}")
    with pytest.raises(RecipeError, match="pass_at_k compares the models before and after reinforcement learning"):
        dag.compose(recipes.load(str(tmp_path / "r.yaml")), Store(tmp_path))


def test_further_answers_must_be_more() -> None:
    with pytest.raises(ValidationError, match="pass_at_k.num_samples = 3 is not more than num_samples = 3"):
        ChatSection(items={}, num_samples=3, pass_at_k={"items": 2, "num_samples": 3})  # type: ignore[arg-type]


def test_further_answers_are_to_some_of_the_problems() -> None:
    chat: Any = {"items": {}, "pass_at_k": {"items": 5, "num_samples": 64}}
    assert EvaluationSection(problems={"add": 8, "sort": 6}, chat=chat)
    with pytest.raises(ValidationError, match="pass_at_k.items = 5 is not less than problems.sort = 5, of which"):
        EvaluationSection(problems={"add": 8, "sort": 5}, chat=chat)
