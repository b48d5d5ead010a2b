"""The in-process sampler: a transformers model filled from the trainer's tensors reads the prompts, and our decoder
goes on from its cache of keys and values.

The log-probabilities are those of the very distribution that a token was drawn from. Every answer has a random stream
of its own, so it is the same whatever else is asked beside it, up to the rounding of a batched matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Qwen3MoeForCausalLM

from stages.rl.protocols import Completion, Prompt
from stages.rl.samplers.sampler_decode import Decoder

CACHE = "cache" if "cache" in signature(Qwen3MoeForCausalLM.forward).parameters else "past_key_values"
"""What this version of transformers calls it."""
READ = 1024
"""Tokens of prompts that are read at once, padding included: what is made of more leaves the processor's caches."""
ROWS = 256
"""Answers that are drawn side by side, which bounds the cache."""
GOING = 0.75
"""Share of rows not yet stopped at which the others leave the cache, which is copied then."""


class InProcess:
    """Draws with the model of a Hugging Face config, on this process's device, in fp32 on CPU."""

    def __init__(
        self, config: Mapping[str, Any] | Path, stops: Sequence[int], max_new_tokens: int, temperature: float = 1.0,
        rows: int = ROWS,
    ) -> None:  # fmt: skip
        """config: what config.json holds, or the folder of an exported model, whose weights are then loaded."""
        if isinstance(config, Path):
            self.model = AutoModelForCausalLM.from_pretrained(config, dtype=torch.float32, local_files_only=True).eval()
        else:
            made = AutoConfig.for_model(**config)
            self.model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
        if torch.cuda.is_available():
            self.model.cuda()
        self.model.requires_grad_(False)
        self.decoder = Decoder(self.model)
        self.stops, self.max_new_tokens = frozenset(stops), max_new_tokens
        self.temperature, self.rows = temperature, rows

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        fill(self.model, tensors)

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        found: dict[int, Completion] = {}
        by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
        for start in range(0, len(by_length), self.rows):
            some = by_length[start : start + self.rows]
            found |= zip(some, self._draw([prompts[i] for i in some], greedy), strict=True)
        return [found[i] for i in range(len(prompts))]

    def close(self) -> None:
        del self.model, self.decoder

    def _draw(self, prompts: list[Prompt], greedy: bool) -> list[Completion]:
        with torch.inference_mode():
            return self._drawn(prompts, None if greedy else self._noise(prompts))

    def _drawn(self, prompts: list[Prompt], noise: torch.Tensor | None) -> list[Completion]:
        device, count, most = self.model.device, len(prompts), self.max_new_tokens
        stops = torch.tensor(sorted(self.stops))
        logits = self._read(prompts)
        drawn, told = torch.zeros(most, count, dtype=torch.long), torch.zeros(most, count)
        live, going = torch.arange(count), torch.ones(count, dtype=torch.bool)
        for step in range(most):
            chosen, told[step, live] = self._choose(logits, noise[live, step] if noise is not None else None)
            drawn[step, live] = chosen
            if len(stops):
                going &= ~torch.isin(chosen, stops)
                left = int(going.sum())
                if not left:
                    break
                if left <= GOING * len(live):
                    rows = going.nonzero()[:, 0]
                    self.decoder.select(rows.to(device))
                    live, chosen, going = live[rows], chosen[rows], going[rows]
            if step + 1 < most:
                logits = self.decoder.step(chosen.to(device)).float().cpu()
        found = []
        for ids, logprobs in zip(drawn.T.tolist(), told.T.tolist(), strict=True):
            end = next((n for n, token in enumerate(ids) if token in self.stops), most - 1) + 1
            found.append(Completion(tuple(ids[:end]), tuple(logprobs[:end]), ids[end - 1] in self.stops))
        return found

    def _read(self, prompts: list[Prompt]) -> torch.Tensor:
        """Fills the decoder's cache; gives the logits after each prompt. A prompt that is asked several times, as those
        of a group are, is read once."""
        device, width = self.model.device, max(len(prompt.ids) for prompt in prompts)
        asked = list(dict.fromkeys(prompt.ids for prompt in prompts))  # shortest first, as the prompts are
        kept = self.decoder.room(len(asked), width)
        logits, start = [], 0
        while start < len(asked):
            some = [asked[start]]
            while start + len(some) < len(asked) and (len(some) + 1) * len(asked[start + len(some)]) <= READ:
                some.append(asked[start + len(some)])
            longest = len(some[-1])
            pads = torch.tensor([longest - len(ids) for ids in some])
            where = torch.arange(longest) - pads[:, None]
            cache = DynamicCache(config=self.model.config)
            told = self.model(
                torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in some], device=device),
                attention_mask=(where >= 0).long().to(device) if pads.any() else None,
                position_ids=where.clamp_min(0).to(device),
                **{CACHE: cache},
                logits_to_keep=1,
            )
            logits.append(told.logits[:, -1].float().cpu())
            for whole, layer in zip(kept, cache.layers, strict=True):
                whole[:, start : start + len(some), :, width - longest :] = torch.stack((layer.keys, layer.values))
            start += len(some)
        number = {ids: n for n, ids in enumerate(asked)}
        rows = torch.tensor([number[prompt.ids] for prompt in prompts])
        pads = torch.tensor([width - len(prompt.ids) for prompt in prompts])
        self.decoder.start([whole[:, rows.to(device)] for whole in kept], pads.to(device), width + self.max_new_tokens)
        return torch.cat(logits)[rows]

    def _noise(self, prompts: list[Prompt]) -> torch.Tensor:
        """Uniform numbers in (0, 1), [rows, steps]: one for each token that may be drawn."""
        rows = [
            torch.rand(self.max_new_tokens, generator=torch.Generator().manual_seed(p.seed % 2**63)) for p in prompts
        ]
        return torch.stack(rows).double()

    def _choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [rows] and their log-probabilities, by inverting the distribution function at the random number."""
        chances = (logits if noise is None else logits / self.temperature).softmax(-1)
        if noise is None:
            chosen = chances.argmax(-1)
        else:
            below = chances.cumsum(-1, dtype=torch.float64)
            at = noise[:, None] * below[:, -1:]
            chosen = torch.searchsorted(below, at, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)
        return chosen, chances.gather(1, chosen[:, None]).squeeze(1).log()


def fill(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fills a transformers model with weights by the names in which they are exported. Raises ValueError if a tensor is
    missing, left over, or of another shape."""
    own = dict(model.named_parameters())
    if model.config.tie_word_embeddings:
        own.pop("lm_head.weight", None)
    experts = {name for name in own if ".mlp.experts." in name}
    for name in own.keys() - experts:
        own[name].data.copy_(tensors[name])
    used = own.keys() - experts
    for name in sorted(experts):  # transformers holds them stacked
        stem, part = name.rsplit(".", 1)
        kinds = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        for number in range(own[name].shape[0]):
            names = [f"{stem}.{number}.{kind}.weight" for kind in kinds]
            for piece, n in zip(own[name].data[number].chunk(len(kinds), 0), names, strict=True):
                piece.copy_(tensors[n])
            used |= set(names)
    left = sorted(set(tensors) - used - {"lm_head.weight"})
    if left:
        raise ValueError(f"the sampler's model has no tensor {left[0]}")
