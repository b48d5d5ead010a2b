"""What sampling consists of: one more token for each row, by Qwen3-MoE's formulas on a transformers model's weights.

transformers reads the prompts. After that, a step of a small model is mostly what surrounds its arithmetic: modules,
masks made anew, caches copied to grow by a token, keys repeated for each query head. Here it is some thirty operations
a layer, on a cache that is written in place. Tests hold its logits to transformers'.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import Qwen3MoeForCausalLM

ROOM = 64
"""Tokens by which the cache grows at least."""


class Decoder:
    """Continues rows of a model whose parameters it reads where they are, so that they may be overwritten."""

    def __init__(self, model: Any) -> None:
        if not isinstance(model, Qwen3MoeForCausalLM):
            raise TypeError(f"the in-process sampler draws from Qwen3-MoE models, not from {type(model).__name__}")
        self.model: Any = model.model
        self.head, self.config = model.lm_head, model.config
        self.groups, self.dim = self.config.num_key_value_heads, self.config.head_dim
        self.queries = self.config.num_attention_heads
        self.qkv = [_fused(layer.self_attn) for layer in self.model.layers]
        self.numbers = torch.arange(self.config.num_experts, device=model.device)

    def room(self, rows: int, length: int) -> list[torch.Tensor]:
        """Empty keys and values, for each layer [2, rows, groups, length, dim]."""
        shape = (2, rows, self.groups, length, self.dim)
        return [torch.zeros(shape, device=self.numbers.device) for _ in self.qkv]

    def start(self, cache: list[torch.Tensor], pads: torch.Tensor, longest: int) -> None:
        """Takes over what transformers has read. cache: as `room` gives it, filled; pads: empty places on the left of
        rows, [rows]; longest: the length that rows may reach."""
        self.cache, self.pads, self.length = cache, pads, cache[0].shape[3]
        where = torch.arange(longest, device=pads.device)[None]
        cos, sin = self.model.rotary_emb(self.cache[0][0], where)
        first, second = sin.chunk(2, -1)
        self.turns = torch.cat((cos, torch.cat((-first, second), -1)))  # [2, longest, dim]
        self.bias = torch.zeros(len(pads), longest, device=pads.device).masked_fill_(where < pads[:, None], -torch.inf)

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with some rows alone."""
        self.cache = [kept[:, rows] for kept in self.cache]
        self.pads, self.bias = self.pads[rows], self.bias[rows]

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Appends a token to each row, [rows]; gives the logits of the next, [rows, vocabulary]."""
        at, self.length = self.length, self.length + 1
        if self.cache[0].shape[3] == at:
            self.cache = [F.pad(kept, (0, 0, 0, max(ROOM, at // 2))) for kept in self.cache]
        turn = self.turns[:, at - self.pads, None]
        bias = self.bias[:, : self.length].repeat_interleave(self.groups, 0)[:, None]
        x = self.model.embed_tokens(ids)
        for layer, qkv, kept in zip(self.model.layers, self.qkv, self.cache, strict=True):
            own = F.linear(_norm(x, layer.input_layernorm), qkv).unflatten(1, (-1, self.dim))
            x = x + self._attend(layer.self_attn, own, kept, turn, bias)
            h = _norm(x, layer.post_attention_layernorm)
            x = x + (self._experts(layer.mlp, h) if hasattr(layer.mlp, "experts") else layer.mlp(h))
        logits: torch.Tensor = self.head(_norm(x, self.model.norm))
        return logits

    def _attend(
        self, part: Any, own: torch.Tensor, kept: torch.Tensor, turn: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """own: queries, keys and values of the new tokens, [rows, heads, dim]; kept: keys and values so far, [2, rows,
        groups, room, dim]. Queries that share a key are rows of one product, so no key is repeated."""
        queries, keys, values = own.split((self.queries, self.groups, self.groups), 1)
        queries, keys = _turned(_norm(queries, part.q_norm), turn), _turned(_norm(keys, part.k_norm), turn)
        kept[0, :, :, self.length - 1], kept[1, :, :, self.length - 1] = keys, values
        keys, values = kept[:, :, :, : self.length].flatten(1, 2)
        queries = queries.reshape(len(keys), -1, self.dim)
        weights = torch.baddbmm(bias, queries, keys.mT, alpha=part.scaling).softmax(-1)
        out: torch.Tensor = part.o_proj(torch.bmm(weights, values).view(len(own), -1))
        return out

    def _experts(self, part: Any, h: torch.Tensor) -> torch.Tensor:
        """Tokens sorted by expert, so that each expert's are one product. h: [rows, hidden]."""
        chances, chosen = F.linear(h, part.gate.weight).softmax(-1).topk(self.config.num_experts_per_tok, -1)
        if self.config.norm_topk_prob:
            chances = chances / chances.sum(-1, keepdim=True)
        experts, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, self.numbers, right=True, out_int32=True)
        rows = order // chosen.shape[1]
        gate, up = F.grouped_mm(h[rows], part.experts.gate_up_proj.mT, offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, part.experts.down_proj.mT, offs=ends) * chances.flatten()[order, None]
        return torch.zeros_like(h).index_add_(0, rows, out)


def _fused(attention: Any) -> torch.Tensor:
    """One matrix in the place of three, which become views of it."""
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    whole = torch.cat([part.data for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = view
    return whole


def _norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """The rotary embedding: x cos + (-second half, first half) sin; the sign stands with the sine."""
    return x * turn[0] + x.roll(x.shape[-1] // 2, -1) * turn[1]
