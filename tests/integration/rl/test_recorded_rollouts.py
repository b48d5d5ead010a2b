"""A phase that reads the answers of an earlier run draws and scores nothing, moves the same weights, and names answers
that were changed."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import AtomError, CheckFailed, Interrupted
from tests.fixtures import rl_fixtures, train_fixtures
from tests.fixtures.rl_fixtures import first, place, rewrite, without_sampler  # noqa: F401 - fixtures

STEPS = rl_fixtures.config(steps=4, release_checkpoint_interval=2, checkpoint_interval=1)


@pytest.fixture(scope="module")
def calm(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product of a run that drew its answers."""
    folder = tmp_path_factory.mktemp("calm")
    rl_fixtures.rlvr(place, folder / "work", folder / "out", STEPS)
    return folder / "out"


def test_recorded_answers_move_the_same_weights(place: Path, calm: Path, tmp_path: Path, without_sampler: None) -> None:
    recorded = rl_fixtures.record(calm, tmp_path / "recorded")
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", STEPS, rollouts=recorded)
    assert len(rl_fixtures.trained(calm)) == 2 * 3 + 1 and rl_fixtures.trained(tmp_path / "out") == rl_fixtures.trained(
        calm
    )
    assert {line["step"] for line in rl_fixtures.trained(calm)["log"]} == {1, 2, 3, 4}


def test_so_they_do_from_a_checkpoint_on(place: Path, calm: Path, tmp_path: Path, without_sampler: None) -> None:
    recorded = rl_fixtures.record(calm, tmp_path / "recorded")
    with pytest.raises(Interrupted):
        reporter = train_fixtures.Reporter(2, signal.SIGTERM)
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "a", STEPS, reporter, rollouts=recorded)
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "b", STEPS, rollouts=recorded)
    assert rl_fixtures.trained(tmp_path / "b") == rl_fixtures.trained(calm)


FORGERIES: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "the last answer is missing": (
        lambda rows: rows.pop(),
        r"answer \d+ in step 4, wave \d is missing, and the phase asked for one to \S+ with seed \d+; answers or",
    ),
    "a step is missing": (
        lambda rows: rows.__delitem__(slice(0, sum(row["step"] == 1 for row in rows))),
        "answer 0 in step 1, wave 0 is missing",
    ),
    "two answers change places": (
        lambda rows: rows.__setitem__(slice(0, 2), rows[1::-1]),
        "answer 0 in step 1, wave 0 is one to .* with seed .*, and the phase asked for one to .* with seed",
    ),
    "an answer twice": (
        lambda rows: rows.append(dict(rows[-1])),
        r"answer \d+ in step 4, wave \d is one to .*, and the phase asked for none",
    ),
    "a wave that nothing used": (
        lambda rows: rows.append({**rows[-1], "wave": 7}),
        "answer 0 in step 4, wave 7 was used by no update and dropped for no reason",
    ),
    "another text": (
        lambda rows: first(rows, 3).update(text="42"),
        "answer 0 in step 3, wave 0 has another `text` than follows from its task, tokens and rewards",
    ),
    "another prompt": (lambda rows: first(rows, 1)["prompt_ids"].append(7), "has another `prompt_ids` than follows"),
    "a used answer is called dropped": (
        lambda rows: first(rows, 2, dropped="").update(dropped="variance"),
        "in step 2, wave . has another `dropped` than follows",
    ),
    "a reward beside its parts": (
        lambda rows: first(rows, 2).update(reward=0.5),
        "answer 0 in step 2, wave 0 has tokens, log-probabilities or a reward that no answer has",
    ),
    "too few log-probabilities": (
        lambda rows: first(rows, 2)["logprobs"].pop(),
        "answer 0 in step 2, wave 0 has tokens, log-probabilities or a reward that no answer has",
    ),
    "no such token": (lambda rows: first(rows, 2)["ids"].__setitem__(0, 511), "has tokens, log-probabilities"),
    "no value": (
        lambda rows: first(rows, 2).update(logprobs=None),
        "answer 0 in step 2, wave 0 has tokens, log-probabilities or a reward that no answer has",
    ),
    "no parts": (
        lambda rows: first(rows, 2).update(parts="{"),
        r"rollouts.parquet has no answers of step 2 \(JSONDecodeError: .*\)",
    ),
    "another policy": (
        lambda rows: first(rows, 1).update(policy="sha256:0"),
        "answer 0 in step 1, wave 0 was drawn by the policy sha256:0, and the checkpoint is tensors-sha256:",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_changed_answers_are_named(place: Path, calm: Path, tmp_path: Path, forgery: str) -> None:
    change, sentence = FORGERIES[forgery]
    recorded = rl_fixtures.record(calm, tmp_path / "recorded")
    rewrite(recorded, change)
    with pytest.raises(CheckFailed, match=sentence) as error:
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", STEPS, rollouts=recorded)
    assert "\n" not in str(error.value)


def test_changed_numbers_move_other_weights(place: Path, calm: Path, tmp_path: Path) -> None:
    """A log-probability of a sampler is what nothing else says. The weights that follow are not the sampler's, so that
    the limit of the gap between the two does not hold any more."""
    recorded = rl_fixtures.record(calm, tmp_path / "recorded")

    def change(rows: list[dict[str, Any]]) -> None:
        first(rows, 2, dropped="")["logprobs"][0] -= 1e-3

    rewrite(recorded, change)
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", STEPS, rollouts=recorded)
    lines, changed = rl_fixtures.trained(calm)["log"], rl_fixtures.trained(tmp_path / "out")["log"]
    assert [a == b for a, b in zip(lines, changed, strict=True)][:2] == [True, False]
    weights = "step-000002/model.safetensors"
    assert rl_fixtures.trained(calm)[weights] != rl_fixtures.trained(tmp_path / "out")[weights]


def test_another_reward_asks_for_other_tasks(place: Path, calm: Path, tmp_path: Path) -> None:
    """What the curriculum draws depends on all rewards before."""
    recorded = rl_fixtures.record(calm, tmp_path / "recorded")

    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["step"] == 1:
                row.update(
                    reward=1.0, parts=json.dumps({**json.loads(row["parts"]), "reward": 1.0}), dropped="variance"
                )

    rewrite(recorded, change)
    with pytest.raises(CheckFailed, match="and the phase asked for"):
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", STEPS, rollouts=recorded)


def test_a_file_without_a_column_is_refused(place: Path, calm: Path, tmp_path: Path) -> None:
    recorded = rl_fixtures.record(calm, tmp_path / "recorded")
    table = pq.read_table(recorded / "rollouts.parquet")
    pq.write_table(table.drop_columns(["logprobs"]), recorded / "rollouts.parquet")
    with pytest.raises(AtomError, match=r"rollouts.parquet has no column logprobs of type list<.*float>, which is"):
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", STEPS, rollouts=recorded)
