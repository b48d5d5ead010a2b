"""Answers in turns: programs and searches answer what the policy calls, and every token is exact."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import CheckFailed, Interrupted
from pipeline.core.store import Artifact
from stages.formats.seeds import seed_of
from stages.generation.in_process import InProcess
from stages.generation.protocols import Prompt
from stages.mcore.hf_mapping import hf_config, to_hf
from stages.models.mixture import Qwen3MoeConfig
from stages.rl import sandbox
from stages.rl.protocols import Call, RunningTool, ToolFailed
from stages.rl.rollout import rollouts
from stages.rl.rollout.generation import Chat
from stages.rl.tools.python_program import PythonTool
from stages.rl.tools.settings import Tools
from stages.train.checkpoint import release_checkpoint
from tests.fixtures import layout_fixtures, rl_fixtures, tool_fixtures, train_fixtures
from tests.fixtures.rl_fixtures import rewrite
from tests.fixtures.run_fixtures import at_length
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP

pytestmark = NEEDS_BUBBLEWRAP


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    tool_fixtures.make(folder)
    return folder


@pytest.fixture(scope="module")
def chat(place: Path) -> Chat:
    return Chat(Artifact.open(place / "tokenizer"), Tools.model_validate(tool_fixtures.TOOLS))


@pytest.fixture(scope="module")
def calm(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    tool_fixtures.rlvr(place, folder / "work", folder / "out", tool_fixtures.config())
    return folder / "out"


@pytest.fixture(scope="module")
def answers(calm: Path) -> list[rollouts.Rollout]:
    return rollouts.read(calm / "rollouts.parquet")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTool]:
    running = PythonTool(tool="python", cpu_seconds=1, workers=1).open()
    yield running
    running.close()


def test_a_program_answers_within_its_bounds(python: RunningTool) -> None:
    codes = [
        "print(6 * 7)", "print(1); 1 / 0", "while True: pass", "while True: print('x' * 1000)",
        "b' ' * (1 << 40)", "import ctypes; ctypes.string_at(0)", "print('\\ud800')", "syntax error", "import sys; sys.exit(3)", "",
    ]  # fmt: skip
    results = python.run([Call("python", "python", {"code": code}, {}) for code in codes])
    assert [r.status for r in results] == [
        "ok", "error", "timeout", "output", "memory", "killed", "error", "error", "error", "ok",
    ]  # fmt: skip
    assert [results[n].text for n in (0, 1, 2, 8, 9)] == [
        "42\n", "1\nZeroDivisionError: division by zero", "the program was ended: it took too long", "exit code 3", "",
    ]  # fmt: skip
    assert results[3].text.startswith("xxx") and results[3].text.endswith(
        "\nthe program was ended: it printed too much"
    )


def test_an_answer_is_its_turns_and_their_results(answers: list[rollouts.Rollout], chat: Chat) -> None:
    turn_end, end = chat.turn_end, chat.end
    statuses = {c["status"] for r in answers for turn in r.turns or () for c in turn["calls"]}
    assert statuses == {"ok", "error", "unreadable", "unknown"}
    assert {len(r.turns or ()) for r in answers if r.kind == "add"} == {1, 2, 3}
    for r in answers:
        assert r.turns is not None
        assert r.kind == "add" or [turn["calls"] for turn in r.turns] == [[]]
        assert "called:" in chat.tokenizer.decode(r.prompt_ids) or r.kind == "plain"
        place = 0
        for turn in r.turns:
            drawn = r.ids[place : place + turn["sampled"]]
            place += turn["sampled"]
            results = [call["result"] for call in turn["calls"]]
            assert r.ids[place : place + turn["appended"]] == (chat.encode_results(results) if results else [])
            assert drawn[-1] == turn_end or not results
            place += turn["appended"]
        assert place == len(r.ids) == len(r.logprobs) == len(r.is_sampled)
        assert not any(logprob for logprob, is_sampled in zip(r.logprobs, r.is_sampled, strict=True) if not is_sampled)
        assert r.text == chat.decode(drawn[: len(drawn) - r.finished]), "verifiers read the last turn"
        has_call = r.kind == "add" and drawn[-1] == turn_end and "<tool_call>" in r.text
        assert r.finished == (drawn[-1] in (turn_end, end) and not has_call)
        assert r.reward == float(r.finished and "e" in r.text)
    # a result that is too long is cut, and one that holds control tokens holds only text
    calls = [c for r in answers for turn in r.turns or () for c in turn["calls"]]
    assert any(c["result"] == "z" * 40 + "\n[cut: 960 more characters]" for c in calls)
    hostile = next(c["result"] for c in calls if "<|im_end|>" in c["result"])
    assert chat.encode_results([hostile]).count(turn_end) == 1


def test_each_token_is_of_the_weights_its_seed_and_all_tokens_before(
    place: Path, calm: Path, answers: list[rollouts.Rollout], chat: Chat
) -> None:
    """The turns of an answer, drawn one by one; the log-probabilities, by one pass over the whole answer."""
    model = Qwen3MoeConfig.model_validate(tool_fixtures.MODEL)
    sampler = InProcess(hf_config(model, chat.vocab_size, chat.end, chat.pad, "float32"), chat.stops, 6)
    weights = release_checkpoint.Tensors(place / "init" / release_checkpoint.name_of(3))
    sampler.load(dict(to_hf(weights, model, chat.vocab_size)))
    for r in [r for r in answers if r.step == 1 and len(r.turns or ()) > 1][:4]:
        position = 0
        for number, turn in enumerate(r.turns or (), 1):
            prompt = Prompt(
                (*r.prompt_ids, *r.ids[:position]), r.seed if number == 1 else seed_of(f"turn/{number}", r.seed)
            )
            (drawn,) = sampler.generate([prompt])
            assert list(drawn.ids) == r.ids[position : position + turn["sampled"]]
            position += turn["sampled"] + turn["appended"]
        with torch.no_grad():
            logits = sampler.model(torch.tensor([[*r.prompt_ids, *r.ids]])).logits[0, len(r.prompt_ids) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(r.ids)[:, None])[:, 0]
        sampled = torch.tensor(r.is_sampled)
        torch.testing.assert_close(logprobs[sampled], torch.tensor(r.logprobs)[sampled], atol=1e-4, rtol=1e-4)
    gaps = [line["max_sampler_gap"] for line in rl_fixtures.lines(calm) if "max_sampler_gap" in line]
    assert max(gaps) < 1e-4, "the trainer computes what the sampler drew, between the results"


def test_the_log_counts_drawn_tokens_and_calls(calm: Path, answers: list[rollouts.Rollout]) -> None:
    first = next(line for line in rl_fixtures.lines(calm) if "reward" in line)
    drawn = [r for r in answers if r.step == 1]
    assert first["generated"] == sum(r.length for r in drawn) == sum(sum(r.is_sampled) for r in drawn)
    assert first["tokens"] == sum(r.length for r in drawn if not r.dropped), "results carry no loss"
    calls = [c["status"] for r in drawn for turn in r.turns or () for c in turn["calls"]]
    assert first["calls"] == {status: calls.count(status) for status in sorted(set(calls))}


@at_length("training", 5)
def test_stopped_and_resumed_gives_the_same_bytes(place: Path, calm: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        reporter = train_fixtures.Reporter(1, signal.SIGTERM)
        tool_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", tool_fixtures.config(), reporter)
    tool_fixtures.rlvr(place, tmp_path / "work", tmp_path / "again", tool_fixtures.config())
    assert train_fixtures.digest(tmp_path / "again") == train_fixtures.digest(calm)


def test_a_broken_sandbox_ends_the_run_and_costs_no_answer(
    place: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step 2 its cells die with every program, also with the probe, as when memory is short."""

    class Broken(train_fixtures.Reporter):
        def progress(self, done: int, *arguments: Any, **figures: float) -> None:
            if done == 1:
                monkeypatch.setattr(sandbox.Cell, "run", _die)

    with pytest.raises(ToolFailed, match=r"^tool python: the sandbox fails 3 times, and then for a program that"):
        tool_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", tool_fixtures.config(), Broken())
    kept = {path.name for path in (tmp_path / "work" / "rollouts").glob("*")}
    assert kept and all(name.startswith("000001-") for name in kept)
    monkeypatch.undo()
    tool_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", tool_fixtures.config())
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(calm)


def _die(cell: sandbox.Cell, program: sandbox.Program) -> sandbox.Outcome:
    with cell.begin({"role": "program", "source": "while True: pass"}) as running:
        assert cell.pid is not None
        os.kill(cell.pid, signal.SIGKILL)
        return running.finish()


@at_length("training", 30)
def test_killed_in_the_middle_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    settings = tool_fixtures.config(tools={**tool_fixtures.TOOLS, "offered": [{"tool": "python"}]}, steps=4)
    rl_fixtures.rlvr(place, tmp_path / "calm-work", tmp_path / "calm", settings)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    places = [str(p) for p in (place, tmp_path / "work", tmp_path / "out", tmp_path / "config.json")]
    process = layout_fixtures.spawn("tests.fixtures.rl_fixtures", places, 1, {"TEST_DISTURB": "0 3 SIGKILL"})
    codes, logs = layout_fixtures.end(process)
    assert codes == [-signal.SIGKILL], logs
    rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings)
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(tmp_path / "calm")


@at_length("training", 60)
@pytest.mark.numeric
def test_the_policy_learns_in_turns(place: Path, tmp_path: Path) -> None:
    """An answer is right if its last turn has the letter e; calls do not help, and become fewer."""
    settings = tool_fixtures.config(steps=20, num_generations=8, release_checkpoint_interval=20, validate_every=20)
    tool_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings)
    rewards = [
        line["rewards"]["add"] for line in rl_fixtures.lines(tmp_path / "out") if "add" in line.get("rewards", {})
    ]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2, rewards  # by 0.5 or more over 4 seeds


@pytest.fixture
def without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a replay calls no tool, draws and scores nothing")

    for name in ("make_sampler", "make_verifiers", "generation.Toolbox"):
        monkeypatch.setattr(f"stages.rl.policy.{name}", refuse)


def test_recorded_turns_move_the_same_weights(place: Path, calm: Path, tmp_path: Path, without_tools: None) -> None:
    recorded = rl_fixtures.record(calm, tmp_path / "recorded")
    tool_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", tool_fixtures.config(), rollouts=recorded)
    assert rl_fixtures.trained(tmp_path / "out") == rl_fixtures.trained(calm)


def called(rows: list[dict[str, Any]], status: str) -> dict[str, Any]:
    """An answer of the first step whose first turn has a call with this status and a result in its tokens."""
    return next(
        row for row in rows if row["turns"][0]["appended"] and row["turns"][0]["calls"][0]["status"] == status
    )  # fmt: skip


def set_result(row: dict[str, Any], result: str) -> None:
    row["turns"][0]["calls"][0]["result"] = result


def move_border(row: dict[str, Any]) -> None:
    row["turns"][0]["sampled"] += 1
    row["turns"][0]["appended"] -= 1


def credit_result(row: dict[str, Any]) -> None:
    row["logprobs"][row["turns"][0]["sampled"]] = -1.0


def end_early(row: dict[str, Any]) -> None:
    size = row["turns"][0]["sampled"]
    row["turns"] = [{**row["turns"][0], "appended": 0, "calls": []}]
    row["ids"], row["logprobs"] = row["ids"][:size], row["logprobs"][:size]


FORGERIES: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "another result": (lambda rows: set_result(called(rows, "ok"), "f"), "results of tools other than those in its tokens"),
    "another refusal": (lambda rows: set_result(called(rows, "unknown"), "f"), "a result that a call of rm cannot have"),
    "a longer result": (lambda rows: set_result(called(rows, "ok"), "e" * 41), "a result that a call of \\w+ cannot"),
    "a token of a result as drawn": (lambda rows: move_border(called(rows, "ok")), "calls of tools other than those in"),
    "a result with a loss": (lambda rows: credit_result(called(rows, "ok")), "log-probabilities of tokens that were not"),
    "a call without its result": (lambda rows: end_early(called(rows, "ok")), "calls of tools other than those in its"),
    "no turns": (lambda rows: rows[0].update(turns=None), "has turns, or lacks them, unlike the phase"),
    "no tokens": (lambda rows: rows[0]["turns"][0].update(sampled=None), "has turns that are none"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_changed_turns_are_named(name: str, place: Path, calm: Path, tmp_path: Path, without_tools: None) -> None:
    forge, message = FORGERIES[name]
    recorded = rl_fixtures.record(calm, tmp_path / "recorded")
    rewrite(recorded, forge)
    with pytest.raises(
        CheckFailed,
        match=rf"answer \d+ in step \d, wave \d has .*{message[4:] if message.startswith('has ') else message}",
    ):
        tool_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", tool_fixtures.config(), rollouts=recorded)


def test_an_answer_ends_where_the_context_does(place: Path, tmp_path: Path) -> None:
    """Its results would leave no room for a turn: they are recorded, not in its tokens, and it is unfinished."""
    length = 300
    settings = tool_fixtures.config()
    settings["model"] = {**tool_fixtures.MODEL, "context_length": length}
    tool_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", settings)
    drawn = rollouts.read(tmp_path / "out" / "rollouts.parquet")
    assert max(len(r.prompt_ids) + len(r.ids) for r in drawn) <= length
    cut_off = [r for r in drawn if (r.turns or ())[-1]["calls"]]
    assert cut_off and not any(r.finished or r.reward for r in cut_off)
    recorded = rl_fixtures.record(tmp_path / "out", tmp_path / "recorded")
    tool_fixtures.rlvr(place, tmp_path / "replay", tmp_path / "again", settings, rollouts=recorded)
    assert rl_fixtures.trained(tmp_path / "again") == rl_fixtures.trained(tmp_path / "out")
    assert replace(drawn[0], turns=None).length == len(drawn[0].ids)
