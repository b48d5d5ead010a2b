"""The in-process sampler: a transformers model filled from the trainer's tensors, and a loop over its cache of keys and
values.

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

from stages.rl.contracts import Completion, Prompt

CACHE = "cache" if "cache" in signature(Qwen3MoeForCausalLM.forward).parameters else "past_key_values"
"""What this version of transformers calls it."""
ROWS = 256
"""Answers that are drawn side by side, which bounds the cache."""


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
        del self.model

    def _draw(self, prompts: list[Prompt], greedy: bool) -> list[Completion]:
        with torch.inference_mode():
            return self._drawn(prompts, None if greedy else self._noise(prompts))

    def _drawn(self, prompts: list[Prompt], noise: torch.Tensor | None) -> list[Completion]:
        device = next(self.model.parameters()).device
        width = max(len(p.ids) for p in prompts)
        pads = torch.tensor([width - len(p.ids) for p in prompts])
        ids = torch.tensor([[0] * (width - len(p.ids)) + list(p.ids) for p in prompts])
        mask = (torch.arange(width) >= pads[:, None]).long()
        where = (torch.arange(width) - pads[:, None]).clamp_min(0)
        drawn: list[list[int]] = [[] for _ in prompts]
        told: list[list[float]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        cache = DynamicCache(config=self.model.config)
        for step in range(self.max_new_tokens):
            logits = self.model(
                ids.to(device),
                attention_mask=None if not pads.any() else mask.to(device),
                position_ids=where.to(device),
                **{CACHE: cache},
                logits_to_keep=1,
            ).logits[:, -1]
            chosen, logprobs = self._choose(logits.float().cpu(), noise[:, step] if noise is not None else None)
            goes_on = []
            for row, (i, token, logprob) in enumerate(zip(live, chosen.tolist(), logprobs.tolist(), strict=True)):
                drawn[i].append(token)
                told[i].append(logprob)
                if token not in self.stops:
                    goes_on.append(row)
            if not goes_on:
                break
            if len(goes_on) < len(live):
                kept = torch.tensor(goes_on)
                live = [live[row] for row in goes_on]
                chosen, mask, pads = chosen[kept], mask[kept], pads[kept]
                where = where[kept]
                noise = noise[kept] if noise is not None else None
                cache.batch_select_indices(kept.to(device))
            ids = chosen[:, None]
            mask = torch.cat((mask, torch.ones(len(live), 1, dtype=mask.dtype)), 1)
            where = where[:, -1:] + 1
        return [
            Completion(tuple(ids), tuple(logprobs), ids[-1] in self.stops)
            for ids, logprobs in zip(drawn, told, strict=True)
        ]

    def _noise(self, prompts: list[Prompt]) -> torch.Tensor:
        """Uniform numbers in (0, 1), [rows, steps]: one for each token that may be drawn."""
        rows = [
            torch.rand(self.max_new_tokens, generator=torch.Generator().manual_seed(p.seed % 2**63)) for p in prompts
        ]
        return torch.stack(rows).double()

    def _choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [rows] and their log-probabilities, by inverting the distribution function at the random number."""
        if noise is None:
            spread = torch.log_softmax(logits, -1)
            chosen = spread.argmax(-1)
        else:
            spread = torch.log_softmax(logits / self.temperature, -1)
            below = spread.double().exp().cumsum(-1)
            at = noise[:, None] * below[:, -1:]
            chosen = torch.searchsorted(below, at, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)
        return chosen, spread.gather(1, chosen[:, None]).squeeze(1)


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
