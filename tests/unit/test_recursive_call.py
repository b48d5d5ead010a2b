"""Recursive calls: a program in the place of the policy splits questions about long texts, and every answer follows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from stages.data.tokenizer import bpe_trainer, untrained
from stages.rl.policy import unscored
from stages.rl.protocols import Completion, Prompt, Row, question
from stages.rl.rewards.registry import make_verifiers
from stages.rl.rollout import turns
from stages.rl.rollout.generation import Chat
from stages.rl.rollout.task_sources.long_list_tasks import LongListTasks
from stages.rl.rollout.turns import Limits, Toolbox
from stages.rl.tools.base import Call, Result, Subtask
from stages.rl.tools.recursive_call import RecursiveTool
from stages.rl.tools.settings import Tools

TOOLS = Tools.model_validate({"offered": [{"tool": "recurse"}]})
SOURCE = LongListTasks(source="long-lists", operation="largest", shown_parts=4, levels=(0, 3), count=3)
LIMITS = Limits(max_turns=2, max_new_tokens=200, context_length=1200)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = untrained()
    bpe.train_from_iterator([""], bpe_trainer(262))
    bpe.save(str(folder / "tokenizer.json"))
    return Chat(folder, TOOLS)


class Program:
    """Splits what it does not see, and answers with the largest number that it sees."""

    def __init__(self, chat: Chat, wrong: str = "") -> None:
        """wrong: the number that it takes for the largest of its list."""
        self.chat, self.wrong = chat, wrong
        self.prompts: list[Prompt] = []

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        self.prompts += prompts
        return [self._completion(self._answer(self.chat.decode(prompt.ids))) for prompt in prompts]

    def _answer(self, text: str) -> str:
        if results := re.findall(r"<\|im_start\|>tool\n(.*?)<\|im_end\|>", text, re.DOTALL):
            return max(results)
        asked_for = text[text.rindex("largest") :]
        if parts := re.search(r"parts (\d+) to (\d+)", asked_for):
            first, last = map(int, parts.groups())
            middle = (first + last) // 2
            return "".join(
                f'<tool_call>{{"name": "recurse", "arguments": {{"first": "{a}", "last": "{b}"}}}}</tool_call>'
                for a, b in ((first, middle), (middle + 1, last))
            )
        numbers = re.findall(r"\d+", asked_for)
        return self.wrong if self.wrong in numbers else max(numbers)

    def _completion(self, text: str) -> Completion:
        ids = [*self.chat.tokenizer.encode(text).ids, self.chat.turn_end]
        return Completion(tuple(ids), (-1.0,) * len(ids), True)

    def close(self) -> None: ...


def solve(chat: Chat, program: Program, rows: Sequence[Row], folder: Path, limits: Limits = LIMITS) -> list[Completion]:
    toolbox = Toolbox(TOOLS, {}, folder / "tools")
    return turns.draw(program, chat, toolbox, limits, [(row, n) for n, row in enumerate(rows)])


def test_answers_about_parts_make_up_the_answer_about_the_whole(chat: Chat, tmp_path: Path) -> None:
    rows = list(SOURCE.rows(0, set()))
    program = Program(chat)
    completions = solve(chat, program, rows, tmp_path)
    scored = make_verifiers(rows, {}, chat, {})["exact"].score(
        [(row, chat.response(c)) for row, c in zip(rows, completions, strict=True)]
    )
    assert [parts["reward"] for parts in scored] == [1.0] * 6
    short, long = rows[0], rows[3]
    assert "tools" not in chat.decode(chat.encode_prompt(short)), "nothing is left to split"
    assert question(long) == "largest\nparts 1 to 32"
    assert len(program.prompts) == 3 + 3 * (8 + 7 * 2), "eight lists of four numbers, and two turns of what splits them"
    seeds = [prompt.seed for prompt in program.prompts]
    assert len(set(seeds)) == len(seeds), "each call has a seed of its own"
    again = Program(chat)
    assert solve(chat, again, rows, tmp_path) == completions and again.prompts == program.prompts


def test_a_wrong_answer_about_a_part_reaches_the_whole(chat: Chat, tmp_path: Path) -> None:
    row = list(SOURCE.rows(0, set()))[3]
    part = next(n for n in range(0, 32, 4) if row["expected_answer"] in row["parts"][n : n + 4])
    wrong = min(row["parts"][part : part + 4])
    (completion,) = solve(chat, Program(chat, wrong), [row], tmp_path)
    assert chat.response(completion).answer != row["expected_answer"]


def test_recorded_answers_are_those_of_their_tokens(chat: Chat, tmp_path: Path) -> None:
    """A replay calls nothing: it reads the results, and takes no others than those in the tokens."""
    row = list(SOURCE.rows(0, set()))[3]
    (completion,) = solve(chat, Program(chat), [row], tmp_path)
    recorded = unscored(1, 0, "policy", row, 0, chat, completion)
    assert turns.problem(recorded, chat, row, LIMITS) is None
    assert recorded.turns is not None
    recorded.turns[0]["calls"][0]["result"] += "0"
    assert turns.problem(recorded, chat, row, LIMITS) == "has results of tools other than those in its tokens"


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ("1", "32", "error: name some of the parts 1 to 32, not all"),
        ("0", "4", "error: name some of the parts 1 to 32, not all"),
        ("5", "4", "error: name some of the parts 1 to 32, not all"),
        ("30", "33", "error: name some of the parts 1 to 32, not all"),
        ("one", "4", "error: first and last are numbers of parts"),
        ("9" * 5000, "4", "error: first and last are numbers of parts"),
    ],
)
def test_parts_that_are_none_are_refused(first: str, last: str, message: str) -> None:
    row = list(SOURCE.rows(0, set()))[3]
    running = RecursiveTool(tool="recurse").open({}, Path())
    (result,) = running.run([Call("recurse", "recurse", {"first": first, "last": last}, row)])
    assert result == Result("arguments", message)


def test_calls_are_as_deep_as_the_recipe_allows() -> None:
    row: Any = list(SOURCE.rows(0, set()))[3]
    running = RecursiveTool(tool="recurse", max_depth=2).open({}, Path())
    for last in (31, 30):
        (subtask,) = running.run([Call("recurse", "recurse", {"first": "1", "last": str(last)}, row)])
        assert isinstance(subtask, Subtask)
        row = subtask.row
    assert (len(row["parts"]), row["depth"]) == (30, 2)
    (result,) = running.run([Call("recurse", "recurse", {"first": "1", "last": "2"}, row)])
    assert result == Result("error", "error: calls are 2 deep at most; answer without one")


def test_a_task_that_lacks_a_field_is_named() -> None:
    row = dict(list(SOURCE.rows(0, set()))[3])
    del row["about"]
    with pytest.raises(
        AtomError, match=r"^task largest/3/000000 has parts and no about; add it, or leave the tool out$"
    ):
        TOOLS.functions(row)
    del row["parts"]
    assert TOOLS.functions(row) == {}


def test_an_answer_has_a_bounded_number_of_subtasks(chat: Chat, tmp_path: Path) -> None:
    row = list(SOURCE.rows(0, set()))[3]
    program = Program(chat)
    solve(chat, program, [row], tmp_path, Limits(max_turns=2, max_new_tokens=200, context_length=1200, max_subtasks=5))
    assert len(program.prompts) == 2 * (1 + 2 + 3), "the whole, its halves and three of its quarters, in two turns each"
    texts = [chat.decode(prompt.ids) for prompt in program.prompts]
    assert any("error: there are 5 calls at most; answer without one" in text for text in texts)


def test_an_answer_without_room_or_end_is_a_result_that_says_so(chat: Chat, tmp_path: Path) -> None:
    rows = list(SOURCE.rows(0, set()))
    long = {**rows[3], "parts": ["x" * 400] * 32}
    tight = Limits(max_turns=2, max_new_tokens=200, context_length=len(chat.encode_prompt(long)) + 520)
    (completion,) = solve(chat, Program(chat), [{**long, "shown_parts": 16}], tmp_path, tight)
    assert completion.turns is not None
    results = [call["result"] for turn in completion.turns for call in turn["calls"]]
    assert results == ["error: the question is too long for the context; ask for less"] * 2
    one_turn = Limits(max_turns=1, max_new_tokens=200, context_length=1200)
    (completion,) = solve(chat, Program(chat), [rows[3]], tmp_path, one_turn)
    assert not completion.finished


def test_tasks_are_of_their_levels_and_a_part_does_not_give_the_answer_away() -> None:
    for operation, best in (("largest", max), ("smallest", min)):
        source = LongListTasks(source="long-lists", operation=operation, shown_parts=8, levels=(4,), count=400)
        rows = list(source.rows(1, set()))
        assert rows == list(source.rows(1, set())) != list(source.rows(2, set()))
        seen = 0
        for row in rows:
            numbers = [int(part) for part in row["parts"]]
            assert len(set(numbers)) == 128 and str(best(numbers)) == row["expected_answer"]
            seen += str(best(numbers[:32])) == row["expected_answer"]
        assert 0.15 < seen / len(rows) < 0.35, "a quarter of the numbers has the answer in a quarter of the tasks"
