"""Tasks as rows in NeMo Gym's format: how one is written, its bin and its question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# A task in its stored and published form, NeMo Gym's row format: `responses_create_params` with the messages of
# `input`, and the verifier's own fields beside it; plus `id`, `verifier` (its name), `kind` and `level`.
Row = Mapping[str, Any]


def to_row(
    id: str, prompt: str | Sequence[Mapping[str, str]], /, verifier: str, kind: str, level: int, **fields: Any
) -> dict[str, Any]:
    """Returns a task in NeMo Gym's row format.

    `prompt` is the user's question, or the messages up to it. `fields` are the verifier's own; one may also be called
    `prompt`.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    params = {"input": messages}
    return {"id": id, "responses_create_params": params, "verifier": verifier, "kind": kind, "level": level, **fields}


def bin_of(row: Row) -> str:
    """Returns the bin of tasks of one kind and level that a task belongs to."""
    return f"{row['kind']}/{row['level']}"


def right_answer(row: Row) -> str | None:
    """Returns the right answer that a row states, if any."""
    gold = row.get("expected_answer", row.get("answer"))
    return None if gold is None else str(gold)


def messages_of(row: Row) -> Sequence[Mapping[str, Any]]:
    """Returns the messages up to the answer, of which the last is the user's."""
    messages: Sequence[Mapping[str, Any]] = row["responses_create_params"]["input"]
    return messages


def contents(row: Row) -> list[str]:
    """Returns the texts of all messages up to the answer."""
    return [str(message["content"]) for message in messages_of(row)]


def question(row: Row) -> str:
    """Returns the user's question: the content of the last message."""
    return str(messages_of(row)[-1]["content"])
