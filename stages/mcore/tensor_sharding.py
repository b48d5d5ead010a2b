"""The part of a full tensor that a rank holds. Only this file defines the cuts of tensor parallelism.

A part is a list of boxes (one slice for each dimension) of the full tensor; the rank's local tensor is those boxes,
concatenated along the first dimension. Megatron-core's cuts: rows of embedding, output head, QKV and an expert's gate
and up; columns of the projections back into the residual stream; everything else is whole on every rank.
"""

from __future__ import annotations

import torch

from stages.mcore.megatron_imports import parallel_state
from stages.mcore.param_names import (
    BUFFERS,
    CUT_FACTORS,
    CUT_MATRICES,
    CUT_VECTORS,
    INTO_THE_STREAM,
    VECTORS,
    WHOLE_MATRICES,
)

Box = tuple[tuple[int, int], ...]
"""(start, stop) in each dimension of the full tensor."""


def boxes(name: str, shape: tuple[int, ...], tensor_rank: int | None = None) -> tuple[Box, ...]:
    """The boxes of this rank, or of another tensor rank of its group, for the tensor of that global name and full
    shape."""
    expert = ".experts." in name
    if expert:
        rank, size = parallel_state.get_expert_tensor_parallel_rank(), _expert_tensor_size()
    else:
        rank, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
    rank = rank if tensor_rank is None else tensor_rank
    full_box = tuple((0, n) for n in shape)
    if size == 1 or not is_cut(name):
        return (full_box,)
    if name.endswith((*INTO_THE_STREAM, "linear_proj.lora_A", "linear_fc2.lora_A")):
        n = shape[1] // size
        return ((full_box[0], (rank * n, (rank + 1) * n)),)
    blocks = 2 if ".linear_fc1." in name else 1  # gate above up, each cut separately
    block, n = shape[0] // blocks, shape[0] // blocks // size
    return tuple(((b * block + rank * n, b * block + (rank + 1) * n), *full_box[1:]) for b in range(blocks))


def is_cut(name: str) -> bool:
    """Whether tensor parallelism cuts the tensor of that global name. Raises ValueError for a name without a rule."""
    if name.endswith((*CUT_MATRICES, *CUT_VECTORS)):
        return True
    if name.endswith((".lora_A", ".lora_B")):
        return name.endswith(CUT_FACTORS)
    if not name.endswith(("norm.weight", *WHOLE_MATRICES, *BUFFERS, *VECTORS)):
        raise ValueError(f"there is no rule for the cut of {name}; add one to stages/mcore/tensor_sharding.py")
    return False


def is_copied(name: str) -> bool:
    """Whether tensor ranks hold the same of the tensor of that global name: not of one that is cut, nor of whole
    experts, of which each rank has its own."""
    return not is_cut(name) and (".experts." not in name or _expert_tensor_size() > 1)


def cut(full: torch.Tensor, parts: tuple[Box, ...]) -> torch.Tensor:
    """The local tensor that holds these boxes of the full one."""
    pieces = [full[_index(box)] for box in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def paste(full: torch.Tensor, parts: tuple[Box, ...], local: torch.Tensor) -> None:
    """Writes a local tensor into its boxes of the full one."""
    row = 0
    for box in parts:
        n = box[0][1] - box[0][0]
        full[_index(box)] = local[row : row + n]
        row += n


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _expert_tensor_size() -> int:
    size: int = parallel_state.get_expert_tensor_parallel_world_size()
    return size
