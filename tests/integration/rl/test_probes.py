"""Tasks whose reward needs no solving are refused when they are drawn, whatever verifier scores them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact, sha256_file
from stages.rl.protocols import Answer, Parts, VerifierFailed
from stages.rl.rewards.frozen_scorer import Instructions
from stages.rl.rollout import tasks
from stages.rl.rollout.tasks import ProbedBin, probe, require_solving
from stages.tasks import Row, eval_set, to_row
from tests.fixtures import chat_fixtures
from tests.fixtures.run_fixtures import at_length
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP
from tests.fixtures.verifier_fixtures import Server, serve

__all__ = ["serve"]


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("probes")
    return chat_fixtures.sealed(eval_set.STAGE, chat_fixtures.ITEMS, {}, folder / "items")


def draw(items: Artifact, out: Path, *sources: dict[str, Any], **verifiers: dict[str, Any]) -> dict[str, ProbedBin]:
    """Runs the stage; returns the probes that it seals."""
    config = {"sources": sources, "seed": 0, "verifiers": verifiers}
    artifact = chat_fixtures.sealed(tasks.STAGE, config, {"items": items}, out)
    probed: dict[str, ProbedBin] = artifact.json(tasks.PROBES)
    return probed


def file_of(folder: Path, verifier: str, rows: Sequence[Row]) -> dict[str, Any]:
    """A source of rows."""
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "rows", "path": str(path), "digest": f"sha256:{sha256_file(path)}", "verifier": verifier,
            "kind": "own", "license": "MIT", "origin": "a test"}  # fmt: skip


def flips(*answers: str) -> list[Row]:
    return [to_row(str(n), f"Heads or tails? {n}", "exact", "own", 1, expected_answer=answer)
            for n, answer in enumerate(answers)]  # fmt: skip


@pytest.mark.parametrize(
    ("dataset", "answer"),
    [
        ("time_intervals", "the frequent answer"),
        pytest.param("complex_arithmetic", "'nan'", marks=at_length("training", 15)),
        pytest.param("coin_flip", "'0'", marks=at_length("training", 15)),
    ],
)
def test_a_dataset_that_rewards_a_constant_is_refused(
    items: Artifact, tmp_path: Path, dataset: str, answer: str
) -> None:
    source = {"source": "reasoning-gym", "dataset": dataset, "count": 16}
    with pytest.raises(
        AtomError, match=rf"tasks {dataset}/1: {answer}.*, which solves nothing, earns a mean reward of"
    ):
        draw(items, tmp_path / "tasks", source)


def test_instructions_are_refused_unless_the_recipe_acknowledges_their_reward(items: Artifact, tmp_path: Path) -> None:
    source = {"source": "instructions", "levels": [2], "count": 100}
    with pytest.raises(
        AtomError, match="tasks instructions/2: what the constraints name, which solves nothing"
    ) as error:
        draw(items, tmp_path / "refused", source)
    assert "\n" not in str(error.value) and "where chance earns 0.000" in str(error.value)
    with pytest.raises(AtomError, match="what the constraints name"):
        draw(items, tmp_path / "too-little", source | {"acknowledged_reward": 0.5})
    probed = draw(items, tmp_path / "tasks", source | {"acknowledged_reward": 1.0})["instructions/2"]
    assert (probed["tasks"], probed["acknowledged"], probed["chance"]) == (100, 1.0, 0.0)
    assert (
        probed["answers"][0]["name"] == "what the constraints name" and probed["answers"][0]["reward"]["value"] == 1.0
    )


def test_tasks_that_must_be_solved_pass(items: Artifact, tmp_path: Path) -> None:
    sources: list[dict[str, Any]] = [
        {"source": "problems", "task": "add", "levels": [0, 2], "count": 200},
        {"source": "courtesies", "count": 200, "acknowledged_reward": 0.07},
    ]
    probed = draw(items, tmp_path / "tasks", *sources)
    assert list(probed) == ["add/0", "add/2", "courtesy/1"]
    for name, each in probed.items():
        assert {"constant", "echo", "thinking"} <= {answer["family"] for answer in each["answers"]}, name
        assert each["answers"][0]["reward"]["n"] >= 100, name


def test_a_verifier_that_is_trained_later_is_not_probed(items: Artifact, tmp_path: Path) -> None:
    assert draw(items, tmp_path / "tasks", {"source": "courtesies", "count": 20, "verifier": "reward-model"}) == {}


def test_chance_is_what_the_best_constant_earns(items: Artifact, tmp_path: Path) -> None:
    """Half of all coins are heads, and who always says so solves nothing and is no reason to refuse them."""
    probed = draw(items, tmp_path / "tasks", file_of(tmp_path, "exact", flips(*["heads", "tails"] * 100)))["own/1"]
    assert probed["chance"] == 0.5 and probed["answers"][0]["reward"]["value"] > 0.4


def test_an_answer_that_is_nearly_always_right_is_no_chance(items: Artifact, tmp_path: Path) -> None:
    """Of two answers, one that is right twice as often as the other is what a policy would learn to give always."""
    for name, answers in (("one", ["yes"] * 60), ("mostly", ["yes", "yes", "no"] * 100)):
        source = file_of(tmp_path, "exact", flips(*answers))
        with pytest.raises(AtomError, match=r"tasks own/1: the frequent answer 'yes', .* where chance earns 0\.500"):
            draw(items, tmp_path / name, source)
    probed = draw(items, tmp_path / "acknowledged", source | {"acknowledged_reward": 0.75})["own/1"]
    assert (probed["chance"], probed["acknowledged"]) == (0.5, 0.75)


def test_a_few_tasks_do_not_decide_by_luck() -> None:
    def score(answers: Sequence[Answer]) -> list[Parts]:
        """Some constant is right in one of ten tasks."""
        return [{"reward": float(row["id"] == "3" and response.text == "7")} for row, response in answers]

    rows = [to_row(str(n), "?", "instructions", "own", 1) for n in range(10)]
    probed = probe(rows, score, 0)
    assert probed["answers"][0]["reward"]["value"] == 0.1
    require_solving("own/1", probed)
    require_solving("own/1", probe(rows[:1], lambda answers: [{"reward": 1.0}] * len(answers), 0))
    with pytest.raises(AtomError, match="tasks own/1: ''"):
        require_solving("own/1", probe(rows, lambda answers: [{"reward": 1.0}] * len(answers), 0))


@pytest.mark.parametrize("part", ["reward", "fraction"])
def test_a_reward_that_is_no_number_stops_the_stage(
    items: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def score(self: Any, answers: Sequence[Answer]) -> list[Parts]:
        return [{"reward": 0.0, "fraction": 0.0} | {part: float("nan")} for _ in answers]

    monkeypatch.setattr(Instructions, "score", score)
    with pytest.raises(
        VerifierFailed,
        match=f"verifier instructions: the {part} of an answer to task instructions/1/.* is nan, which is no number",
    ):
        draw(items, tmp_path / "tasks", {"source": "instructions", "levels": [1], "count": 20})


@NEEDS_BUBBLEWRAP
def test_programs_that_compute_nothing_earn_nothing(items: Artifact, tmp_path: Path) -> None:
    """Tests of one kind of value pass a function that always returns it."""

    def row(number: int, expected: bool) -> Row:
        check = f"def check(candidate): assert candidate({number}) is {expected}"
        return to_row(str(number), f"Is {number} even?", "python-tests", "own", 1, entry_point="even", check=check)

    always = [row(n, True) for n in range(8)]
    with pytest.raises(AtomError, match="tasks own/1: a function that returns True, which solves nothing"):
        draw(items, tmp_path / "refused", file_of(tmp_path, "python-tests", always))


def test_a_server_that_rewards_everything_is_refused(
    items: Artifact, tmp_path: Path, serve: Callable[..., Server]
) -> None:
    server = serve(lambda number, request: (200, json.dumps({"reward": 1.0}).encode()))
    source = file_of(tmp_path, "nemo-gym", [to_row(str(n), "?", "nemo-gym", "own", 1) for n in range(6)])
    settings = {"nemo-gym": {"url": server.url, "serves": "a test"}}
    with pytest.raises(AtomError, match="tasks own/1: ''"):
        draw(items, tmp_path / "tasks", source, **settings)


def test_a_task_with_a_key_is_left_out(items: Artifact, tmp_path: Path) -> None:
    """All tasks are published, and the release would be refused."""
    key = "-----BEGIN RSA PRIVATE KEY-----\n" + ("QUJD" * 16 + "\n") * 3
    rows = [*flips(*"abcdef"), to_row("key", f"Read this:\n{key}", "exact", "own", 1, expected_answer="x"),
            to_row("token", "Who?", "exact", "own", 1, expected_answer=f"ghp_{'a1' * 18}")]  # fmt: skip
    assert draw(items, tmp_path / "tasks", file_of(tmp_path, "exact", rows))["own/1"]["tasks"] == 6
    assert "PRIVATE" not in (tmp_path / "tasks/tasks.jsonl").read_text()


def test_a_row_that_cannot_be_scored_is_named(items: Artifact, tmp_path: Path) -> None:
    row = to_row("1", "Write.", "instructions", "own", 1, instruction_id_list=["x"], kwargs="none")
    with pytest.raises(VerifierFailed, match="verifier instructions, row own/000001: "):
        draw(items, tmp_path / "tasks", file_of(tmp_path, "instructions", [row]))
