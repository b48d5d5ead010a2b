"""The in-process sampler: a transformers model filled from the trainer's tensors reads the prompts, and our decoder
goes on from its cache of keys and values.

The log-probabilities are those of the very distribution that a token was drawn from. Every answer has a random stream
of its own, so it is the same whatever else is asked beside it, up to the rounding of a batched matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Qwen3MoeForCausalLM

from stages.rl.protocols import Completion, Prompt, Sampler, SamplerContext
from stages.rl.samplers.sampler_decode import Decoder

CACHE = "cache" if "cache" in signature(Qwen3MoeForCausalLM.forward).parameters else "past_key_values"
"""The name of the cache's argument in this version of transformers."""
READ = 1024
"""Tokens of prompts that are read at once, padding included: what is made of more leaves the processor's caches."""
ROWS = 256
"""Answers that are drawn side by side, which bounds the cache."""
COMPACT_BELOW = 0.75
"""Share of rows not yet stopped at which the others leave the cache, which is copied then."""


class InProcess(Sampler):
    """Draws with the model of a Hugging Face config, on this process's device, in fp32 on CPU."""

    def __init__(
        self, config: Mapping[str, Any] | Path, stops: Sequence[int], max_new_tokens: int, temperature: float = 1.0,
        rows: int = ROWS,
    ) -> None:  # fmt: skip
        """config: what config.json holds, or the folder of an exported model, whose weights are then loaded."""
        if isinstance(config, Path):
            self.model = AutoModelForCausalLM.from_pretrained(config, dtype=torch.float32, local_files_only=True).eval()
        else:
            hf_config = AutoConfig.for_model(**config)
            self.model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
        if torch.cuda.is_available():
            self.model.cuda()
        self.model.requires_grad_(False)
        self.decoder = Decoder(self.model)
        self.stops, self.max_new_tokens = frozenset(stops), max_new_tokens
        self.temperature, self.rows = temperature, rows

    @classmethod
    def create(cls, context: SamplerContext) -> Self:
        config = {**context.config, "dtype": "float32", "torch_dtype": "float32"}
        return cls(config, context.stops, context.settings.max_new_tokens)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        load_weights(self.model, tensors)

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        completions: dict[int, Completion] = {}
        by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
        for start in range(0, len(by_length), self.rows):
            batch = by_length[start : start + self.rows]
            completions |= zip(batch, self._draw([prompts[i] for i in batch], greedy), strict=True)
        return [completions[i] for i in range(len(prompts))]

    def close(self) -> None:
        del self.model, self.decoder

    def _draw(self, prompts: list[Prompt], greedy: bool) -> list[Completion]:
        with torch.inference_mode():
            return self._sample(prompts, None if greedy else self._noise(prompts))

    def _sample(self, prompts: list[Prompt], noise: torch.Tensor | None) -> list[Completion]:
        device, count, max_tokens = self.model.device, len(prompts), self.max_new_tokens
        stops = torch.tensor(sorted(self.stops))
        logits = self._read(prompts)
        tokens, log_probs = torch.zeros(max_tokens, count, dtype=torch.long), torch.zeros(max_tokens, count)
        active, unfinished = torch.arange(count), torch.ones(count, dtype=torch.bool)
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
            if step + 1 < max_tokens:
                logits = self.decoder.step(next_tokens.to(device)).float().cpu()
        completions = []
        for ids, logprobs in zip(tokens.T.tolist(), log_probs.T.tolist(), strict=True):
            end = next((n for n, token in enumerate(ids) if token in self.stops), max_tokens - 1) + 1
            completions.append(Completion(tuple(ids[:end]), tuple(logprobs[:end]), ids[end - 1] in self.stops))
        return completions

    def _read(self, prompts: list[Prompt]) -> torch.Tensor:
        """Fills the decoder's cache; returns the logits after each prompt. Equal prompts, such as those of a group, are
        read once."""
        device, width = self.model.device, max(len(prompt.ids) for prompt in prompts)
        unique_prompts = list(dict.fromkeys(prompt.ids for prompt in prompts))  # shortest first, as the prompts are
        prompt_cache = self.decoder.allocate_cache(len(unique_prompts), width)
        logits, start = [], 0
        while start < len(unique_prompts):
            batch = [unique_prompts[start]]
            while (
                start + len(batch) < len(unique_prompts)
                and (len(batch) + 1) * len(unique_prompts[start + len(batch)]) <= READ
            ):
                batch.append(unique_prompts[start + len(batch)])
            longest = len(batch[-1])
            pads = torch.tensor([longest - len(ids) for ids in batch])
            positions = torch.arange(longest) - pads[:, None]
            cache = DynamicCache(config=self.model.config)
            output = self.model(
                torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in batch], device=device),
                attention_mask=(positions >= 0).long().to(device) if pads.any() else None,
                position_ids=positions.clamp_min(0).to(device),
                **{CACHE: cache},
                logits_to_keep=1,
            )
            logits.append(output.logits[:, -1].float().cpu())
            for layer_cache, layer in zip(prompt_cache, cache.layers, strict=True):
                layer_cache[:, start : start + len(batch), :, width - longest :] = torch.stack(
                    (layer.keys, layer.values)
                )
            start += len(batch)
        index_of = {ids: n for n, ids in enumerate(unique_prompts)}
        rows = torch.tensor([index_of[prompt.ids] for prompt in prompts])
        pads = torch.tensor([width - len(prompt.ids) for prompt in prompts])
        self.decoder.start(
            [layer_cache[:, rows.to(device)] for layer_cache in prompt_cache],
            pads.to(device),
            width + self.max_new_tokens,
        )
        return torch.cat(logits)[rows]

    def _noise(self, prompts: list[Prompt]) -> torch.Tensor:
        """Uniform numbers in (0, 1), [rows, steps]: one for each token that may be drawn."""
        rows = [
            torch.rand(self.max_new_tokens, generator=torch.Generator().manual_seed(p.seed % 2**63)) for p in prompts
        ]
        return torch.stack(rows).double()

    def _choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [rows] and their log-probabilities, by inverting the distribution function at the random number."""
        probabilities = (logits if noise is None else logits / self.temperature).softmax(-1)
        if noise is None:
            tokens = probabilities.argmax(-1)
        else:
            cumulative = probabilities.cumsum(-1, dtype=torch.float64)
            thresholds = noise[:, None] * cumulative[:, -1:]
            tokens = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)
        return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()


def load_weights(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Loads weights by their exported names into a transformers model. Raises ValueError if a tensor is unexpected, and
    KeyError or RuntimeError if one is missing or has another shape."""
    parameters = dict(model.named_parameters())
    if model.config.tie_word_embeddings:
        parameters.pop("lm_head.weight", None)
    experts = {name for name in parameters if ".mlp.experts." in name}
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


SAMPLER = InProcess
