"""Checks of instructions: each kind, all together, and those that cannot be checked."""

from __future__ import annotations

import random
from typing import Any

import pytest

from stages.rl.protocols import VerifierFailed, make_verifier
from stages.scorers.instructions_v1 import CHECKS
from stages.tasks import to_row
from stages.tasks.synthetic import courtesy_notes
from tests.fixtures.verifier_fixtures import ARGUMENTS, form_row, score_one

FOLLOWED: dict[str, tuple[list[str], list[str]]] = {
    "keywords:existence": (["Tea with milk"], ["tea", "milk"]),
    "keywords:frequency": (["tea and more Tea"], ["tea"]),
    "keywords:forbidden_words": (["steam"], ["Have tea.", "tea"]),
    "keywords:letter_frequency": (["zoo", "none"], ["Zz"]),
    "length_constraints:number_words": (["one two three four"], ["one two, three"]),
    "length_constraints:number_sentences": (["One. Two!", "3.14 is pi."], ["One. Two! Three? Four."]),
    "length_constraints:number_paragraphs": (
        ["one\n***\ntwo", "***\none\n***\ntwo\n***"],
        ["one", "one\n***\n***\ntwo"],
    ),
    "length_constraints:nth_paragraph_first_word": (['First.\n\n"Then" more.'], ["Then.\n\nFirst.", "Then."]),
    "detectable_content:number_placeholders": (["[name] of [place]"], ["[name]", "[[["]),
    "detectable_content:postscript": (["Bye.\np.s. more"], ["Bye."]),
    "detectable_format:number_bullet_lists": (
        ["* a\n* b", "Say:\n- a\n  - b"],
        ["* a", "* a\n* b\n* c", "**a**\n**b**"],
    ),
    "detectable_format:constrained_response": (["My answer is yes."], ["Yes."]),
    "detectable_format:number_highlighted_sections": (["*a* and **b**"], ["*a*", "* * * *"]),
    "detectable_format:multiple_sections": (["SECTION 1\na\nSECTION 2\nb"], ["SECTION 1", "SECTION A SECTION B"]),
    "detectable_format:json_format": (['{"a": [1]}', '```json\n{"a": 1}\n```'], ["{a: 1}", 'Here: {"a": 1}']),
    "detectable_format:title": (["<<A tale>>\nonce"], ["<<>>", "<< >>", "A tale", ">>a<<"]),
    "combination:two_responses": (["one\n******\ntwo"], ["one", "one ****** one", "one ****** two ****** three"]),
    "combination:repeat_prompt": (["Say this. I did."], ["I say this."]),
    "startend:start_checker": (["dear you"], ["Oh dear"]),
    "startend:end_checker": (["Well. Bye.", '"Bye."'], ["Bye. Well."]),
    "startend:quotation": (['"all of it"'], ['"half', '"', "none"]),
    "change_case:capital_word_frequency": (["SO MUCH noise"], ["SO much noise"]),
    "change_case:english_capital": (["ALL OF 1T"], ["All"]),
    "change_case:english_lowercase": (["all of 1t"], ["All"]),
    "punctuation:no_comma": (["none here"], ["one, two"]),
}


@pytest.mark.parametrize("name", CHECKS)
def test_each_instruction(name: str) -> None:
    scorer, row = make_verifier("instructions"), form_row((name, ARGUMENTS[name]))
    followed, not_followed = FOLLOWED[name]
    for text in followed:
        assert score_one(scorer, row, text) == {"reward": 1, "fraction": 1, "finished": 1}, text
    for text in (*not_followed, "", " "):
        assert score_one(scorer, row, text) == {"reward": 0, "fraction": 0, "finished": 1}, text


def test_all_instructions_must_be_followed_and_none_are_left_unread() -> None:
    scorer = make_verifier("instructions")
    words = "length_constraints:number_words"
    row = form_row(
        (words, {"num_words": 3, "relation": "at least", "keywords": None}),
        (words, {"num_words": 5, "relation": "less than"}),
        ("punctuation:no_comma", {}),
    )
    assert score_one(scorer, row, "one two three") == {"reward": 1, "fraction": 1, "finished": 1}
    assert score_one(scorer, row, "one, two") == {"reward": 0, "fraction": pytest.approx(1 / 3), "finished": 1}


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        (("language:response_language", {"language": "en"}), "unknown instruction 'language:response_language'"),
        (("punctuation:no_comma", {"num_words": 3}), "unexpected keyword argument 'num_words'"),
        (("length_constraints:number_words", {"num_words": 3}), "missing 1 required positional argument: 'relation'"),
        (("length_constraints:number_words", {"num_words": 3, "relation": "about"}), "relation 'about' is neither"),
        (("keywords:existence", {"keywords": [3]}), "has no attribute 'lower'"),
    ],
)
def test_an_instruction_that_cannot_be_checked_is_no_reward(
    instruction: tuple[str, dict[str, Any]], words: str
) -> None:
    with pytest.raises(VerifierFailed, match=f"verifier instructions, row i1: .*{words}"):
        score_one(make_verifier("instructions"), form_row(instruction), "text")


def test_a_row_without_instructions_is_no_reward() -> None:
    with pytest.raises(VerifierFailed, match="row i1: no field 'kwargs'"):
        score_one(make_verifier("instructions"), {k: v for k, v in form_row().items() if k != "kwargs"}, "text")
    with pytest.raises(VerifierFailed, match="0 instructions with 0 sets"):
        score_one(make_verifier("instructions"), form_row(), "text")


@pytest.mark.parametrize("level", courtesy_notes.LEVELS)
def test_requests_of_each_level_can_be_met_and_missed(level: int) -> None:
    verifier = make_verifier("instructions")
    requests = courtesy_notes.requests(100, random.Random(level), level)
    assert len({text for text, _ in requests}) == 100
    for text, fields in requests:
        assert len(fields["kwargs"]) == level
        end = next((arguments["end_phrase"] for arguments in fields["kwargs"] if "end_phrase" in arguments), "")
        row = to_row("i", text, "instructions", "instructions", level, **fields)
        assert score_one(verifier, row, f"aaaeeeooosssttt_{end}")["fraction"] == 1, text
        assert score_one(verifier, row, ", " + "x " * 20)["fraction"] == 0, text
