"""What a real vLLM server makes of chat template and tokenizer: the token ids of transformers, and the fields of answers
that a small model has learned by heart, whole and streamed.

vLLM wants an environment of its own: `make test-vllm` makes one and names its interpreter in ATOM_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.core.errors import AtomError
from release.facts.model_facts import serve_config
from stages.generation.vllm_server import CPU_OPTIONS, Server
from tests.fixtures import taught_fixtures
from tests.fixtures.conversation_fixtures import CONVERSATIONS
from tests.fixtures.taught_fixtures import LESSONS

PYTHON = os.environ.get("ATOM_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="vLLM needs an environment of its own; see `make test-vllm`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught") / "model"
    taught_fixtures.save(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """With the parsers that serve.yaml of a release names."""
    lines = serve_config(folder, "local/taught", "0.1.0").splitlines()
    options = dict(line.split(": ", 1) for line in lines if "parser" in line or "tool-choice" in line)
    assert options.pop("enable-auto-tool-choice") == "true" and len(options) == 2
    parsers = [f"--{name}={value}" for name, value in options.items()]
    command = [str(PYTHON), "-P", "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}", "--dtype=float32"]
    server = Server.local(
        lambda _, port: [*command, *parsers, "--enable-auto-tool-choice", *CPU_OPTIONS, "--host=127.0.0.1", f"--port={port}"],
        folder, folder.parent / "vllm.log", {},
    )  # fmt: skip
    try:
        server.wait(500)
        yield server
    finally:
        server.close()


def as_request(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the form of OpenAI's API, with vLLM's name for reasoning."""
    message = {"reasoning" if name == "reasoning_content" else name: value for name, value in message.items()}
    if "tool_calls" in message:
        calls = [{**call, "function": dict(call["function"])} for call in message["tool_calls"]]
        for call in calls:
            if not isinstance(arguments := call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(arguments)
        message["tool_calls"] = calls
    return message


def without_empty_parts(message: dict[str, Any]) -> dict[str, Any]:
    """vLLM drops a part without text, where transformers' rendering has an empty line."""
    if isinstance(content := message["content"], list):
        return {**message, "content": [part for part in content if part["text"]]}
    return message


def test_prompts_have_the_ids_of_transformers(folder: Path, server: Server) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    for row in CONVERSATIONS:
        thinking = {} if row["enable_thinking"] is None else {"enable_thinking": row["enable_thinking"]}
        options = {"tools": row["tools"], "add_generation_prompt": row["add_generation_prompt"]}
        given = [without_empty_parts(message) for message in row["messages"]]
        expected = loaded.apply_chat_template(given, return_dict=True, **options, **thinking)["input_ids"]
        messages = [as_request(message) for message in given]
        body = {"messages": messages, **options, "chat_template_kwargs": thinking}
        assert server.post("/tokenize", body)["tokens"] == expected, row


def fields_of(message: dict[str, Any]) -> dict[str, Any]:
    """The fields of an answer that are not empty."""
    fields = {name: message.get(name) for name in ("reasoning", "content")}
    calls = [call["function"] for call in message.get("tool_calls") or []]
    fields["tool_calls"] = [(call["name"], json.loads(call["arguments"])) for call in calls]
    return {name: value for name, value in fields.items() if value}


def streamed(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """The message that the pieces of a streamed answer make."""
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps({**body, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    message: dict[str, Any] = {"reasoning": "", "content": "", "tool_calls": []}
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                piece = choice["delta"]
                for name in ("reasoning", "content"):
                    message[name] += piece.get(name) or ""
                for call in piece.get("tool_calls") or []:
                    while len(message["tool_calls"]) <= call["index"]:
                        message["tool_calls"].append({"function": {"name": "", "arguments": ""}})
                    function = message["tool_calls"][call["index"]]["function"]
                    for name in function:
                        function[name] += call["function"].get(name) or ""
    return message


@pytest.mark.parametrize("name", LESSONS)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_come_in_their_fields(folder: Path, server: Server, name: str, stream: bool) -> None:
    lesson = LESSONS[name]
    body = {"model": str(folder), "temperature": 0, "max_tokens": 200, **lesson.request}
    if stream:
        message = streamed(server, body)
    else:
        (choice,) = server.post("/v1/chat/completions", body)["choices"]
        message = choice["message"]
        assert choice["finish_reason"] == ("tool_calls" if "tool_calls" in lesson.fields else "stop")
    assert fields_of(message) == lesson.fields


def test_without_parsers_the_markers_are_in_the_text(folder: Path, server: Server) -> None:
    """Default decoding keeps them: `/v1/completions` parses nothing."""
    lesson = LESSONS["reasoning"]
    body = {"model": str(folder), "prompt": taught_fixtures.prompt(lesson.request), "temperature": 0, "max_tokens": 99}
    (choice,) = server.post("/v1/completions", body)["choices"]
    assert choice["text"] == lesson.answer


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [PICTURE]}]},
        {**LESSONS["call"].request, "tool_choice": "required"},
        {**LESSONS["call"].request, "parallel_tool_calls": False},
    ],
)
def test_what_it_cannot_do_is_refused(folder: Path, server: Server, body: dict[str, Any]) -> None:
    with pytest.raises(AtomError, match="refuses /v1/chat/completions: 400"):
        server.post("/v1/chat/completions", {"model": str(folder), "max_tokens": 9, **body})
