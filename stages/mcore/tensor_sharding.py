"""The part of a full tensor that a rank holds, and how ranks put full tensors together.

Only this file defines the cuts of tensor parallelism. A part is a list of boxes (one slice for each dimension) of the
full tensor; the rank's local tensor is those boxes, concatenated along the first dimension. Megatron-core's cuts: rows
of embedding, output head, QKV and an expert's gate and up; columns of the projections back into the residual stream;
everything else is whole on every rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from stages.mcore.megatron_imports import parallel_state
from stages.models.param_names import INTO_THE_STREAM, is_cut

Box = tuple[tuple[int, int], ...]
"""(start, stop) in each dimension of the full tensor."""
EXPERTS = ".mlp.experts."
"""In the names of the tensors that expert ranks share out."""


def boxes(name: str, shape: tuple[int, ...], tensor_rank: int | None = None) -> tuple[Box, ...]:
    """The boxes that this rank holds of the tensor with that global name and full shape.

    With `tensor_rank`, they are those of another tensor rank of its group.
    """
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
    # Columns of a projection back into the stream: each rank multiplies its part of the inner width.
    if name.endswith((*INTO_THE_STREAM, "linear_proj.lora_A", "linear_fc2.lora_A")):
        n = shape[1] // size
        return ((full_box[0], (rank * n, (rank + 1) * n)),)
    blocks = 2 if ".linear_fc1." in name else 1  # gate above up, each cut separately
    block, n = shape[0] // blocks, shape[0] // blocks // size
    return tuple(((b * block + rank * n, b * block + (rank + 1) * n), *full_box[1:]) for b in range(blocks))


def is_copied(name: str) -> bool:
    """Returns True if tensor ranks hold equal copies of the tensor of that global name.

    They do not if it is cut, or belongs to whole experts, of which each rank has its own.
    """
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


class FullTensors(Mapping[str, torch.Tensor]):
    """Full tensors by global name.

    Reading is collective: all ranks read the same names in the same order. One rank, which holds a part, gets the
    tensor on its own device (an uncut one is the live one); the other ranks get one without memory, on `meta`, of which
    only the shape counts. Tensor ranks take turns, and data ranks, which hold the same, do too, unless
    only the first of them is to hand tensors over.
    """

    def __init__(
        self,
        local: Mapping[str, torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        tied: bool,
        by_turns: bool = True,
    ) -> None:
        """The full tensors of which `local` are this rank's parts, both by global name.

        `shapes` are the full ones. `tied` is True if the model ties its embeddings, `by_turns` if data ranks take
        turns.
        """
        self.local, self.shapes, self.tied, self.by_turns = local, shapes, tied, by_turns

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        absent = torch.empty(shape, device="meta")
        if name not in self.local or not speaks_for(name, self.tied, self.by_turns):
            return absent
        part = self.local[name]
        group = (
            parallel_state.get_expert_tensor_parallel_group()
            if EXPERTS in name
            else parallel_state.get_tensor_model_parallel_group()
        )
        size = group.size()
        if size == 1 or not is_cut(name):
            return part
        owner = (_turn(name) >> 8) % size  # other bits than those by which data ranks take turns
        is_owner = group.rank() == owner
        # as bytes: gloo does not gather every type
        sent = part.contiguous().flatten().view(torch.uint8)
        parts = [torch.empty_like(sent) for _ in range(size)] if is_owner else None
        # Collective among the tensor ranks: all of them read the same names in the same order.
        dist.gather(sent, parts, dst=dist.get_global_rank(group, owner), group=group)
        if parts is None:
            return absent
        full = torch.empty(shape, dtype=part.dtype, device=part.device)
        for rank, received in enumerate(parts):
            paste(full, boxes(name, shape, rank), received.view(part.dtype).view_as(part))
        return full

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def speaks_for(name: str, tied: bool, by_turns: bool = True) -> bool:
    """Returns True if this rank hands its part of a tensor over, rather than another rank with the same part.

    It is the first of the ranks that repeat the part, and of equal data ranks the one whose turn it is, or the first.
    `tied` is True if the model ties its embeddings.
    """
    if EXPERTS in name:
        rank = parallel_state.get_expert_data_parallel_rank()
        size = parallel_state.get_expert_data_parallel_world_size()
    else:
        rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return bool((_turn(name) % size if by_turns else 0) == rank) and not is_repeated(name, tied)


def is_repeated(name: str, tied: bool) -> bool:
    """Returns True if an earlier tensor or pipeline rank has the same part of a tensor.

    That is so for what tensor ranks do not split, and for the last stage's copy of a tied table.
    """
    group = (
        parallel_state.get_expert_tensor_parallel_rank
        if EXPERTS in name
        else parallel_state.get_tensor_model_parallel_rank
    )
    if group() and not is_cut(name):
        return True
    return tied and name.startswith("embedding") and not parallel_state.is_pipeline_first_stage(ignore_virtual=True)


def _turn(name: str) -> int:
    """A number by which ranks that could all hand a tensor over take turns: the same on each of them."""
    # Python's own hash of a text differs from process to process.
    return zlib.crc32(name.encode())
