"""datatrove's inference step with a model in this process, or behind a server that the stage starts.

datatrove's `InferenceRunner` hands each document to a rollout function, sends its request to a server and puts the
result into the document's metadata. Here the requests of a batch are answered together and in the order of its
documents, whatever the order in which they arrive, and documents stay in memory: the stage seals batches itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

from datatrove.data import Document
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.inference.types import ServerError

from stages.generation.protocols import AnswerGenerator, Completion, Prompt


@dataclass(frozen=True)
class Request:
    """A document by its id, and the prompt that is made from it."""

    id: str
    prompt: Prompt


class BatchServer:
    """In the place of a datatrove server: answers when all requests of a batch are there."""

    def __init__(self, model: AnswerGenerator, requests: Sequence[Request], greedy: bool) -> None:
        self.model, self.requests, self.greedy = model, requests, greedy
        self.waiting: dict[str, asyncio.Future[Completion]] = {}
        self.error: Exception | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Holds nothing."""

    async def make_request(self, payload: dict[str, Any]) -> dict[str, Any]:
        """A completion in the form of OpenAI's, with its token ids."""
        future = self.waiting[payload["id"]] = asyncio.get_running_loop().create_future()
        if len(self.waiting) == len(self.requests):
            self._answer()
        completion = await future
        reason = "stop" if completion.finished else "length"
        return {"choices": [{"text": completion, "finish_reason": reason}], "usage": {}}

    def _answer(self) -> None:
        try:
            completions = self.model.generate([request.prompt for request in self.requests], self.greedy)
        except Exception as error:  # each request would wait forever; `draw` raises it again
            self.error = error
            for future in self.waiting.values():
                future.set_exception(ServerError(error))
            return
        for request, completion in zip(self.requests, completions, strict=True):
            self.waiting[request.id].set_result(completion)


class BatchRunner(InferenceRunner):  # type: ignore[misc]
    """datatrove's step for one batch."""

    def __init__(self, server: BatchServer, generator: str) -> None:
        count = len(server.requests)
        config = InferenceConfig(
            server_type="custom", model_name_or_path=generator, use_chat=False, max_concurrent_generations=count,
            max_concurrent_documents=count,
        )  # fmt: skip
        super().__init__(_rollout, config, nullcontext())
        self.server = server
        self.completions: dict[str, Completion] = {}

    def _init_server(self, rank: int) -> BatchServer:
        return self.server

    async def _save_document(self, document: Document, *arguments: Any, **options: Any) -> None:
        (self.completions[document.id],) = document.metadata[self.metadata_key]


async def _rollout(document: Document, generate: Any) -> Completion:
    completion: Completion = (await generate({"id": document.id})).text
    return completion


def draw(model: AnswerGenerator, generator: str, requests: Sequence[Request], greedy: bool) -> list[Completion]:
    """The completion of each request, in their order. Raises the model's error."""
    from loguru import logger

    logger.disable("datatrove")  # it logs tables of metrics for every batch
    if not requests:
        return []
    server = BatchServer(model, requests, greedy)
    runner = BatchRunner(server, generator)
    try:
        runner.run([Document(text="", id=request.id) for request in requests])
    except ServerError:
        assert server.error is not None
        raise server.error from None
    return [runner.completions[request.id] for request in requests]
