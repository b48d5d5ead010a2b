"""Models that converse, in this process or on a server, and their answers as they arrive. No torch at import."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.core.errors import AtomError
from pipeline.core.text import printable
from stages.formats.chat import CALL_TEXT, Message
from stages.formats.tokenizer import THINK_END, THINK_START

# What begins a call of a tool.
CALL_START = "<tool_call>"
# Seconds without a byte after which a server counts as lost; a long prompt takes some until its first token.
SILENT_SECONDS = 300
# {reason of OpenAI's API: that of a reply}; any other is kept as it is.
REASONS = {"stop": "end", "tool_calls": "end", "length": "limit"}
# The errors of reading something else than the JSON that was expected.
OTHER_JSON = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError)
# Bytes of a line of a server, and of all its lines.
MOST_LINE, MOST_BYTES = 1 << 20, 1 << 26


@dataclass(frozen=True)
class ChatSampling:
    """Settings of the drawing of an answer. The names are those of OpenAI's API.

    Attributes:
        temperature: Temperature of sampling; 0 takes the likeliest token each time.
        max_tokens: Maximum number of tokens of the answer, its thinking included; None for as many as fit.
        seed: Seed of the answer.
        tools: The JSON schemas of the functions that may be called; None for none.
    """

    temperature: float = 0.0
    max_tokens: int | None = None
    seed: int = 0
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass
class Reply:
    """An answer as it arrives.

    Attributes:
        show: Is called after each piece.
        with_tools: True if the model may call tools: its calls are then no part of the answer.
        text: What the model has written, with its thinking between `<think>` and `</think>` at the beginning.
        tokens: The number of tokens so far. A server that does not count them is counted in pieces of its stream.
        stopped: `end` if the model ended the answer, `limit` at the maximum number of tokens, `context` at the end of
            the model's context; "" until then.
        parsed_calls: Calls that a server has found itself, in the form of OpenAI's API.
    """

    show: Callable[[Reply], None] = lambda reply: None
    with_tools: bool = False
    text: str = ""
    tokens: int = 0
    stopped: str = ""
    parsed_calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Takes the next piece of text."""
        self.text += text
        self.tokens += 1
        self.show(self)

    @property
    def thinking(self) -> str:
        """The text of the thinking, without the marks."""
        return self._parts()[0]

    @property
    def answer(self) -> str:
        """The text after the thinking."""
        text = self._parts()[1]
        if not self.with_tools:
            return text
        text = text.partition(CALL_START)[0]
        # The mark of a call may arrive in pieces.
        begun = next((n for n in range(len(CALL_START) - 1, 0, -1) if text.endswith(CALL_START[:n])), 0)
        return text if self.stopped else text.removesuffix(CALL_START[:begun])

    @property
    def calls(self) -> list[str]:
        """The text of each call of a tool, in JSON if the model wrote it well."""
        functions = [call["function"] for call in self.parsed_calls]
        parsed = [f'{{"name": {json.dumps(f["name"])}, "arguments": {f["arguments"] or "{}"}}}' for f in functions]
        return parsed or [call.strip() for call in CALL_TEXT.findall(self._parts()[1])]

    def turns(self, results: Sequence[str]) -> list[Message]:
        """Returns the messages of this turn and of the results of its calls."""
        # Every call of a message needs its result.
        if parsed := self.parsed_calls[: len(results)]:
            turn: Message = {"role": "assistant", "content": self.answer, "tool_calls": parsed}
        else:
            thinking, content = self._parts()
            # A template keeps the thinking of an answer that goes on.
            turn = {"role": "assistant", "content": content} | ({"reasoning_content": thinking} if thinking else {})
        ids = [call["id"] for call in self.parsed_calls] or map(str, range(len(results)))
        return [
            turn,
            *({"role": "tool", "tool_call_id": id, "content": text} for id, text in zip(ids, results, strict=False)),
        ]

    def _parts(self) -> tuple[str, str]:
        text = self.text.lstrip()
        if not text.startswith(THINK_START):
            # A mark may arrive in pieces.
            return "", "" if not self.stopped and THINK_START.startswith(text) else text
        thinking, _, answer = text.removeprefix(THINK_START).partition(THINK_END)
        return thinking.strip(), answer.lstrip()


class ChatModel(Protocol):
    """A model that answers conversations.

    Attributes:
        description: Its size, or its name on a server.
    """

    description: str

    def respond(self, messages: Sequence[Message], sampling: ChatSampling, reply: Reply) -> None:
        """Fills `reply` with the answer to a conversation. Raises AtomError if it cannot be answered."""


class InProcessChat:
    """A model in a folder, in plain transformers on the CPU, in the type of its files.

    Sampling cuts nothing off the distribution, as in training and evaluation.
    """

    def __init__(self, folder: Path) -> None:
        """Loads the model. Raises AtomError if it cannot be loaded or has no chat template."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from stages.generation.in_process import LibraryDecoder

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True, **local).eval()
            self.context = model.config.get_text_config().max_position_embeddings
        except Exception as error:  # a loader of a stranger's files can raise anything
            raise AtomError(f"transformers does not load the model in {folder}: {printable(str(error))}") from None
        if not self.tokenizer.chat_template:
            raise AtomError(f"{folder} has no chat template: its model continues texts, and does not converse")
        self.decoder = LibraryDecoder(model.requires_grad_(False))
        stops = model.generation_config.eos_token_id
        self.stops = stops if isinstance(stops, list) else [stops]
        self.description = f"{model.num_parameters():,} parameters, a context of {self.context:,} tokens"

    def respond(self, messages: Sequence[Message], sampling: ChatSampling, reply: Reply) -> None:
        import torch
        from jinja2 import TemplateError
        from tokenizers.decoders import DecodeStream

        for token in self.tokenizer.all_special_tokens:
            if any(token in message["content"] for message in messages if message["role"] != "tool"):
                raise AtomError(f"{token} is a mark of the model's template; leave it out, or begin a new conversation")
        try:
            prompt = self.tokenizer.apply_chat_template(
                [self._plain(message) for message in messages],
                tools=sampling.tools,
                add_generation_prompt=True,
                return_dict=True,
            )
        except TemplateError as error:
            raise AtomError(f"the model's template refuses this conversation: {printable(str(error))}") from None
        ids = tuple(prompt["input_ids"])
        room = self.context - len(ids)
        if room < 1:
            raise AtomError(
                f"the conversation has {len(ids)} tokens, and the model's context is {self.context}; begin a new one"
            )
        # Some templates open the thinking themselves.
        if self.tokenizer.decode(ids[-4:]).rstrip().endswith(THINK_START):
            reply.text = THINK_START
        generator = torch.Generator().manual_seed(sampling.seed)
        # It holds back the bytes of a character that is not complete.
        stream = DecodeStream(skip_special_tokens=True)
        logits = self.decoder.read([ids], room)
        for left in range(min(room, sampling.max_tokens or room), 0, -1):
            if sampling.temperature:
                token = torch.multinomial((logits[0] / sampling.temperature).softmax(-1), 1, generator=generator)
            else:
                token = logits.argmax(-1)
            reply.add(stream.step(self.tokenizer.backend_tokenizer, int(token)) or "")
            if int(token) in self.stops:
                reply.stopped = "end"
                return
            if left > 1:
                logits = self.decoder.step(token)
        reply.stopped = "limit" if reply.tokens < room else "context"

    def _plain(self, message: Message) -> Message:
        """Returns a message in which no result of a tool has a mark of the template: a blank divides each."""
        content = message["content"]
        for token in self.tokenizer.all_special_tokens if message["role"] == "tool" else ():
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return {**message, "content": content}


class ServedChat:
    """A model on a server that speaks OpenAI's API, as vLLM and llama.cpp do. OPENAI_API_KEY is sent to it."""

    def __init__(self, url: str, model: str | None) -> None:
        """Finds the model; by default the only one. Raises AtomError if the server does not list it."""
        self.url = url.rstrip("/")
        listing = b"".join(self._lines("/models"))
        try:
            models = [str(row["id"]) for row in json.loads(listing)["data"]]
        except OTHER_JSON:
            raise AtomError(f"{self.url} lists no models, but sends {_quoted(listing)}; a URL ends in /v1") from None
        chosen = [name for name in models if model in (None, name)]
        if len(chosen) != 1:
            raise AtomError(f"give --model, one of those of {self.url}: {printable(', '.join(models))}")
        self.model, self.description = chosen[0], printable(chosen[0])

    def respond(self, messages: Sequence[Message], sampling: ChatSampling, reply: Reply) -> None:
        # A server has its own default for what is left out.
        body = {name: value for name, value in asdict(sampling).items() if value is not None}
        body |= {"model": self.model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        stopped, is_thinking = "", False
        for line in self._lines("/chat/completions", body):
            data = line.removeprefix(b"data:").strip()
            # Other lines are comments that keep the connection open, or separate events.
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            try:
                event = json.loads(data)
                for choice in event["choices"]:
                    # Servers that parse the thinking send it apart, under one of two names.
                    delta = choice["delta"]
                    if thinking := delta.get("reasoning") or delta.get("reasoning_content"):
                        reply.add(thinking if is_thinking else THINK_START + thinking)
                        is_thinking = True
                    if content := delta.get("content"):
                        reply.add(THINK_END + content if is_thinking else content)
                        is_thinking = False
                    for piece in (delta.get("tool_calls") or ()) if sampling.tools else ():
                        _add_call(reply.parsed_calls, piece)
                    stopped = str(choice.get("finish_reason") or stopped)
                reply.tokens = int((event.get("usage") or {}).get("completion_tokens", reply.tokens))
            except OTHER_JSON:
                raise AtomError(f"{self.url} streams no answer, but {_quoted(data)}") from None
        if not stopped:
            raise AtomError(f"{self.url} ended its stream in the middle of an answer")
        reply.stopped = REASONS.get(stopped, stopped)

    def _lines(self, path: str, body: Any = None) -> Iterator[bytes]:
        """Yields the lines of an answer as they arrive. Raises AtomError if the server refuses or goes away."""
        headers, total = {"Content-Type": "application/json"}, 0
        try:
            request = urllib.request.Request(self.url + path, body and json.dumps(body).encode(), headers)
            if key := os.environ.get("OPENAI_API_KEY"):
                # A redirect to another host must not get it.
                request.add_unredirected_header("Authorization", f"Bearer {key}")
            with urllib.request.urlopen(request, timeout=SILENT_SECONDS) as answer:
                while line := answer.readline(MOST_LINE):
                    total += len(line)
                    if total > MOST_BYTES or (len(line) == MOST_LINE and not line.endswith(b"\n")):
                        raise ValueError(f"it sends more than {MOST_BYTES:,} bytes, or {MOST_LINE:,} in a line")
                    yield line
        except urllib.error.HTTPError as error:
            raise AtomError(f"{self.url} refuses with status {error.code}: {_quoted(error.read(2000))}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise AtomError(f"no server answers at {self.url}: {printable(str(error))}") from None


def _add_call(calls: list[dict[str, Any]], piece: Mapping[str, Any]) -> None:
    """Adds a piece of a call that a server streams: the first has its name, all have some of its arguments."""
    number, function = piece.get("index"), piece["function"]
    if number is None:  # a server that sends whole calls may leave it out
        number = len(calls)
    if number == len(calls):
        empty = {"name": "", "arguments": ""}
        calls.append({"id": str(piece.get("id") or number), "type": "function", "function": empty})
    for key in ("name", "arguments"):
        calls[number]["function"][key] += str(function.get(key) or "")


def _quoted(data: bytes) -> str:
    """Returns what a server sent, for a sentence: the message of an error in JSON, or else all of it."""
    try:
        return printable(str(json.loads(data)["error"]["message"]))
    except OTHER_JSON:
        return printable(data.decode(errors="replace"))
