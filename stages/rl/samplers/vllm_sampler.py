"""The sampler that decodes with vLLM servers, which load the policy's weights before every step.

Requests and responses contain token ids, with the log-probability of each under the distribution from which it was
drawn. A reload that keeps old weights would bias training without an error of vLLM, so every reload is verified: see
`load`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from pipeline.core.errors import AtomError, MachineError
from stages.rl.protocols import Completion, Prompt, Sampler, SamplerContext
from stages.rl.samplers.vllm_server import IN_FLIGHT, Server, interpreter
from stages.rl.weights import Weights

T = TypeVar("T")


class VllmServer(Sampler):
    """Draws with one server of its own on this machine, or with those at `urls`.

    With equal seeds it draws equal tokens only up to the rounding of a batched matrix product: the batches of requests
    depend on time. Drawn answers are kept, so this only matters for a repetition from scratch.
    """

    def __init__(
        self, config: Mapping[str, Any], stops: Sequence[int], max_new_tokens: int, temperature: float, folder: Path,
        python: str | None = None, urls: Sequence[str] = (), options: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """config: the content of config.json; its `dtype` is served. folder: emptied, and visible to all servers.
        Raises AtomError without a vLLM to start."""
        self.config, self.stops, self.folder = dict(config), frozenset(stops), folder.absolute()
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.dtype: torch.dtype = getattr(torch, config["dtype"])
        self.loaded: str | None = None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        if urls:
            self.servers = [Server(url) for url in urls]
        else:
            log = self.folder / "server.log"
            gpus = None
            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                gpus = torch.cuda.device_count(), free / total
            self.servers = [Server.start(interpreter(python), self.folder, log, options, gpus)]

    @classmethod
    def create(cls, context: SamplerContext) -> Self:
        settings = context.settings
        return cls(
            context.config, context.stops, settings.max_new_tokens, 1.0, context.folder,
            settings.python, settings.url, settings.options,
        )  # fmt: skip

    def load(self, weights: Weights) -> None:
        """Loads the weights, which are in a folder, into every server, under the policy's digest as their version.

        Each server first checks its shards: those of the index, with their digests, from which that of the policy
        follows. Only when all servers have them does one change its weights, so a refusal leaves all of them as they
        were. A server that fails while it loads stays paused. Every later answer states the weights that drew it, and
        each step compares its log-probabilities with the trainer's. Raises AtomError.
        """
        if weights.digest == self.loaded:
            return
        update = {"folder": str(weights.folder), "digest": weights.digest}
        try:
            self._map([(s, update) for s in self.servers], self._check)
        except BaseException:
            for server in self.servers:
                with contextlib.suppress(AtomError):  # ends the update on the workers that did not refuse it
                    server.post("/finish_weight_update", attempts=1)
            raise
        self.loaded = None
        self._map([(s, update) for s in self.servers], self._take)
        self.loaded = weights.digest

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        if self.loaded is None:
            raise ValueError("weights are loaded before anything is drawn")
        # neighbors are often answers to one question, so that one server keeps its cache
        dealt = [(self.servers[i * len(self.servers) // len(prompts)], p) for i, p in enumerate(prompts)]
        return self._map(dealt, lambda server, prompt: self._draw(server, prompt, greedy))

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def _map(self, items: Sequence[tuple[Server, Any]], request: Callable[[Server, Any], T]) -> list[T]:
        """The answers in order; the first error ends all."""
        with ThreadPoolExecutor(IN_FLIGHT * len(self.servers)) as pool:
            try:
                return list(pool.map(lambda item: request(*item), items))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _draw(self, server: Server, prompt: Prompt, greedy: bool) -> Completion:
        sampling = {
            "temperature": 0.0 if greedy else self.temperature, "seed": prompt.seed % 2**63,
            "max_tokens": self.max_new_tokens, "stop_token_ids": sorted(self.stops), "logprobs": 0, "detokenize": False,
        }  # fmt: skip
        body = {"token_ids": list(prompt.ids), "sampling_params": sampling}
        answer = server.post("/inference/v1/generate", body)
        try:
            (choice,) = answer["choices"]
            ids = tuple(choice["token_ids"])
            content = choice["logprobs"]["content"]
            versions = {span["version"] for span in choice["weight_versions"]}
            is_complete = choice["finish_reason"] in ("stop", "length") and [x["token_id"] for x in content] == list(
                ids
            )
        except (KeyError, TypeError, ValueError):
            ids, is_complete, versions = (), False, set()
        if not ids or not is_complete:
            raise MachineError(f"the vLLM server at {server.url} gave no whole answer ({str(answer)[:300]}); "
                            "see its log and run again to go on")  # fmt: skip
        if versions != {self.loaded}:
            served = ", ".join(sorted(map(str, versions)))
            raise MachineError(
                f"the vLLM server at {server.url} answered with the weights {served} instead of {self.loaded}; it "
                "started anew, or somebody else uses it: run again"
            )
        return Completion(ids, tuple(float(x["logprob"]) for x in content), ids[-1] in self.stops)

    def _check(self, server: Server, update: Mapping[str, Any]) -> None:
        if self.loaded is None:
            server.wait()
            sizes = {name: value for name, value in self.config.items() if type(value) in (int, float)}
            server.post("/init_weight_transfer_engine", {"init_info": {"sizes": sizes}})
        server.post("/start_weight_update", attempts=1)
        server.post("/update_weights", {"update_info": {**update, "load": False}}, attempts=1)

    def _take(self, server: Server, update: Mapping[str, Any]) -> None:
        """Running answers wait, and go on with the new weights, which read their tokens again."""
        server.post("/pause?mode=keep")
        server.post("/update_weights", {"update_info": {**update, "load": True}}, attempts=1)
        server.post("/finish_weight_update", {"weight_version": update["digest"]}, attempts=1)
        server.post("/resume")


SAMPLER = VllmServer
