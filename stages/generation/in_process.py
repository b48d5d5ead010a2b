"""The in-process sampler: a transformers model reads the prompts, and a decoder continues from its cache.

`Decoder` has the formulas of Qwen3, dense or with experts. After the prompts, a step of a small model spends most time
around its arithmetic: modules, new masks, caches copied to grow by a token, keys repeated for each query head. This
decoder needs some thirty operations a layer, on a cache that is written in place. Tests compare its logits with
transformers'. `LibraryDecoder` is for all other architectures.

The log-probabilities are those of the exact distribution from which a token was drawn. Every answer has a random stream
of its own, so it does not depend on the other prompts of a batch, up to the rounding of a batched matrix product.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from stages.generation.protocols import Completion, Prompt, Sampler, SamplerContext
from stages.mcore import gpu

# Answers that are drawn in parallel, which bounds the cache.
ROWS = 256
# The share of unfinished rows below which the cache is copied without the finished ones.
COMPACT_BELOW = 0.75
# Models whose formulas `Decoder` has.
CLASSES = (Qwen3ForCausalLM, Qwen3MoeForCausalLM)
NAMES = " and ".join(kind.__name__ for kind in CLASSES)
# Tokens of prompts that are read together, including padding: the activations of more do not fit into the processor's
# caches.
READ_TOKENS = 1024
# Minimum tokens by which the cache grows.
ROOM_TOKENS = 64


class InProcess(Sampler):
    """Draws with the model of a Hugging Face config, on this process's device, in fp32 on CPU."""

    def __init__(
        self,
        config: Mapping[str, Any] | Path,
        stops: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        rows: int = ROWS,
    ) -> None:
        """Makes the model.

        Args:
            config: Content of config.json, or the folder of an exported model, whose weights are then loaded.
            stops: Ids of the tokens that end an answer.
            max_new_tokens: Maximum number of tokens of an answer.
            temperature: Temperature of sampling.
            rows: Answers that are drawn in parallel.
        """
        if isinstance(config, Path):
            self.model = AutoModelForCausalLM.from_pretrained(config, dtype=torch.float32, local_files_only=True).eval()
        else:
            hf_config = AutoConfig.for_model(**config)
            self.model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
        # No gradients: the weights are overwritten in place between two steps.
        self.model.to(gpu.start()).requires_grad_(False)
        self.decoder: Decoder | LibraryDecoder
        if isinstance(self.model, CLASSES):
            self.decoder = Decoder(self.model)
        else:
            self.decoder = LibraryDecoder(self.model)
        self.stops, self.max_new_tokens = frozenset(stops), max_new_tokens
        self.temperature, self.rows = temperature, rows
        # The digest of the weights, if they have one.
        self.policy = ""
        # Weights change only between two calls, never while a batch is drawn.
        self.lock = threading.Lock()

    @classmethod
    def create(cls, context: SamplerContext) -> Self:
        # The sampler computes in fp32, whatever the trainer's type is.
        config = {**context.config, "dtype": "float32", "torch_dtype": "float32"}
        return cls(config, context.stops, context.settings.max_new_tokens)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Loads the weights once no other thread draws."""
        with self.lock:
            load_weights(self.model, tensors)
            self.policy = getattr(tensors, "digest", "")

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        completions: dict[int, Completion] = {}
        # Prompts of similar length share a batch, so that little of it is padding.
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
                # Copying the cache costs as much as some steps, so it is done rarely.
                if remaining <= COMPACT_BELOW * len(active):
                    kept = unfinished.nonzero()[:, 0]
                    self.decoder.select(kept.to(device))
                    active, next_tokens, unfinished = active[kept], next_tokens[kept], unfinished[kept]
            # The logits after the last token would not be used.
            if step + 1 == max_tokens:
                break
            logits = self.decoder.step(next_tokens.to(device)).float()
        completions = []
        for ids, logprobs in zip(tokens.T.tolist(), log_probs.T.tolist(), strict=True):
            # A finished row is decoded on until the cache is compacted; what follows its stop token is dropped.
            end = next((n for n, token in enumerate(ids) if token in self.stops), max_tokens - 1) + 1
            drawn_by = ((self.policy, end),) if self.policy else ()
            completions.append(
                Completion(tuple(ids[:end]), tuple(logprobs[:end]), ids[end - 1] in self.stops, versions=drawn_by)
            )
        return completions

    def _noise(self, prompts: list[Prompt]) -> torch.Tensor:
        """Returns uniform numbers in (0, 1), [rows, steps]: one for each token that may be drawn."""
        rows = [
            # On the host, whose generator gives the same numbers on every machine.
            torch.rand(self.max_new_tokens, generator=torch.Generator().manual_seed(p.seed % 2**63))
            for p in prompts
        ]
        return torch.stack(rows).double()

    def _choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns tokens [rows] and their log-probabilities.

        A token is where the distribution function reaches the random number.

        It computes where the logits are, and brings only the tokens to the host.
        """
        # A greedy answer states log-probabilities at temperature 1.
        probabilities = (logits if noise is None else logits / self.temperature).softmax(-1)
        if noise is None:
            tokens = probabilities.argmax(-1)
        else:
            # In fp64: the rounding of an fp32 sum over a vocabulary would shift the probabilities of its last tokens.
            cumulative = probabilities.cumsum(-1, dtype=torch.float64)
            thresholds = noise[:, None].to(logits.device) * cumulative[:, -1:]
            tokens = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)
        return tokens.cpu(), probabilities.gather(1, tokens[:, None]).squeeze(1).log().cpu()


def load_weights(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Loads weights by their exported names into a transformers model.

    Raises:
        ValueError: A tensor is unexpected.
        KeyError: A tensor is missing.
        RuntimeError: A tensor has another shape.
    """
    parameters = model.state_dict()  # with biases of experts, which are buffers
    if model.config.tie_word_embeddings:
        # It is the same tensor as the embedding, which is loaded by its own name.
        parameters.pop("lm_head.weight", None)
    # Where the export names each expert, the model has them stacked.
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


class Decoder:
    """Decodes rows with the parameters of a model, which it reads in place, so that they may be overwritten."""

    def __init__(self, model: Any) -> None:
        if not isinstance(model, CLASSES):
            raise TypeError(f"the decoder draws from {NAMES} models, not from {type(model).__name__}")
        self.reader, self.model = model, model.model
        self.head, self.config = model.lm_head, model.config
        self.groups, self.dim = self.config.num_key_value_heads, self.config.head_dim
        self.queries = self.config.num_attention_heads
        # One product instead of three in each layer.
        self.qkv = [_fuse_qkv(layer.self_attn) for layer in self.model.layers]
        self.device = model.device
        self.expert_ids = torch.arange(getattr(self.config, "num_experts", 0), device=model.device)

    def read(self, prompts: Sequence[tuple[int, ...]], room: int) -> torch.Tensor:
        """Fills the cache with prompts, the shortest first, with room for more tokens.

        Returns the logits after each, [prompts, vocabulary]. Equal prompts, such as those of a group, are read
        once.
        """
        width = max(len(ids) for ids in prompts)
        # The answers of a group have one question, which is read once and copied.
        unique_prompts = list(dict.fromkeys(prompts))
        # Prompts are padded on the left to one width, so that all rows end at the same column.
        prompt_cache = self.allocate_cache(len(unique_prompts), width)
        logits, start = [], 0
        while start < len(unique_prompts):
            batch = [unique_prompts[start]]
            while (
                start + len(batch) < len(unique_prompts)
                and (len(batch) + 1) * len(unique_prompts[start + len(batch)]) <= READ_TOKENS
            ):
                batch.append(unique_prompts[start + len(batch)])
            longest = len(batch[-1])
            pads = torch.tensor([longest - len(ids) for ids in batch])
            positions = torch.arange(longest) - pads[:, None]
            cache = DynamicCache(config=self.config)
            output = self.reader(
                # Any id may stand for padding, which the mask hides.
                torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in batch], device=self.device),
                attention_mask=(positions >= 0).long().to(self.device) if pads.any() else None,
                position_ids=positions.clamp_min(0).to(self.device),
                **{cache_argument(self.reader): cache},
                logits_to_keep=1,
            )
            logits.append(output.logits[:, -1].float().cpu())
            for layer_cache, layer in zip(prompt_cache, cache.layers, strict=True):
                layer_cache[:, start : start + len(batch), :, width - longest :] = torch.stack(
                    (layer.keys, layer.values)
                )
            start += len(batch)
        index_of = {ids: n for n, ids in enumerate(unique_prompts)}
        rows = torch.tensor([index_of[ids] for ids in prompts])
        pads = torch.tensor([width - len(ids) for ids in prompts])
        caches = [layer_cache[:, rows.to(self.device)] for layer_cache in prompt_cache]
        self.start(caches, pads.to(self.device), width + room)
        return torch.cat(logits)[rows]

    def allocate_cache(self, rows: int, length: int) -> list[torch.Tensor]:
        """Returns empty keys and values, for each layer [2, rows, groups, length, dim]."""
        shape = (2, rows, self.groups, length, self.dim)
        return [torch.zeros(shape, device=self.device) for _ in self.qkv]

    def start(self, cache: list[torch.Tensor], pads: torch.Tensor, longest: int) -> None:
        """Continues from the cache that transformers has filled.

        Args:
            cache: As `allocate_cache` returns it.
            pads: Padding on the left of each row, [rows].
            longest: The maximum length of a row.
        """
        self.cache, self.pads, self.length = cache, pads, cache[0].shape[3]
        positions = torch.arange(longest, device=pads.device)[None]
        cos, sin = self.model.rotary_emb(self.cache[0][0], positions)
        # The sign of the rotation is stored with the sine, which saves an operation for each token.
        first, second = sin.chunk(2, -1)
        self.rotary = torch.cat((cos, torch.cat((-first, second), -1)))  # [2, longest, dim]
        self.bias = torch.zeros(len(pads), longest, device=pads.device).masked_fill_(
            positions < pads[:, None], -torch.inf
        )

    def select(self, rows: torch.Tensor) -> None:
        """Keeps only some rows."""
        self.cache = [layer_cache[:, rows] for layer_cache in self.cache]
        self.pads, self.bias = self.pads[rows], self.bias[rows]

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Appends a token to each row, [rows]; returns the logits of the next token, [rows, vocabulary]."""
        position, self.length = self.length, self.length + 1
        # The cache grows by half its length, so that it is copied seldom.
        if self.cache[0].shape[3] == position:
            self.cache = [F.pad(layer_cache, (0, 0, 0, max(ROOM_TOKENS, position // 2))) for layer_cache in self.cache]
        rotary = self.rotary[:, position - self.pads, None]
        # Padding is masked by minus infinity, once for each group of heads.
        bias = self.bias[:, : self.length].repeat_interleave(self.groups, 0)[:, None]
        x = self.model.embed_tokens(ids)
        for layer, qkv, layer_cache in zip(self.model.layers, self.qkv, self.cache, strict=True):
            projected = F.linear(_norm(x, layer.input_layernorm), qkv).unflatten(1, (-1, self.dim))
            x = x + self._attend(layer.self_attn, projected, layer_cache, rotary, bias)
            h = _norm(x, layer.post_attention_layernorm)
            x = x + (self._experts(layer.mlp, h) if hasattr(layer.mlp, "experts") else layer.mlp(h))
        logits: torch.Tensor = self.head(_norm(x, self.model.norm))
        return logits

    def _attend(
        self,
        attention: Any,
        projected: torch.Tensor,
        layer_cache: torch.Tensor,
        rotary: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the output of an attention layer for the new tokens.

        Queries that share a key are rows of one product, so no key is repeated.

        Args:
            attention: Attention module of the layer.
            projected: Queries, keys and values of the new tokens, [rows, heads, dim].
            layer_cache: Keys and values so far, [2, rows, groups, room, dim]; the new ones are written into it.
            rotary: Cosine and signed sine of the new tokens' positions, as `_rotate` reads them.
            bias: 0, or minus infinity where a position is padding, [rows * groups, 1, length].
        """
        queries, keys, values = projected.split((self.queries, self.groups, self.groups), 1)
        queries, keys = (
            _rotate(_norm(queries, attention.q_norm), rotary),
            _rotate(_norm(keys, attention.k_norm), rotary),
        )
        layer_cache[0, :, :, self.length - 1], layer_cache[1, :, :, self.length - 1] = keys, values
        keys, values = layer_cache[:, :, :, : self.length].flatten(1, 2)
        queries = queries.reshape(len(keys), -1, self.dim)
        weights = torch.baddbmm(bias, queries, keys.mT, alpha=attention.scaling).softmax(-1)
        output: torch.Tensor = attention.o_proj(torch.bmm(weights, values).view(len(projected), -1))
        return output

    def _experts(self, moe: Any, h: torch.Tensor) -> torch.Tensor:
        """Returns the output of the experts. Tokens are sorted by expert, so that each expert's are one product.

        Args:
            moe: Module of the layer's router and experts.
            h: Hidden states of the new tokens, [rows, hidden].
        """
        probabilities, selected = F.linear(h, moe.gate.weight).softmax(-1).topk(self.config.num_experts_per_tok, -1)
        if self.config.norm_topk_prob:
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        # A stable sort, so that the sums of a token's experts have one order.
        experts, order = selected.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, self.expert_ids, right=True, out_int32=True)
        rows = order // selected.shape[1]
        gate, up = F.grouped_mm(h[rows], moe.experts.gate_up_proj.mT, offs=ends).chunk(2, -1)
        output = (
            F.grouped_mm(F.silu(gate) * up, moe.experts.down_proj.mT, offs=ends) * probabilities.flatten()[order, None]
        )
        return torch.zeros_like(h).index_add_(0, rows, output)


def _fuse_qkv(attention: Any) -> torch.Tensor:
    """Fuses the three projections into one matrix, of which they become views."""
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    fused = torch.cat([part.data for part in parts])
    for part, view in zip(parts, fused.split([len(part) for part in parts]), strict=True):
        part.data = view
    return fused


def _norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Returns the rotary embedding: x cos + (-second half, first half) sin; the sign is stored with the sine."""
    return x * rotary[0] + x.roll(x.shape[-1] // 2, -1) * rotary[1]


def cache_argument(model: Any) -> str:
    """Returns the name of the cache's argument in this version of transformers."""
    return "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"


class LibraryDecoder:
    """Decodes rows by a transformers model's own forward pass.

    It is slower, and for any architecture whose cache transformers can cut by rows. The model's parameters may be
    overwritten in place.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def read(self, prompts: Sequence[tuple[int, ...]], room: int) -> torch.Tensor:
        """Fills the cache with prompts, padded on the left.

        Returns the logits after each, [prompts, vocabulary]. The cache grows by itself: `room` is not needed.
        """
        width = max(len(ids) for ids in prompts)
        self.cache = DynamicCache(config=self.model.config)
        self.mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        return self._forward(torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])).cpu()

    def select(self, rows: torch.Tensor) -> None:
        """Keeps only some rows."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows.cpu()]

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Appends a token to each row, [rows]; returns the logits of the next token, [rows, vocabulary]."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self._forward(ids[:, None])

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits after the last of some new tokens, [rows, vocabulary]."""
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
