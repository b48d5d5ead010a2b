"""The in-process sampler: a transformers model with the trainer's tensors reads the prompts, and a decoder continues
from its cache: this project's for the supported architectures, else the model's own forward pass.

The log-probabilities are those of the exact distribution from which a token was drawn. Every answer has a random stream
of its own, so it does not depend on the other prompts of a batch, up to the rounding of a batched matrix product.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.core.errors import AtomError
from stages.generation import routes as records
from stages.generation.decode import CLASSES, NAMES, Decoder, LibraryDecoder
from stages.generation.protocols import Completion, Prompt, Sampler, SamplerContext
from stages.mcore import gpu

ROWS = 256
"""Answers that are drawn in parallel, which bounds the cache."""
COMPACT_BELOW = 0.75
"""The share of unfinished rows below which the cache is copied without the finished ones."""


class InProcess(Sampler):
    """Draws with the model of a Hugging Face config, on this process's device, in fp32 on CPU."""

    def __init__(
        self, config: Mapping[str, Any] | Path, stops: Sequence[int], max_new_tokens: int, temperature: float = 1.0,
        rows: int = ROWS, routes: bool = False,
    ) -> None:  # fmt: skip
        """config: the content of config.json, or the folder of an exported model, whose weights are then loaded.
        routes: record the experts of each token. Raises AtomError if the decoder cannot."""
        if isinstance(config, Path):
            self.model = AutoModelForCausalLM.from_pretrained(config, dtype=torch.float32, local_files_only=True).eval()
        else:
            hf_config = AutoConfig.for_model(**config)
            self.model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
        self.model.to(gpu.start()).requires_grad_(False)
        self.decoder: Decoder | LibraryDecoder
        if isinstance(self.model, CLASSES):
            self.decoder = Decoder(self.model, routes)
        elif routes:
            raise AtomError(
                f"routing_replay needs this project's decoder, which draws from {NAMES} models and not from "
                f"{type(self.model).__name__}; leave it out"
            )
        else:
            self.decoder = LibraryDecoder(self.model)
        self.routes = routes
        self.stops, self.max_new_tokens = frozenset(stops), max_new_tokens
        self.temperature, self.rows = temperature, rows
        self.policy = ""
        """The digest of the weights, if they have one."""
        self.lock = threading.Lock()

    @classmethod
    def create(cls, context: SamplerContext) -> Self:
        config = {**context.config, "dtype": "float32", "torch_dtype": "float32"}
        return cls(config, context.stops, context.settings.max_new_tokens, routes=context.routes)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Loads the weights once no other thread draws."""
        with self.lock:
            load_weights(self.model, tensors)
            self.policy = getattr(tensors, "digest", "")

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        completions: dict[int, Completion] = {}
        by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
        with self.lock:
            for start in range(0, len(by_length), self.rows):
                batch = by_length[start : start + self.rows]
                completions |= zip(batch, self._draw([prompts[i] for i in batch], greedy), strict=True)
        return [completions[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Frees the model. A thread that still draws ends with an error at its next token."""
        del self.model, self.decoder

    def _draw(self, prompts: list[Prompt], greedy: bool) -> list[Completion]:
        with torch.inference_mode():
            return self._sample(prompts, None if greedy else self._noise(prompts))

    def _sample(self, prompts: list[Prompt], noise: torch.Tensor | None) -> list[Completion]:
        device, count, max_tokens = self.model.device, len(prompts), self.max_new_tokens
        stops = torch.tensor(sorted(self.stops))
        logits = self.decoder.read([prompt.ids for prompt in prompts], max_tokens)
        tokens, log_probs = torch.zeros(max_tokens, count, dtype=torch.long), torch.zeros(max_tokens, count)
        active, unfinished = torch.arange(count), torch.ones(count, dtype=torch.bool)
        of_steps: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows that were decoded, and their experts
        for step in range(max_tokens):
            next_tokens, log_probs[step, active] = self._choose(
                logits, noise[active, step] if noise is not None else None
            )
            tokens[step, active] = next_tokens
            if len(stops):
                unfinished &= ~torch.isin(next_tokens, stops)
                remaining = int(unfinished.sum())
                if not remaining:
                    break
                if remaining <= COMPACT_BELOW * len(active):
                    kept = unfinished.nonzero()[:, 0]
                    self.decoder.select(kept.to(device))
                    active, next_tokens, unfinished = active[kept], next_tokens[kept], unfinished[kept]
            if step + 1 == max_tokens:
                break
            logits = self.decoder.step(next_tokens.to(device)).float()
            if self.routes and isinstance(self.decoder, Decoder):
                of_steps.append((active, self.decoder.step_routes()))
        completions = []
        for ids, logprobs in zip(tokens.T.tolist(), log_probs.T.tolist(), strict=True):
            end = next((n for n, token in enumerate(ids) if token in self.stops), max_tokens - 1) + 1
            drawn_by = ((self.policy, end),) if self.policy else ()
            completions.append(
                Completion(tuple(ids[:end]), tuple(logprobs[:end]), ids[end - 1] in self.stops, versions=drawn_by)
            )
        if self.routes and isinstance(self.decoder, Decoder):
            return self._with_routes(prompts, completions, self.decoder.prompt_routes, of_steps)
        return completions

    def _with_routes(
        self, prompts: list[Prompt], completions: list[Completion],
        of_prompts: Mapping[tuple[int, ...], torch.Tensor], of_steps: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> list[Completion]:  # fmt: skip
        """The completions with the experts of question and answer, without the last token. of_prompts: by prompt;
        of_steps: rows and their experts, of each step."""
        experts = self.model.config.num_experts
        answers: list[list[torch.Tensor]] = [[] for _ in prompts]
        for rows, chosen in of_steps:
            for row, of_token in zip(rows.tolist(), chosen, strict=True):
                answers[row].append(of_token)
        recorded = []
        for prompt, completion, steps in zip(prompts, completions, answers, strict=True):
            both = torch.cat([of_prompts[prompt.ids], *(x[None] for x in steps[: len(completion.ids) - 1])])
            recorded.append(replace(completion, routes=records.encode(both, experts)))
        return recorded

    def _noise(self, prompts: list[Prompt]) -> torch.Tensor:
        """Uniform numbers in (0, 1), [rows, steps]: one for each token that may be drawn."""
        rows = [
            torch.rand(self.max_new_tokens, generator=torch.Generator().manual_seed(p.seed % 2**63)) for p in prompts
        ]
        return torch.stack(rows).double()

    def _choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [rows] and their log-probabilities, by inverting the distribution function at the random number. It
        computes where the logits are, and brings only the tokens to the host."""
        probabilities = (logits if noise is None else logits / self.temperature).softmax(-1)
        if noise is None:
            tokens = probabilities.argmax(-1)
        else:
            cumulative = probabilities.cumsum(-1, dtype=torch.float64)
            thresholds = noise[:, None].to(logits.device) * cumulative[:, -1:]
            tokens = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)
        return tokens.cpu(), probabilities.gather(1, tokens[:, None]).squeeze(1).log().cpu()


def load_weights(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Loads weights by their exported names into a transformers model. Raises ValueError if a tensor is unexpected, and
    KeyError or RuntimeError if one is missing or has another shape."""
    parameters = model.state_dict()  # with biases of experts, which are buffers
    if model.config.tie_word_embeddings:
        parameters.pop("lm_head.weight", None)
    experts = {name for name in parameters if ".mlp.experts." in name and name not in tensors}
    for name in parameters.keys() - experts:
        parameters[name].data.copy_(tensors[name])
    loaded = parameters.keys() - experts
    for name in sorted(experts):  # transformers holds them stacked
        stem, part = name.rsplit(".", 1)
        kinds = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        for number in range(parameters[name].shape[0]):
            names = [f"{stem}.{number}.{kind}.weight" for kind in kinds]
            for piece, n in zip(parameters[name].data[number].chunk(len(kinds), 0), names, strict=True):
                piece.copy_(tensors[n])
            loaded |= set(names)
    unexpected = sorted(set(tensors) - loaded - {"lm_head.weight"})
    if unexpected:
        raise ValueError(f"the sampler's model has no tensor {unexpected[0]}")
