"""Conversations whose rendering a release records and any runtime can be compared with.

load_check.py loads this file by its path. Each row has `messages`, `tools` (null: none), `add_generation_prompt` and
`enable_thinking` (null: not given).
"""

from __future__ import annotations

from typing import Any

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "the <weather> of a city, in 'words' & numbers: météo",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "the time", "parameters": {"type": "object", "properties": {}}},
    },
]
"""With the fields in the order of OpenAI's documentation: llama.cpp brings them into it."""
CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
CALLED = {"id": "call-2", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def _row(
    messages: list[dict[str, Any]], tools: Any = None, ask: bool = True, thinking: bool | None = None
) -> dict[str, Any]:
    return {"messages": messages, "tools": tools, "add_generation_prompt": ask, "enable_thinking": thinking}


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS: list[dict[str, Any]] = [
    _row([_user("What is 216+840?")]),
    _row([SYSTEM, _user("What is 216+840?")], thinking=True),
    _row([{"role": "developer", "content": "Be kind."}, _user("Hello")], thinking=False),
    # reasoning of earlier turns is dropped, in each of its forms
    _row(
        [
            SYSTEM,
            _user("a"),
            _assistant("b", reasoning_content="first\n"),
            _user("c"),
            _assistant("d", reasoning_content="\nsecond"),
        ],
        ask=False,
    ),
    _row([_user("a"), _assistant("<think>\nearlier\n</think>\n\nb"), _user("c")], thinking=False),
    _row([_user("a"), _assistant("<think>\nthis\n</think>\n\nb", reasoning_content="")], ask=False),
    # calls: without a text, after a text, several, with arguments as JSON; results as texts and parts
    _row(
        [
            _user("a"),
            _assistant(None, reasoning_content="why", tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "call-1", "content": 'rain, "9" °C'},
        ],
        TOOLS,
    ),
    _row(
        [
            SYSTEM,
            _user("a"),
            _assistant("Let me see.", tool_calls=[CALL, CALLED]),
            {"role": "tool", "tool_call_id": "call-1", "content": "snow"},
            {"role": "tool", "tool_call_id": "call-2", "content": [_part("12"), _part("30")]},
            _assistant("It snows.", reasoning_content="snow it is"),
        ],
        TOOLS,
        ask=False,
    ),
    _row(
        [
            _user("a"),
            _assistant("", tool_calls=[CALLED]),
            {"role": "tool", "content": "12:30"},
            _assistant("Noon."),
            _user("And now?"),
        ],
        TOOLS[1:],
    ),
    # content as parts, and null
    _row([{"role": "system", "content": [_part("Be"), _part("brief.")]}, _user([_part("216+840"), _part("")])], TOOLS),
    _row([{"role": "system", "content": ""}, _user("a"), _assistant(None), _user("b")]),
    # what tokenizers and templates trip over; a system message in the middle
    _row(
        [
            _user("  it's 1234567\n\n\tdef f(x):\r\n  return '漢字 🎉 e\u0301' {{ x }} {% if %} <b>&amp;\\n\n"),
            _assistant("x "),
            {"role": "system", "content": "late"},
            _user("\n"),
        ]
    ),
]
