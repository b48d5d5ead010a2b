"""The messages of a conversation from its text, the inverse of rendering it: the names of special tokens stand in no
message, so that turns are found for certain."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypedDict

from stages.formats.chat_templates import TOOLS_BEGIN, TOOLS_END
from stages.formats.tokenizer import THINK_END, THINK_START, TURN_END, TURN_START

CALL_BEGIN, CALL_END = '<tool_call>\n{"name": ', "}\n</tool_call>"
MESSAGE = {"role": "string", "content": "string", "reasoning_content": "string"}
"""{field of a message: its Arrow type}, besides `tool_calls`."""


class MessagesRow(TypedDict):
    """A conversation. tools: the JSON of a list of schemas, None without tools."""

    id: Annotated[str, "string"]
    license: Annotated[str, "string"]
    messages: list[dict[str, Any]]
    tools: Annotated[str | None, "string"]


def arrow_schema() -> Any:
    """The schema of a table of MessagesRow. Arguments of a call are their JSON, because those of two tools differ."""
    import pyarrow as pa

    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    calls = pa.list_(pa.struct([("type", pa.string()), ("function", function)]))
    message = pa.struct([*((name, pa.string()) for name in MESSAGE), ("tool_calls", calls)])
    return pa.schema(
        [("id", pa.string()), ("license", pa.string()), ("messages", pa.list_(message)), ("tools", pa.string())]
    )


def parse(text: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """(messages, schemas of tools) of a text that `chat.turns` made.

    Raises ValueError if the template does not render them to the same text.
    """
    from stages.formats import chat

    messages, tools = [], []
    for number, turn in enumerate(text.split(TURN_START)[1:]):
        role, _, body = turn.partition("\n")
        content = body.removesuffix("\n").removesuffix(TURN_END)
        message: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant":
            message = {"role": role, **_answer(content)}
        elif number == 0 and role == "system" and TOOLS_BEGIN in content:
            stated, _, listed = content.rpartition(TOOLS_BEGIN)
            tools = [json.loads(line) for line in listed.partition(TOOLS_END)[0].splitlines()]
            if not stated:
                continue
            message["content"] = stated.removesuffix("\n\n")
        messages.append(message)
    if not messages or chat.render(messages, tools=tools).removesuffix("\n") != text:
        raise ValueError("its text is no conversation in the chat template")
    return messages, tools


def _answer(content: str) -> dict[str, Any]:
    """The fields of a turn of the assistant."""
    fields: dict[str, Any] = {}
    if content.startswith(f"{THINK_START}\n") and f"\n{THINK_END}\n\n" in content:
        reasoning, _, content = content.removeprefix(f"{THINK_START}\n").partition(f"\n{THINK_END}\n\n")
        fields["reasoning_content"] = reasoning
    calls: list[dict[str, Any]] = []
    while content.endswith(CALL_END) and CALL_BEGIN in content:
        before, _, call = content.removesuffix(CALL_END).rpartition(CALL_BEGIN)
        name, end = json.JSONDecoder().raw_decode(call)
        arguments = call[end:].removeprefix(', "arguments": ')
        calls.insert(0, {"type": "function", "function": {"name": name, "arguments": arguments}})
        content = before.removesuffix("\n")
    if calls:
        fields["tool_calls"] = calls
    return {"content": content, **fields}
