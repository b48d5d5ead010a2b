"""Tracing steps and tasks of phases that sample their data, compared with a reading of every row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from release import tracing
from release.facts.published_tables import read_rows
from stages.rl.rollout.rollouts import PairOrder
from tests.fixtures import sampled_answers_fixtures
from tests.fixtures.run_fixtures import atom
from tests.fixtures.sampled_answers_fixtures import PHASES, STEPS

PLAIN = ("step", "wave", "group", "sample", "task", "kind", "level", "text", "finished", "reward", "verifier", "policy")


@pytest.fixture(scope="module")
def release(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small release with rlvr, dpo, a reward model and online RLHF."""
    folder = Path(shutil.copytree(built, tmp_path_factory.mktemp("sampled") / built.name))
    sampled_answers_fixtures.add(folder)
    return folder


def rollouts(release: Path, phase: str) -> list[dict[str, Any]]:
    return list(read_rows(release / f"dataset/rl/{phase}/rollouts.parquet"))


def updated(release: Path, phase: str) -> set[int]:
    lines = map(json.loads, (release / f"evidence/training/{phase}/training.jsonl").open())
    return {line["step"] for line in lines if "loss" in line}


def pairs(release: Path) -> list[dict[str, Any]]:
    return list(read_rows(release / "dataset/rl/dpo/pairs.parquet"))


def compare_answers(answers: list[tracing.SampledAnswer], rows: list[dict[str, Any]], moved: set[int]) -> None:
    assert [tuple(getattr(a, name) for name in PLAIN) for a in answers] == [tuple(r[n] for n in PLAIN) for r in rows]
    assert [a.parts for a in answers] == [json.loads(row["parts"]) for row in rows]
    assert [a.learnt for a in answers] == [not row["dropped"] and row["step"] in moved for row in rows]


@pytest.mark.parametrize("phase", PHASES)
def test_a_step_has_its_prompts_answers_and_rewards(release: Path, phase: str) -> None:
    rows, moved = rollouts(release, phase), updated(release, phase)
    lines = (release / f"dataset/rl/{phase}/tasks.jsonl").read_text().splitlines()
    messages = {row["id"]: row["responses_create_params"]["input"] for row in map(json.loads, lines)}
    steps = sorted({row["step"] for row in rows})
    assert len(steps) > 1
    for step in steps:
        answer = tracing.trace_step(release, phase, step)
        here = [row for row in rows if row["step"] == step]
        assert [task.id for task in answer.tasks] == list(dict.fromkeys(row["task"] for row in here))
        for task in answer.tasks:
            compare_answers(task.answers, [row for row in here if row["task"] == task.id], moved)
            assert task.messages == messages[task.id] and task.phase == phase
        assert answer.moved == (step in moved)
        assert (answer.order is None) == (phase != "rlvr") and bool(answer.segments) == (phase == "rlvr")
        page = tracing.text(answer)
        assert all(f"task {row['task']} ({phase})" in page for row in here) and page.count("reward ") >= len(here)
        formed = [pair for task in answer.tasks for pair in task.pairs]
        assert len(formed) == (sum(row["round"] == step for row in pairs(release)) if phase == "dpo" else 0)
    assert {row["dropped"] for row in rows if row["step"] in moved} > {""}, "answers that no update used"


def test_an_epoch_of_pairs_has_each_pair_once() -> None:
    order = PairOrder(7, 3, "reward", 5)
    read = [number for step in range(1, 8) for number in order.of_step(step)]
    assert [sorted(read[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert read[:7] != read[7:14] and read[3:6] == PairOrder(7, 3, "reward", 5).of_step(2)


def test_every_task_leads_to_its_answers_pairs_and_checkpoints(release: Path) -> None:
    table = pairs(release)
    sampled = {phase: rollouts(release, phase) for phase in PHASES}
    ids = sorted({row["task"] for rows in sampled.values() for row in rows})
    reached = set()
    for id in ids:
        document = tracing.trace_document(release, id)
        assert document.fates == [] and document.uses == [] and document.id == id
        for task in document.tasks:
            compare_answers(
                task.answers, [row for row in sampled[task.phase] if row["task"] == id], updated(release, task.phase)
            )
            expected = [n for n, row in enumerate(table) if row["task"] == id] if task.phase == "dpo" else []
            assert [pair.row for pair in task.pairs] == expected
        stated = "which steps of a reward model read its pairs" in document.unknown
        assert stated == any(task.pairs for task in document.tasks)
        learnt = {task.phase for task in document.tasks if any(answer.learnt for answer in task.answers)}
        assert bool(document.checkpoints) == bool(learnt)
        assert (f"rlvr-step-{STEPS}" in (document.checkpoints or ())) == ("rlvr" in learnt)
        assert (f"online-rlhf-step-{STEPS}" in (document.checkpoints or ())) == bool(learnt)
        reached |= learnt
    assert reached == {"rlvr", "dpo", "online-rlhf"}


def test_a_task_in_the_data_alone_and_in_a_request_for_removal(release: Path, tmp_path: Path) -> None:
    id = pairs(release)[0]["task"]
    alone = Path(shutil.copytree(release / "dataset", tmp_path / "alone"))
    document = tracing.trace_document(alone, id)
    assert document.checkpoints is None and {a.learnt for t in document.tasks for a in t.answers} == {None, False}
    report = tracing.trace_removal(release, id)
    assert {file.path for file in report.files} >= {f"dataset/rl/dpo/{n}" for n in ("tasks.jsonl", "pairs.parquet")}
    assert report.proofs == {} and "a proof: tasks and answers are in no table that has a root" in report.unknown


def test_the_command_prints_json_and_names_damage(release: Path, tmp_path: Path) -> None:
    body = json.loads(atom(tmp_path, "trace", str(release), "--phase", "online-rlhf", "--step", "2", "--json").stdout)
    assert body["kind"] == "step" and body["order"] is None
    assert {"reward", "parts", "text", "learnt"} <= set(body["tasks"][0]["answers"][0])
    assert sum(len(task["answers"]) for task in body["tasks"]) == sum(
        row["step"] == 2 for row in rollouts(release, "online-rlhf")
    )
    damaged = Path(shutil.copytree(release, tmp_path / "damaged"))
    (damaged / "dataset/rl/online-rlhf/tasks.jsonl").write_text("{}\n")
    process = atom(tmp_path, "trace", str(damaged), "--phase", "online-rlhf", "--step", "2", code=2)
    assert "tasks.jsonl has a line that is no task" in process.stderr
