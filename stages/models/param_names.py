"""Global tensor names: the names in a sealed checkpoint, independent of layout and kernels.

A global name is Megatron's name of the tensor in the unfused layer, with the layer and expert counted over the whole
model: `decoder.layers.7.mlp.experts.local_experts.3.linear_fc1.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")

_RENAMED = {
    # Transformer Engine keeps a norm inside the linear layer that follows it.
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    # lora_layers.py: a matrix with an adapter
    ".parametrizations.weight.original": ".weight",
    ".parametrizations.weight.0.lora_": ".lora_",
}

EMBEDDING = "embedding.word_embeddings.weight"
"""The table of the vocabulary, which is the output head too if they are tied."""
BUFFERS = (".expert_bias",)
"""Suffixes of the names of buffers that training changes without a gradient: the optimizer has no moments of them."""


CUT_MATRICES = (
    ".word_embeddings.weight",
    ".linear_qkv.weight",
    ".linear_q_proj.weight",
    ".linear_q_up_proj.weight",
    ".linear_kv_up_proj.weight",
    ".linear_proj.weight",
    ".linear_fc1.weight",
    ".linear_fc2.weight",
    "output_layer.weight",
)
"""Endings of the names of matrices that tensor parallelism cuts."""
WHOLE_MATRICES = (".router.weight", ".linear_q_down_proj.weight", ".linear_kv_down_proj.weight")
"""Endings of the names of matrices that each tensor rank has whole."""
CUT_FACTORS = (".linear_qkv.lora_B", ".linear_proj.lora_A", ".linear_fc1.lora_B", ".linear_fc2.lora_A")
"""Endings of the names of an adapter's factors that tensor parallelism cuts; it leaves the others whole."""
MATRICES = (*CUT_MATRICES, *WHOLE_MATRICES)
"""Endings of the names of all matrices."""
BIASES = (".linear_qkv.bias",)
"""Endings of the names of biases, which are zero at first, and which tensor parallelism cuts."""
INTO_THE_STREAM = (".linear_proj.weight", ".linear_fc2.weight")
"""Endings of the names of matrices that write into the residual stream: their columns are cut."""


def global_name(local: str, layers: Sequence[int] | None = None, first_expert: int = 0) -> str:
    """The global name of a parameter of this rank's model.

    local: its name in `GPTModel.named_parameters()`, with either layer specification.
    layers: the model's index of each of this rank's layers; None: they are its first ones.
    first_expert: the model's index of this rank's first expert.
    """
    name = local.removeprefix("module.")
    if layers is not None:
        name = _LAYER.sub(lambda m: f"decoder.layers.{layers[int(m[1])]}.", name)
    for megatron, ours in _RENAMED.items():
        name = name.replace(megatron, ours)
    # Transformer Engine's grouped experts are one module with numbered weights.
    name = _GROUPED.sub(lambda m: f"mlp.experts.local_experts.{m[3]}.{m[1]}.{m[2]}", name)
    # An expert rank numbers its own experts from 0.
    return _EXPERT.sub(lambda m: f"mlp.experts.local_experts.{int(m[1]) + first_expert}.", name)


def is_cut(name: str) -> bool:
    """Returns True if tensor parallelism cuts the tensor of that global name. Raises ValueError for an unknown name."""
    if name.endswith((*CUT_MATRICES, *BIASES)):
        return True
    if name.endswith((".lora_A", ".lora_B")):
        return name.endswith(CUT_FACTORS)
    if not name.endswith(("norm.weight", *WHOLE_MATRICES, *BUFFERS)):
        raise ValueError(f"there is no rule for the cut of {name}; add one to stages/models/param_names.py")
    return False
