"""Conversations from their text."""

from __future__ import annotations

from typing import Any

import pytest

from stages.formats import chat

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASK, ANSWER = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CASES: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
    "one turn": ([ASK, ANSWER], []),
    "a system prompt": ([{"role": "system", "content": "Be brief."}, ASK, ANSWER], []),
    "two turns": ([ASK, ANSWER, {"role": "user", "content": ""}, {"role": "assistant", "content": "\nyes\n\n"}], []),
    "reasoning": ([ASK, {**ANSWER, "reasoning_content": "two\nand two"}], []),
    "text that looks like markup": (
        [
            {"role": "user", "content": "<tool_call>\n{} These tools can be called:\n<tools>\n"},
            {"role": "assistant", "content": '</tool_call> {"name": 1}'},
        ],
        [],
    ),
    "tools, and none called": ([ASK, ANSWER], [TOOL]),
    "a system prompt, two calls and their results": (
        [
            {"role": "system", "content": "Be brief.\n"},
            ASK,
            {
                "role": "assistant",
                "content": "Let me see.",
                "reasoning_content": "add",
                "tool_calls": [call("add", '{"a": 2, "b": "}\\n"}'), call('a "name"', "{}")],
            },
            {"role": "tool", "content": "4"},
            {"role": "tool", "content": "-"},
            ANSWER,
        ],
        [TOOL, TOOL],
    ),
    "a call alone": ([ASK, {"role": "assistant", "content": "", "tool_calls": [call("add", "{}")]}], [TOOL]),
}


@pytest.mark.parametrize("name", CASES)
def test_messages_are_those_that_were_rendered(name: str) -> None:
    messages, tools = CASES[name]
    texts = [text for text, _ in chat.turns(messages, tools)]
    parsed = [chat.parse(text) for text in texts]
    assert parsed[-1] == (messages, tools)
    assert [len(turns) for turns, _ in parsed] == [n + 1 for n, m in enumerate(messages) if m["role"] == "assistant"]


@pytest.mark.parametrize(
    "text", ["", "no conversation", "<|im_start|>user\nhi", "<|im_start|>user\nhi<|im_end|>\nmore"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no conversation in the chat template"):
        chat.parse(text)
