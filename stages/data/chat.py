"""Conversations as text: rendered with the release's chat template, one document for each turn of the assistant.

The part before the assistant's turn carries no loss, and the turn ends with its `<|im_end|>`, so a document is exactly
a prompt and its completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.parser import Parser

from stages.data.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, TURN_END, TURN_START

BEGIN = f"{TURN_START}assistant\n"
"""The template's text before an answer."""
ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
"""`role`, `content` and, for the assistant, optionally `reasoning_content`, all text."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training libraries; here it only groups."""

    tags = {"generation"}  # noqa: RUF012  as the base class has it

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(extensions=[_Generation], autoescape=False)
    return environment.from_string(CHAT_TEMPLATE)


def render(messages: Sequence[Message], ask: bool = False) -> str:
    """The messages in the release's chat template; `ask` adds the beginning of an answer."""
    return _template().render(messages=messages, add_generation_prompt=ask)


def turns(messages: Sequence[Message]) -> Iterator[tuple[str, int]]:
    """(text, number of leading characters without loss) of each turn of the assistant, with all earlier turns.

    Raises ValueError in words if the messages are not a conversation, or contain the name of a special token, which
    training could not distinguish from the token.
    """
    check(messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no message is the assistant's")
    for i in answers:
        rendered = render(messages[: i + 1])
        text = rendered[: rendered.rindex(TURN_END) + len(TURN_END)]
        yield text, prompt_chars(text)


def prompt_chars(text: str) -> int:
    """The number of leading characters without loss of a document that `turns` made."""
    return text.rindex(BEGIN) + len(BEGIN)


def check(messages: Sequence[Message]) -> None:
    """Raises ValueError in words if the messages are not a conversation."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("there is no list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(f"a message has no role of {', '.join(ROLES)}")
        parts = [message.get("content"), message.get("reasoning_content") or ""]
        for part in parts:
            if not isinstance(part, str):
                raise ValueError(f"a message of the {message['role']} has no text")
            special_token = next((token for token in SPECIAL_TOKENS if token in part), None)
            if special_token:
                raise ValueError(f"a message of the {message['role']} holds {special_token}")
