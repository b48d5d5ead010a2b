"""Conversations as text: rendered with the release's training template, one document for each turn of the assistant.

The part before the assistant's turn carries no loss, and the turn ends with its `<|im_end|>`, so a document is exactly
a prompt and its completion. `parse` is the inverse: the names of special tokens are in no message, so that turns are
found for certain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from stages.formats.tokenizer import SPECIAL_TOKENS, THINK_END, THINK_START, TURN_END, TURN_START, training_template

if TYPE_CHECKING:
    import jinja2
    from jinja2.parser import Parser

# Parts that a conversation may have: a message of the system, tools, and reasoning.
FEATURES = ("system", "tools", "reasoning")
# The template's texts around the tools in the system turn.
TOOLS_BEGIN, TOOLS_END = "These tools can be called:\n<tools>\n", "</tools>\n"
# A call of a tool, as Hermes and Qwen write it.
CALL_TEXT = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
# The template's text before an answer.
BEGIN = f"{TURN_START}assistant\n"
MARK = "\0"
SPECIAL = re.compile(f"({'|'.join(map(re.escape, SPECIAL_TOKENS))})")
ROLES = ("system", "user", "assistant", "tool")
# `role`, `content` and, for the assistant, optionally `reasoning_content`, all text, and `tool_calls`: a list of
# calls with `name` and `arguments`, or with both in `function`.
Message = Mapping[str, Any]
CALL_BEGIN, CALL_END = '<tool_call>\n{"name": ', "}\n</tool_call>"
# {field of a message: its Arrow type}, besides `tool_calls`.
MESSAGE = {"role": "string", "content": "string", "reasoning_content": "string"}


@cache
def _template() -> jinja2.Template:
    # Imported here, since `atom plan` imports this module and renders nothing.
    import jinja2
    from jinja2.ext import Extension

    class Generation(Extension):
        """`{% generation %}` marks the assistant's tokens for training libraries; here it only groups."""

        tags = {"generation"}  # noqa: RUF012  as the base class has it

        def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.Environment(extensions=[Generation], autoescape=False)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # as transformers has it
    return environment.from_string(training_template())


def render(messages: Sequence[Message], ask: bool = False, tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """Returns the messages in the release's chat template; `ask` adds the beginning of an answer.

    `tools` are the JSON schemas of the functions that may be called.
    """
    return _template().render(messages=messages, add_generation_prompt=ask, tools=tools)


def after_calls(results: Sequence[str]) -> list[str]:
    """Returns the template's text between a turn of the assistant that calls tools and its next one, in pieces.

    The text contains the results of the calls.
    """
    before = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    # Only the difference to the turn before is wanted, which the template decides.
    turn = render(before)
    turn = turn[: turn.rindex(TURN_END) + len(TURN_END)]
    text = render([*before, *({"role": "tool", "content": MARK} for _ in results)], ask=True).removeprefix(turn)
    return _pieces(text, results)


def question_pieces(messages: Sequence[Message]) -> list[str]:
    """Returns the template's text up to the answer to messages, of which the last is the user's, in pieces."""
    contents = [str(message["content"]) for message in messages]
    return _pieces(render([{"role": m["role"], "content": MARK} for m in messages], ask=True), contents)


def _pieces(text: str, contents: Sequence[str]) -> list[str]:
    """Returns the pieces of a text of the template, in which a MARK stands for each content.

    Each special token of the template is a piece of its own. A content that holds the name of a special token stands in
    a piece with other text, so an encoder of pieces can tell both.
    """
    remaining = iter(contents)
    pieces = SPECIAL.split(text)
    filled = (re.sub(MARK, lambda _: next(remaining), piece) for piece in pieces)
    return [piece for piece in filled if piece]


def without_calls(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages without calls of tools."""
    return [{name: value for name, value in message.items() if name != "tool_calls"} for message in messages]


def turns(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> Iterator[tuple[str, int]]:
    """Yields (text, number of leading characters without loss) of each turn of the assistant, with all earlier turns.

    Reasoning from before the last message of the user is missing, since the template drops it. `tools` are the JSON
    schemas of the tools that the conversation offers; if it is None, calls of tools are left out.

    Raises ValueError in words if the messages are not a conversation, or contain the name of a special token, which
    training could not distinguish from the token.
    """
    check(messages, calls=tools is not None)
    check_tools(tools or ())
    messages = without_calls(messages) if tools is None else messages
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no message is the assistant's")
    for i in answers:
        # The template drops earlier reasoning, so each turn is rendered with its own history.
        rendered = render(messages[: i + 1], tools=tools or ())
        text = rendered[: rendered.rindex(TURN_END) + len(TURN_END)]
        yield text, prompt_chars(text)


def features(text: str) -> list[str]:
    """Returns the FEATURES of a document that `turns` made."""
    opening, _, _ = text.partition(TURN_END)
    is_system = opening.startswith(f"{TURN_START}system\n")
    message, tools, _ = opening.removeprefix(f"{TURN_START}system\n").partition(TOOLS_BEGIN)
    present = is_system and bool(message.strip()), is_system and bool(tools), THINK_START in text
    return [name for name, is_present in zip(FEATURES, present, strict=True) if is_present]


def prompt_chars(text: str) -> int:
    """Returns the number of leading characters without loss of a document that `turns` made."""
    return text.rindex(BEGIN) + len(BEGIN)


def check(messages: Sequence[Message], calls: bool = False) -> None:
    """Raises ValueError in words if the messages are not a conversation.

    If `calls`, the assistant may call tools, also without a text.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("there is no list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(f"a message has no role of {', '.join(ROLES)}")
        tool_calls = (message.get("tool_calls") or []) if calls and message["role"] == "assistant" else []
        content = message.get("content")
        # A message that only calls tools may have no content.
        parts = [content if content is not None or not tool_calls else "", message.get("reasoning_content") or ""]
        if not isinstance(tool_calls, list) or not all(map(_is_call, tool_calls)):
            raise ValueError("a message of the assistant has calls without name and arguments")
        for part in [*parts, json.dumps(tool_calls, ensure_ascii=False)]:
            if not isinstance(part, str):
                raise ValueError(f"a message of the {message['role']} has no text")
            if special_token := _special_token(part):
                raise ValueError(f"a message of the {message['role']} holds {special_token}")


def control_tokens(text: str) -> list[str]:
    """Returns the special tokens whose names are in a text, in their order."""
    return SPECIAL.findall(text)


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError in words for JSON schemas that contain the name of a special token."""
    if special_token := _special_token(json.dumps(tools, ensure_ascii=False, default=str)):
        raise ValueError(f"a tool holds {special_token}")


def _special_token(text: str) -> str | None:
    """Returns a special token whose name is in the text, if any."""
    return next((token for token in SPECIAL_TOKENS if token in text), None)


def _is_call(call: Any) -> bool:
    """Returns True for a call of a tool, with arguments as an object or as its JSON."""
    call = call.get("function") or call if isinstance(call, Mapping) else {}
    arguments = call.get("arguments") if isinstance(call, Mapping) else None
    try:
        arguments = json.loads(arguments if isinstance(arguments, str) else json.dumps(arguments))
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(arguments, Mapping) and isinstance(call.get("name"), str)


class MessagesRow(TypedDict):
    """A conversation as messages."""

    id: Annotated[str, "string"]
    """id of the document"""
    license: Annotated[str, "string"]
    """license of the document"""
    messages: list[dict[str, Any]]
    """messages of the conversation"""
    tools: Annotated[str | None, "string"]
    """JSON of the list of schemas; null without tools"""


def arrow_schema() -> Any:
    """Returns the schema of a table of MessagesRow.

    Arguments of a call are their JSON, because those of two tools differ.
    """
    import pyarrow as pa

    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    calls = pa.list_(pa.struct([("type", pa.string()), ("function", function)]))
    message = pa.struct([*((name, pa.string()) for name in MESSAGE), ("tool_calls", calls)])
    return pa.schema(
        [("id", pa.string()), ("license", pa.string()), ("messages", pa.list_(message)), ("tools", pa.string())]
    )


def parse(text: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Returns (messages, schemas of tools) of a text that `turns` made.

    Raises ValueError if the template does not render them to the same text.
    """
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
    # A text that does not render to itself would be published as another conversation than was trained on.
    if not messages or render(messages, tools=tools).removesuffix("\n") != text:
        raise ValueError("its text is no conversation in the chat template")
    return messages, tools


def _answer(content: str) -> dict[str, Any]:
    """Returns the fields of a turn of the assistant."""
    fields: dict[str, Any] = {}
    if content.startswith(f"{THINK_START}\n") and f"\n{THINK_END}\n\n" in content:
        reasoning, _, content = content.removeprefix(f"{THINK_START}\n").partition(f"\n{THINK_END}\n\n")
        fields["reasoning_content"] = reasoning
    calls: list[dict[str, Any]] = []
    # Calls stand at the end of a turn, so the last one is taken off first.
    while content.endswith(CALL_END) and CALL_BEGIN in content:
        before, _, call = content.removesuffix(CALL_END).rpartition(CALL_BEGIN)
        name, end = json.JSONDecoder().raw_decode(call)
        arguments = call[end:].removeprefix(', "arguments": ')
        calls.insert(0, {"type": "function", "function": {"name": name, "arguments": arguments}})
        content = before.removesuffix("\n")
    if calls:
        fields["tool_calls"] = calls
    return {"content": content, **fields}
