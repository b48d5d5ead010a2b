"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) with this project's kernels and packed rows.

A token's queries come from one narrow latent, the keys and values of all its heads from another, each normalized in
between; a part of the key, which turns with the position, is the same for all heads. Megatron's own layer of this kind
reads its positions from elsewhere, and cuts the matrices of the latents unless Transformer Engine is there; its
settings (MLATransformerConfig) and linear layers are used here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.mcore import layer_spec as layers
from stages.mcore.megatron_imports import AttnMaskType, MegatronModule, TransformerConfig, tensor_parallel

# isort: split
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec


def latent_layer_spec(config: TransformerConfig, virtual_stage: int | None = None, packed: bool = False) -> Any:
    """As `layer_spec.layer_spec`, with latent attention in each layer."""
    block = layers.layer_spec(config, virtual_stage, packed)
    # Layers of one kind share a spec, which is changed once.
    for spec in {id(spec): spec for spec in block.layer_specs}.values():
        spec.submodules.input_layernorm = block.layer_norm
        spec.submodules.self_attention = ModuleSpec(module=LatentAttention, params={"packed": packed})
    return block


class LatentAttention(MegatronModule):  # type: ignore[misc]
    """The attention of a layer. packed: rows hold several documents."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        packed: bool,
        pg_collection: ProcessGroupCollection | None = None,
        cp_comm_type: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = groups.tp
        heads, c = config.num_attention_heads, config
        keys = c.qk_head_dim + c.qk_pos_emb_head_dim
        norm: Any = layers.RMSNorm
        # Megatron cuts these matrices unless Transformer Engine is there.
        down: Any = partial(WholeLinear, tp_group=groups.tp)
        up: Any = tensor_parallel.ColumnParallelLinear
        out: Any = tensor_parallel.RowParallelLinear
        core: Any = WidenedAttention
        if layers.uses_transformer_engine(config.params_dtype):
            from megatron.core.extensions import transformer_engine as te

            norm, up, out = te.TENorm, te.TEColumnParallelLinear, te.TERowParallelLinear
            whole = {"parallel_mode": "duplicated", "skip_weight_param_allocation": False, "is_expert": False}
            down = partial(te.TELinear, init_method=c.init_method, bias=False, skip_bias_add=False, **whole)
            if not packed:
                widths = {"k_channels": keys, "v_channels": c.v_head_dim}
                kind = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", "cp_comm_type": cp_comm_type}
                core = partial(
                    te.TEDotProductAttention, layer_number=layer_number, pg_collection=groups, **widths, **kind
                )
        common = {"config": c, "bias": False, "is_expert": False, "tp_group": groups.tp}
        up = partial(up, init_method=c.init_method, gather_output=False, skip_bias_add=False, **common)
        if c.q_lora_rank is None:
            self.linear_q_proj = up(c.hidden_size, heads * keys)
        else:
            self.linear_q_down_proj = down(c.hidden_size, c.q_lora_rank, config=c)
            self.q_layernorm = norm(config=c, hidden_size=c.q_lora_rank, eps=c.layernorm_epsilon)
            self.linear_q_up_proj = up(c.q_lora_rank, heads * keys)
        self.linear_kv_down_proj = down(c.hidden_size, c.kv_lora_rank + c.qk_pos_emb_head_dim, config=c)
        self.kv_layernorm = norm(config=c, hidden_size=c.kv_lora_rank, eps=c.layernorm_epsilon)
        self.linear_kv_up_proj = up(c.kv_lora_rank, heads * (c.qk_head_dim + c.v_head_dim))
        self.core_attention = core(config=c, softmax_scale=c.softmax_scale)
        of_output = {"init_method": c.output_layer_init_method, "input_is_parallel": True, "skip_bias_add": True}
        self.linear_proj = out(heads * c.v_head_dim, c.hidden_size, **of_output, **common)

    def forward(self, hidden: Tensor, attention_mask: Any, **settings: Any) -> Any:
        """The output of the attention in the shape of `hidden`, [this rank's share of the sequence, batch, hidden].

        `attention_mask` is `starts` of `row_tables.Tables`.
        """
        if settings.get("inference_context") is not None or settings.get("packed_seq_params") is not None:
            raise NotImplementedError("a cache of keys and values, or Megatron's own kind of packed rows")
        out = self.core_attention(
            *self.heads(hidden, attention_mask), attention_mask, attn_mask_type=AttnMaskType.causal
        )
        return self.linear_proj(out)

    def heads(self, hidden: Tensor, starts: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of this tensor rank's heads, each [sequence, batch, heads, dim]."""
        c = self.config
        if c.q_lora_rank is None:
            q, _ = self.linear_q_proj(hidden)
        else:
            q, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)[0]))
        latent, _ = self.linear_kv_down_proj(hidden)
        latent, shared = latent.split([c.kv_lora_rank, c.qk_pos_emb_head_dim], -1)
        # The heads of a rank need the shared part of the keys of all tokens; the up-projection gathers the rest by
        # itself.
        if c.sequence_parallel:
            shared = tensor_parallel.gather_from_sequence_parallel_region(shared, group=self.tp_group)
        kv, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        q = q.unflatten(-1, (-1, c.qk_head_dim + c.qk_pos_emb_head_dim))
        kv = kv.unflatten(-1, (-1, c.qk_head_dim + c.v_head_dim))
        (plain, turned), (k, v) = (x.split([c.qk_head_dim, x.shape[-1] - c.qk_head_dim], -1) for x in (q, kv))
        cos, sin = (_by_token(x) for x in c.rows.of(starts, q.shape[0], q.device).rotary)
        # All heads share this part of the keys, so it is turned once.
        shared = rotate_pairs(shared.unsqueeze(2), cos, sin).expand(*k.shape[:-1], -1)
        q = torch.cat([plain, rotate_pairs(turned, cos, sin)], -1)
        return q, torch.cat([k, shared], -1), v.contiguous()


def _by_token(table: Tensor) -> Tensor:
    """Cosines or sines of `row_tables.Tables.rotary` as [sequence, batch or 1, 1, dim / 2]: each pair's angle."""
    half = table[..., : table.shape[-1] // 2]
    return half[:, None, None] if half.dim() == 2 else half[:, 0, 0].transpose(0, 1)[:, :, None]


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the neighbors 2i and 2i+1 of x, [..., dim], together; the result has all first ones, then all second ones.

    The arithmetic is fp32 for any type of x, the result has its type.
    """
    first, second = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class WidenedAttention(layers.Attention):
    """This project's attention for values of another width than keys.

    Its kernels want one width, so zeros fill the narrower ones, which changes no score, and the output is narrowed
    again.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **settings: Any) -> Tensor:
        """As `layer_spec.Attention`."""
        heads, width = v.shape[2:]
        wide = max(q.shape[-1], width)
        q, k, v = (x if x.shape[-1] == wide else F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
        out = super().forward(q, k, v, *rest, **settings)
        return out if wide == width else out.unflatten(2, (heads, wide))[..., :width].flatten(2)


class WholeLinear(torch.nn.Module):
    """A matrix without bias that every tensor rank has whole and applies to its share of the sequence.

    It is called as Megatron's linear layers are. Its gradient is summed over these ranks.
    """

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, tp_group: Any) -> None:
        super().__init__()
        # fake_quantization uses these names
        self.tp_group = tp_group
        self._forward_impl = F.linear
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        # Each tensor rank sees its share of the tokens only, so Megatron sums the gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self._forward_impl(x, self.weight), None
