"""The two kinds of layers of Qwen3-Next for Megatron: a gated delta net, and attention with a gate.

They are PyTorch's operations around Megatron's matrices, on every device: no kernel written for the delta rule is used.
Megatron has a GatedDeltaNet too, which needs such a kernel to be imported, and takes no rows of several documents; a
test compares with it.

A head has a state S [dim of a key, dim of a value]. A token with query q, key k, value v, decay exp(g) and rate beta
changes it, and reads it (Yang et al., 2024, "Gated Delta Networks", arXiv:2412.06464):

    S <- exp(g) S        S <- S + k (beta (v - S^T k))^T        output = S^T q / sqrt(dim of a key)

By chunks of tokens, only the states between chunks are computed one after the other. The state and the convolution
start anew with each document, by masks and not by rows of their own, so a row costs the same however it is divided.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from pipeline.core.errors import RecipeError
from stages.mcore import layer_spec as layers
from stages.mcore.megatron_imports import (
    MegatronModule,
    TransformerConfig,
    get_transformer_layer_offset,
    tensor_parallel,
)
from stages.mcore.qkv import SelfAttention, rotate
from stages.mcore.row_tables import Documents
from stages.models.qwen3_next import CHUNK

# isort: split

EPSILON = 1e-6
"""A number added to the squared length of queries and keys before they are divided by its root."""


def layer_spec(config: TransformerConfig, virtual_stage: int | None = None, packed: bool = False) -> Any:
    """As `stages.mcore.layer_spec.layer_spec`. Raises RecipeError with Transformer Engine."""
    if layers.uses_transformer_engine(config.params_dtype):
        raise RecipeError(
            "model.architecture = qwen3_next has no layers of Transformer Engine here, which this environment would "
            "use; set the phase's precision to fp32, or use an environment without it"
        )
    block = layers.layer_spec(config, virtual_stage, packed)
    first = get_transformer_layer_offset(config, vp_stage=virtual_stage)
    specs = []
    for layer, spec in enumerate(block.layer_specs, first):
        attention = spec.submodules.self_attention
        if config.linear_attention_freq[layer]:
            attention = ModuleSpec(module=GatedDeltaNet)
        else:
            attention = ModuleSpec(GatedAttention, attention.params, attention.submodules)
        specs.append(ModuleSpec(spec.module, spec.params, replace(spec.submodules, self_attention=attention)))
    return replace(block, layer_specs=specs)


class GatedDeltaNet(MegatronModule):  # type: ignore[misc]
    """Linear attention by the gated delta rule.

    Names and sizes of its parameters are those of Megatron's class, their rows in the order of key heads
    (`Qwen3NextConfig.shapes`).
    """

    def __init__(self, config: TransformerConfig, layer_number: int, pg_collection: Any, **_: Any) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        ranks = pg_collection.tp.size()
        self.heads = config.linear_num_key_heads // ranks
        self.group = config.linear_num_value_heads // config.linear_num_key_heads
        self.key, self.value = config.linear_key_head_dim, config.linear_value_head_dim
        rows = 2 * self.key + self.group * (2 * self.value + 2)  # of a key head
        words = {"config": config, "bias": False, "is_expert": False, "tp_group": pg_collection.tp}
        self.in_proj = tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            config.linear_num_key_heads * rows,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            **words,
        )
        channels = self.heads * (2 * self.key + self.group * self.value)
        self.conv1d = torch.nn.Conv1d(channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        self.dt_bias = torch.nn.Parameter(torch.ones(self.heads * self.group))
        self.A_log = torch.nn.Parameter(torch.zeros(self.heads * self.group))
        self.out_norm = layers.RMSNorm(config, self.value, config.layernorm_epsilon)
        # Unlike the other norms of the model this one multiplies by its weight alone, but in fp32 as they do.
        self.out_norm.offset = 0
        self.out_proj = tensor_parallel.RowParallelLinear(
            config.linear_num_value_heads * self.value,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **words,
        )

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The output of the layer in the shape of `hidden`, [sequence, batch, hidden], and no bias.

        `attention_mask` is `starts` of `row_tables.Tables`.
        """
        if settings.get("inference_context") is not None or settings.get("packed_seq_params") is not None:
            raise NotImplementedError("a state for generation, or Megatron's own kind of packed rows")
        mixed = self.in_proj(hidden)[0].transpose(0, 1)
        mixed = mixed.unflatten(2, (self.heads, -1))
        value = self.group * self.value
        inputs, gate, rates_and_decays = mixed.split([2 * self.key + value, value, 2 * self.group], -1)
        tables = self.config.rows.of(attention_mask, mixed.shape[1], mixed.device)
        if tables.prefixes is None:
            out = self._attend(inputs, rates_and_decays, tables.device_starts)
        else:
            out = self._attend_with_prefixes(inputs, rates_and_decays, tables.documents(len(mixed)))
        gate = gate.unflatten(-1, (self.group, -1)).flatten(2, 3)  # [batch, sequence, value heads, dim]
        out = (self.out_norm(out) * F.silu(gate.float())).to(hidden.dtype)
        result: tuple[Tensor, Tensor | None] = self.out_proj(out.flatten(2).transpose(0, 1).contiguous())
        return result

    def _attend(self, inputs: Tensor, rates_and_decays: Tensor, starts: Tensor | None) -> Tensor:
        """Takes queries, keys and values, and rates and decays, both [batch, sequence, key heads, ...].

        Returns [batch, sequence, value heads, dim].
        """
        convolved = short_convolution(inputs.flatten(2), self.conv1d.weight, starts).unflatten(2, (self.heads, -1))
        query, key, value = convolved.split([self.key, self.key, self.group * self.value], -1)
        # Each query and key head serves a group of value heads.
        query, key = (_unit(x.float()).repeat_interleave(self.group, 2) for x in (query, key))
        rate, decay = (x.flatten(2) for x in rates_and_decays.split(self.group, -1))
        # The logarithm of what is left of the state, so it is never above 0.
        decay = -self.A_log.float().exp() * F.softplus(decay.float() + self.dt_bias.float())
        out = gated_delta_rule(
            query, key, value.unflatten(-1, (self.group, -1)).flatten(2, 3), decay, rate.float().sigmoid(), starts
        )
        return out

    def _attend_with_prefixes(self, inputs: Tensor, rates_and_decays: Tensor, documents: Documents) -> Tensor:
        """Each document runs after a copy of its prefix, all side by side in one row."""
        assert documents.gathered is not None
        ends, first = documents.keys.long(), documents.queries.long()
        counts = first.diff()
        starts = ends[:-1].repeat_interleave(ends.diff())[None]
        values, rates = (x.flatten(0, 1).index_select(0, documents.gathered)[None] for x in (inputs, rates_and_decays))
        out = self._attend(values, rates, starts)[0]
        # A document's own tokens are the last ones of its copy.
        places = torch.arange(int(first[-1]), device=out.device) + (ends[1:] - first[1:]).repeat_interleave(counts)
        taken: torch.Tensor = out.index_select(0, places).unflatten(0, inputs.shape[:2])
        return taken


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)


class GatedAttention(SelfAttention):
    """Grouped-query attention whose output is multiplied by a gate, with rotary embedding of a part of each head."""

    def get_query_key_value_tensors(self, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """As its base class, and the gates [sequence, batch, heads, dim]."""
        mixed, _ = self.linear_qkv(hidden)
        mixed = mixed.unflatten(2, (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head))
        queries = (mixed.shape[3] - 2) // 2
        query, gate, key, value = mixed.split([queries, queries, 1, 1], 3)
        cos, sin = self.config.rows.of(self.starts, mixed.shape[0], mixed.device).rotary
        query, key = (
            rotate(norm(x).permute(1, 2, 3, 0, 4), cos, sin)
            for x, norm in ((query, self.q_layernorm), (key, self.k_layernorm))
        )
        heads = (x.flatten(1, 2).permute(2, 0, 1, 3) for x in (query, key, value.permute(1, 2, 3, 0, 4)))
        return *heads, gate.flatten(2, 3)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, starts: Tensor | None = None
) -> Tensor:
    """Returns the outputs of the gated delta rule in the shape and type of value; the arithmetic is fp32.

    Args:
        query: [rows, length, heads, dim], of length 1 each.
        key: As query.
        value: [rows, length, heads, dim of a value].
        g: The logarithm of what is left of the state after each token, [rows, length, heads].
        beta: The rate at which each token writes, [rows, length, heads].
        starts: The first position of each position's document, [rows, length], or None if a row is one document.
    """
    length, kind = value.shape[1], value.dtype
    chunks = -(-length // CHUNK)
    query, key, value, g, beta = (_by_chunks(x, chunks) for x in (query, key, value, g, beta))
    position = torch.arange(chunks * CHUNK, device=value.device).view(1, chunks, CHUNK)
    if starts is None:
        starts = torch.zeros_like(position)
    else:
        # Padding is a document of its own, which begins beyond the row.
        starts = F.pad(starts, (0, chunks * CHUNK - length), value=length).view(-1, chunks, CHUNK)
    same = (starts[..., None] == starts[..., None, :])[:, None]  # [rows, 1, chunks, CHUNK, CHUNK]
    earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=value.device).tril()
    goes_on = (starts < position[..., :1])[:, None].unsqueeze(-1)  # the document began before the chunk

    decay = g.cumsum(-1)  # of the chunk up to a token
    difference = (decay[..., None] - decay[..., None, :]).masked_fill(~(same & earlier), -torch.inf).exp()
    from_before = decay.exp()[..., None] * goes_on
    # within a chunk, what a token writes depends on what the earlier ones wrote: a triangular system
    weights = beta[..., None] * (key @ key.mT) * difference
    system = weights.tril(-1) + torch.eye(CHUNK, device=value.device)
    written = torch.linalg.solve_triangular(
        system, torch.cat((value, key * from_before), -1) * beta[..., None], upper=False, unitriangular=True
    )
    written, read = written.split((value.shape[-1], key.shape[-1]), -1)
    query = query / math.sqrt(query.shape[-1])
    scores = (query @ key.mT) * difference
    query = query * from_before
    # what of a chunk is in the state after it: the document of its last token
    kept = key * difference[..., -1, :, None]
    carried = from_before[..., -1:, :]

    state, outputs = value.new_zeros(*value.shape[:2], key.shape[-1], value.shape[-1]), []
    for n in range(chunks):
        new = written[:, :, n] - read[:, :, n] @ state
        outputs.append(query[:, :, n] @ state + scores[:, :, n] @ new)
        state = state * carried[:, :, n] + kept[:, :, n].mT @ new
    out = torch.stack(outputs, 2).flatten(2, 3)[:, :, :length]
    return out.transpose(1, 2).to(kind)


def _by_chunks(x: Tensor, chunks: int) -> Tensor:
    """Cuts [rows, length, heads, ...] into fp32 chunks, [rows, heads, chunks, CHUNK, ...].

    They are padded with zeros, which write nothing.
    """
    x = x.transpose(1, 2).float()
    padding = (0, 0) * (x.dim() - 3) + (0, chunks * CHUNK - x.shape[2])
    padded: Tensor = F.pad(x, padding).unflatten(2, (chunks, CHUNK))
    return padded


def short_convolution(x: Tensor, weight: Tensor, starts: Tensor | None = None) -> Tensor:
    """Each channel's causal convolution, and SiLU.

    x: [rows, length, channels]; weight: [channels, 1, width], the last of which multiplies the token itself;
    starts: as above.
    """
    width = weight.shape[-1]
    if starts is None:
        padded = F.pad(x.transpose(1, 2), (width - 1, 0))
        return F.silu(F.conv1d(padded, weight, groups=len(weight)).transpose(1, 2))
    position = torch.arange(x.shape[1], device=x.device)
    # A sum over the width: the kernel of a convolution would reach back into the document before.
    out = x * weight[:, 0, -1]
    for back in range(1, min(width, x.shape[1])):
        inside = (position[back:] - back >= starts[:, back:])[..., None]
        out = out + F.pad(x[:, :-back] * inside * weight[:, 0, -1 - back], (0, 0, back, 0))
    return F.silu(out)
