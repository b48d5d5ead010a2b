"""The sampler that decodes with vLLM servers, which load the policy's weights before every step.

Requests and responses contain token ids, with the log-probability of each under the distribution from which it was
drawn. A reload that keeps old weights would bias training without an error of vLLM, so every reload is verified: see
`load`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.core.errors import AtomError, CheckFailed, MachineError
from stages.rl.protocols import Completion, Prompt, Sampler, SamplerContext
from stages.rl.rollout import rollouts
from stages.rl.samplers.generate import load_weights
from stages.rl.samplers.vllm_server import IN_FLIGHT, Server, interpreter
from stages.train.checkpoint.release_checkpoint import save_tensors

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest mean difference of a token's log-probability from transformers' in fp32, by the served type."""

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

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Loads the weights into every server and verifies that they took effect.

        Every worker holds norms unchanged, so their digests must be those of the new weights; the digests of all
        parameters must have changed; and every later answer states the weights that drew it. The first time, when the
        servers started from random weights, their log-probabilities are compared with transformers', which detects a
        kind of layer that this vLLM does not reload. Raises AtomError.
        """
        digest = rollouts.digest(tensors)
        if digest == self.loaded:
            return
        served = {name: t.detach().to(self.dtype) for name, t in tensors.items()}
        served.setdefault("lm_head.weight", served["model.embed_tokens.weight"])
        folder = self.folder / digest[7:23]
        folder.mkdir(exist_ok=True)
        # tied weights are two tensors in the file
        contiguous = {name: t.clone() if name == "lm_head.weight" else t for name, t in served.items()}
        save_tensors(folder / "partial", contiguous)
        os.rename(folder / "partial", folder / "model.safetensors")
        norms = {name: _sha256(t) for name, t in served.items() if name.endswith("norm.weight")}
        self._map([(s, s) for s in self.servers], lambda server, _: self._renew(server, folder, digest, norms))
        is_first, self.loaded = self.loaded is None, digest
        if is_first:
            try:
                self._prove(served)
            except AtomError:
                self.loaded = None
                raise
        for old in self.folder.iterdir():
            if old.is_dir() and old != folder:
                shutil.rmtree(old)

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

    def _renew(self, server: Server, folder: Path, digest: str, norms: Mapping[str, str]) -> None:
        server.wait()
        digests_before = self._digests(server)
        server.post("/collective_rpc", {"method": "renew", "args": [str(folder)]})
        if not server.post("/reset_prefix_cache")["success"]:
            raise MachineError(f"the vLLM server at {server.url} keeps its cache of prompts while somebody else uses "
                               "it; give it to this run alone")  # fmt: skip
        server.post("/update_weight_version", {"new_version": digest})
        digests_after = self._digests(server)
        renewed = {(name, sha) for key, sha in digests_after.items() if (name := key.rsplit(":", 1)[-1]) in norms}
        if renewed != set(norms.items()) or (digests_after == digests_before and self.loaded is not None):
            raise MachineError(f"the vLLM server at {server.url} did not take over the weights in {folder}; "
                            "have it see this folder and run again")  # fmt: skip

    @staticmethod
    def _digests(server: Server) -> dict[str, str]:
        """SHA-256 of each parameter's bytes as a worker holds it, by `<worker>:<name>`."""
        checksums: dict[str, str] = server.post("/weight_checker", {"action": "checksum"})["checksums"]
        return checksums

    def _prove(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compares the log-probabilities of a few answers with those of transformers, in fp32 on CPU."""
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**self.config), dtype=torch.float32).eval()
        load_weights(model, tensors)
        vocab = model.config.vocab_size
        prompts = [Prompt(tuple((5 * n + i) % vocab for i in range(4)), n) for n in range(4 * len(self.servers))]
        gaps = []
        for prompt, completion in zip(prompts, self.generate(prompts), strict=True):
            log_probs = logprobs(model, prompt, completion, self.temperature)
            gaps.append((log_probs - torch.tensor(completion.logprobs)).abs())
        gap = torch.cat(gaps).mean().item()
        if not gap <= TOLERANCE[self.config["dtype"]]:
            raise CheckFailed(
                f"vLLM's log-probabilities differ by {gap:.3g} from those of the weights that it was given, so it does "
                "not renew all of them, or computes otherwise; use another version of it, or sampling.kind = in-process"
            )


def logprobs(model: torch.nn.Module, prompt: Prompt, completion: Completion, temperature: float) -> torch.Tensor:
    """A transformers model's log-probabilities, [tokens], of an answer's tokens at a temperature."""
    ids = torch.tensor([[*prompt.ids, *completion.ids]])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt.ids) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


SAMPLER = VllmServer
