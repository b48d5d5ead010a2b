"""Decoding by a transformers model's own forward pass: slower than stages.rl.samplers.sampler_decode, for any
architecture whose cache transformers can cut by rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache


def cache_argument(model: Any) -> str:
    """The name of the cache's argument in this version of transformers."""
    return "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"


class LibraryDecoder:
    """Decodes rows with a model, whose parameters may be overwritten in place."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def read(self, prompts: Sequence[tuple[int, ...]], room: int) -> torch.Tensor:
        """Fills the cache with prompts, padded on the left. Returns the logits after each, [prompts, vocabulary]. The
        cache grows by itself: `room` is not needed."""
        width = max(len(ids) for ids in prompts)
        self.cache = DynamicCache(config=self.model.config)
        self.mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        return self._forward(torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])).cpu()

    def select(self, rows: torch.Tensor) -> None:
        """Keeps only some rows."""
        self.cache.reorder_cache(rows)  # the one selection that states of linear attention have too
        self.mask = self.mask[rows.cpu()]

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Appends a token to each row, [rows]; returns the logits of the next token, [rows, vocabulary]."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self._forward(ids[:, None])

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits after the last of some new tokens, [rows, vocabulary]."""
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = self.model(
            ids.to(self.model.device),
            attention_mask=self.mask.to(self.model.device),
            position_ids=positions.to(self.model.device),
            **{cache_argument(self.model): self.cache},
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits
