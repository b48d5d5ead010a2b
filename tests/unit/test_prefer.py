"""Which of two models is preferred: by hand, and on two tiny random models."""

from __future__ import annotations

import json
import math

import pytest

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact
from stages.evaluation import pass_at_k, win_rate
from tests.fixtures import chat_fixtures
from tests.fixtures.run_fixtures import evaluate_in_shards

CONFIG = {"model": "dpo", "before": "rlvr", "max_new_tokens": 6, "seed": 0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return chat_fixtures.make(tmp_path_factory.mktemp("inputs"))


def pair(id: str, ours: float, theirs: float, **parts: float) -> dict:
    row = {"id": id, "question": "Thank the baker for the bread."}
    for side, reward in (("model", ours), ("before", theirs)):
        entry = {"answer": "Dear baker", "finished": True, "tokens": 4, "reward": reward}
        row |= {f"{side}_{name}": value for name, value in entry.items()}
        row[f"{side}_parts"] = json.dumps({"reward": reward, "act": 1.0, **parts})
    return row


def test_a_win_rate_by_hand() -> None:
    summary = win_rate.summary([pair("a", 1.0, 0.5), pair("b", 0.2, 0.1), pair("c", 0.3, 0.3), pair("d", 0.0, 1.0)])
    se = math.sqrt((2 * 0.375**2 + 0.125**2 + 0.625**2) / 3 / 4)
    rate = summary["win_rate"]
    assert (summary["wins"], summary["ties"], summary["losses"], rate["value"], rate["n"]) == (2, 1, 1, 0.625, 4)
    assert rate["se"] == pytest.approx(se)
    assert (rate["low"], rate["high"]) == (pytest.approx(0.2194, abs=1e-4), pytest.approx(0.9081, abs=1e-4))  # Wilson's
    few = win_rate.summary([pair("a", 1.0, 0.5), pair("b", 0.2, 0.1)])["win_rate"]
    assert few["value"] == few["high"] == 1 and few["low"] < 0.5, "two wins of two show nothing"
    assert summary["sides"]["model"]["parts"]["reward"]["value"] == pytest.approx(0.375)
    assert win_rate.summary([pair("a", 1, 1), pair("b", 0, 0)])["ties"] == 2


def test_an_answer_that_does_not_do_what_was_asked_wins_nothing() -> None:
    style = [pair("a", 0.07, 0.0, task=0.0), pair("b", 0.0, 0.06, task=0.0)]
    summary = win_rate.summary([*style, pair("c", 1.0, 0.8, task=1.0)])
    assert (summary["wins"], summary["ties"], summary["losses"]) == (1, 2, 0)


def test_two_models_and_the_same_bytes_twice(run_stage, inputs, tmp_path) -> None:
    first, second = (run_stage(win_rate.STAGE, CONFIG, inputs, tmp_path / name) for name in ("a", "b"))
    assert first.digest == second.digest
    rows, scores = chat_fixtures.table(first, "pairs.parquet"), first.json("scores.json")
    assert len(rows) == 12 and scores["wins"] + scores["ties"] + scores["losses"] == 12
    assert scores == {"model": "dpo", "before": "rlvr", **win_rate.summary(rows)}
    assert len(scores["examples"]) == 8 and rows[0]["question"].endswith(".")
    assert any(row["model_text"] != row["before_text"] for row in rows)
    same = run_stage(win_rate.STAGE, CONFIG, {**inputs, "before": inputs["model"]}).json("scores.json")
    assert same["ties"] == 12 and same["win_rate"]["value"] == 0.5


def test_any_number_of_shards_gives_the_same_bytes(run_stage, inputs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(win_rate, "ITEMS_PER_BATCH", 5)  # three batches of each side
    whole = run_stage(win_rate.STAGE, CONFIG, inputs, tmp_path / "whole")
    assert sorted(path.stem for path in (tmp_path / "whole").glob("*-0000?.json")) == [
        f"{side}-0000{number}" for side in ("before", "model") for number in range(3)
    ]
    for shards in (2, 3):
        work = tmp_path / str(shards)
        config = evaluate_in_shards(win_rate.STAGE, CONFIG, inputs, work, shards)
        with monkeypatch.context() as patch:
            patch.setattr(pass_at_k, "ChatModel", None)  # nothing is left to do
            assert run_stage(win_rate.STAGE, config, inputs, work).digest == whole.digest


def test_no_requests_is_one_sentence(run_stage, inputs, tmp_path) -> None:
    config = {"problems": {"add": 2}, "seed": 0, "chat": {}}
    none = chat_fixtures.sealed(chat_fixtures.items_stage.STAGE, config, {}, tmp_path / "none")
    with pytest.raises(AtomError, match="no request for a courteous note; set evaluation.chat.items.courtesies"):
        run_stage(win_rate.STAGE, CONFIG, {**inputs, "items": none})
