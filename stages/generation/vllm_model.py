"""A language model of a vLLM server, which the stage starts on its own node.

It gives log-probabilities of given tokens (vLLM's `prompt_logprobs`), greedy continuations, and drawn answers.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch

from pipeline.core.errors import AtomError
from stages.formats.tokenizer import END
from stages.generation.engine import SETTING, Engine, LanguageModel
from stages.generation.protocols import AnswerGenerator, Completion, Prompt
from stages.generation.vllm_server import (
    CPU_OPTIONS,
    GENERATE,
    IN_FLIGHT,
    START_SECONDS,
    TOKENS_AT_ONCE,
    Server,
    entry_point,
    in_parallel,
    interpreter,
)

# Bytes of weights that a server must read in a second, lest it is given up.
SLOWEST_READ = 1e8

T = TypeVar("T")
R = TypeVar("R")


class Read(NamedTuple):
    """A given token: its log-probability (natural) after those before it, its rank from 1, and the likeliest token."""

    logprob: float
    rank: int
    likeliest: int


def config_of(folder: Path) -> dict[str, Any]:
    """Returns the entries of config.json of the model in a folder.

    Those of a model that reads more than text have the entries of its text model too.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {**config, **config.get("text_config", {})}


def context_of(folder: Path) -> int:
    """Returns the tokens of the longest row that the model in a folder was made for."""
    return int(config_of(folder)["max_position_embeddings"])


def has_scaled_rope(folder: Path) -> bool:
    """Returns True if the rotary embedding of the model in a folder is scaled, and so ends with its context."""
    rope = config_of(folder).get("rope_parameters") or {}
    return bool(rope.get("rope_type", "default") != "default")


class Client:
    """A server of one exported model.

    Args:
        server: The server.
        context: Tokens of the longest row that the model was made for.
        longest: Tokens of the longest row that the server reads.
        setting: Setting of the recipe that chose the server.
    """

    def __init__(self, server: Server, context: int, longest: int, setting: str = SETTING) -> None:
        self.server, self.context, self.longest, self.setting = server, context, longest, setting

    @classmethod
    def start(cls, engine: Engine, folder: Path, work: Path, longest: int = 0, setting: str = SETTING) -> Self:
        """Starts a server and waits for it.

        Args:
            engine: Engine of the recipe, with a server's GPUs and options.
            folder: Folder of the exported model.
            work: Folder for the log of the server.
            longest: Tokens of the longest row that will be read. If that is more than the model's context, the rotary
                embedding extrapolates, as in transformers.
            setting: Setting of the recipe, for messages.

        Raises:
            AtomError: vLLM is missing, or a scaled embedding ends before `longest`.
            ServerLost: The server does not start.
        """
        config, context = config_of(folder), context_of(folder)
        if longest > context and has_scaled_rope(folder):
            raise AtomError(
                f"{setting}.kind = vllm cannot read {longest} tokens with the scaled rotary embedding of {folder}, "
                f"which ends at {context}; ask for shorter texts, or use kind = in-process"
            )
        longest = max(longest, context)
        settings: dict[str, Any] = {
            "model": folder.absolute(),
            "dtype": config.get("dtype") or config.get("torch_dtype") or "auto",
            "max-num-seqs": IN_FLIGHT,
            "logprobs-mode": "processed_logprobs",
            "generation-config": "vllm",
            "max-model-len": longest + 1,  # with the token that vLLM draws after each row
        }
        if longest > context:
            # Otherwise vLLM sizes the table of rotary positions by the model's own context.
            settings["hf-overrides"] = json.dumps({"max_position_embeddings": longest + 1})
        if on_gpu := torch.cuda.is_available():
            settings |= {"tensor-parallel-size": max(1, engine.gpus), "max-num-batched-tokens": TOKENS_AT_ONCE}
        run = entry_point(interpreter(setting), {**settings, "host": "127.0.0.1"})
        run += [*([] if on_gpu else CPU_OPTIONS), *engine.options]
        with tempfile.NamedTemporaryFile(prefix="vllm-", suffix=".log", dir=work, delete=False) as log:
            path = Path(log.name)  # shards of a stage share its work folder
        server = Server.local(
            lambda _, port: [*run, f"--port={port}"], folder, path, {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
        )
        try:
            weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            # A large model is read from a shared file system for longer than vLLM takes to start.
            server.wait(START_SECONDS + weights / SLOWEST_READ)
        except BaseException:
            server.close()
            raise
        return cls(server, context, longest, setting)

    def close(self) -> None:
        """Ends the server, and removes its log and its secret."""
        self.server.close()
        self.server.secret.unlink(missing_ok=True)
        if self.server.log is not None:
            self.server.log.unlink(missing_ok=True)

    def map(self, request: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Returns the results of requests to the server, in order."""
        return in_parallel(request, items, IN_FLIGHT)

    def read(self, ids: Sequence[int]) -> list[Read]:
        """Returns log-probability and rank of every token but the first."""
        self._require_room(ids)
        # vLLM always draws a token; only the log-probabilities of the prompt are read.
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1, "detokenize": False}
        answer = self.server.post(GENERATE, {"token_ids": list(ids), "sampling_params": sampling})
        reads = []
        try:
            _, *positions = answer["prompt_logprobs"]  # the first token has none
            for token, entries in zip(ids[1:], positions, strict=True):
                stated = entries[str(token)]
                # vLLM states the given token and the likeliest one, which may be the same.
                best = next(int(name) for name, entry in entries.items() if entry["rank"] == 1)
                reads.append(Read(float(stated["logprob"]), int(stated["rank"]), best))
        except (KeyError, TypeError, ValueError, StopIteration):
            raise self.server.incomplete(answer) from None
        return reads

    def draw(
        self, ids: Sequence[int], max_tokens: int, stops: Iterable[int], seed: int | None = None, **settings: float
    ) -> Completion:
        """Returns an answer at temperature 1 or by other settings, or greedily without a seed.

        It ends before the model's longest row does.
        """
        self._require_room(ids)
        sampling: dict[str, Any] = {
            "temperature": 0.0,
            "max_tokens": min(max_tokens, self.longest + 1 - len(ids)),
            "stop_token_ids": sorted(stops),
        }
        if seed is not None:
            sampling |= {"temperature": 1.0, "seed": seed % 2**63, **settings}
        answer = self.server.generate(ids, sampling)
        return Completion(answer.ids, answer.logprobs, answer.ids[-1] in set(stops))

    def _require_room(self, ids: Sequence[int]) -> None:
        if len(ids) > self.longest:
            raise AtomError(
                f"a row has {len(ids)} tokens, and the vLLM server reads at most {self.longest}; "
                f"shorten the texts, or use {self.setting}.kind = in-process"
            )


class ServedModel(LanguageModel):
    """The model of a server."""

    def __init__(self, client: Client, tokenizer: Any) -> None:
        self.client, self.context = client, client.context
        self.end = tokenizer.convert_tokens_to_ids(END)
        # Bits of a document's first token, by token.
        self.first: dict[int, float] = {}

    def bits(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[float]:
        # The bits of a document's first token are asked once for each token, and kept.
        firsts = sorted({ids[0] for ids, start in rows if ids and start == 0} - self.first.keys())
        answers = self.client.map(lambda token: _bits(self.client.read([self.end, token])), firsts)
        self.first |= zip(firsts, answers, strict=True)
        return self.client.map(lambda row: self._bits(*row), rows)

    def _bits(self, ids: Sequence[int], start: int) -> float:
        bits = self.first[ids[0]] if ids and start == 0 else 0.0
        start = max(start, 1)
        return bits + _bits(self.client.read(ids)[start - 1 :]) if len(ids) > start else bits

    def continue_greedily(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        answers = self.client.map(lambda ids: self.client.draw(ids, max_new_tokens, [self.end]).ids, prompts)
        # Without the end-of-document token, as transformers' answers are cut.
        return [[*ids[: ids.index(self.end)]] if self.end in ids else [*ids] for ids in answers]

    def likeliest(self, ids: Sequence[int], count: int) -> list[int]:
        return [read.likeliest for read in self.client.read(ids)[-count:]]

    def token_bits(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([-read.logprob for read in self.client.read(ids)], dtype=torch.float64) / math.log(2)

    def close(self) -> None:
        self.client.close()


def _bits(reads: Iterable[Read]) -> float:
    return -math.fsum(read.logprob for read in reads) / math.log(2)


class ServedSampler(AnswerGenerator):
    """Draws answers with a server.

    With equal seeds it draws equal tokens only up to rounding: the batches of requests depend on time.
    """

    def __init__(self, client: Client, stops: Sequence[int], max_new_tokens: int) -> None:
        self.client, self.stops, self.max_new_tokens = client, frozenset(stops), max_new_tokens

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        def draw(prompt: Prompt) -> Completion:
            return self.client.draw(prompt.ids, self.max_new_tokens, self.stops, None if greedy else prompt.seed)

        return self.client.map(draw, prompts)

    def close(self) -> None:
        self.client.close()
