"""Muon's update of weight matrices, which precedes the step of the Adam in Megatron's distributed optimizer.

Data ranks share tensors by slices, as for Adam, and a rank keeps the momentum of its slices, so that checkpoints and
layouts treat it like any other state. Only the update needs the whole matrix. If a matrix lies on several ranks, they
put it together in each step, and each of them orthogonalizes it and updates its own slice (Liu et al., 2025,
arXiv:2502.16982, algorithm 1). Matrices come one after the other, and are multiplied in the type of the model's
weights: beside the states, a step takes the memory of about five copies of the largest one.

Queries, keys and values are orthogonalized each by themselves, though they are one matrix, which lowered the loss;
gate and up of a SwiGLU are not, which changed nothing (docs/training.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stages.mcore.megatron_imports import parallel_state
from stages.mcore.tensor_sharding import EXPERTS, Box, boxes, cut, paste
from stages.models.base import NEWTON_SCHULZ

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of a x + b x^3 + c x^5, which moves each singular value x towards 1 (Jordan, 2024)."""
UPDATE_RMS = 0.2
"""Root mean square of an update at learning rate 1: about AdamW's, so that both can have the same rate."""
MOMENTUM = "momentum"
"""The state of a matrix, as `Muon.matrices` in optimizer.py names it."""

Heads = tuple[int, int]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of which this rank's model has a part.

    Attributes:
        parameter: That part, in the type of the model's weights.
        boxes: Its place in the full matrix.
        shape: Rows and columns of the full matrix.
        start: Index of the first value of the flat part that this rank's optimizer owns.
        stop: Index after the last one.
        main: These values, flat and fp32; None if this rank owns none.
        group: Index of its parameter group.
        heads: Of `linear_qkv`: the key/value heads, and the rows of a head; None for other matrices.
        data_group: The data ranks that share the part; None if one of them owns all of it.
        tensor_group: The tensor ranks that have the other parts; None if there are none.
    """

    parameter: Tensor
    boxes: tuple[Box, ...]
    shape: tuple[int, ...]
    start: int
    stop: int
    main: Tensor | None
    group: int
    heads: Heads | None
    data_group: dist.ProcessGroup | None
    tensor_group: dist.ProcessGroup | None


def install(
    part: Any, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], heads: Heads, momentum: float
) -> None:
    """Lets one of Megatron's distributed optimizers update matrices by Muon, and its other tensors as before.

    Args:
        part: The optimizer.
        parameters: Matrices of this rank's model by global name; those that the optimizer does not have are left out.
        shapes: Full shape of each.
        heads: As in `Matrix`.
        momentum: Decay rate of the running mean of gradients.
    """
    matrices, adam = _matrices(part, parameters, shapes, heads), part.optimizer
    of_muon = {id(matrix.main) for matrix in matrices}
    slices = [group["params"] for group in adam.param_groups]
    of_adam = [[main for main in group if id(main) not in of_muon] for group in slices]

    def update(adam: Any, *_: Any) -> None:
        with torch.no_grad():
            for matrix in matrices:
                _update(matrix, adam, momentum)
        _set_slices(adam, of_adam)

    # Hooks of PyTorch's optimizers, which get the optimizer: a reference to it would be a cycle.
    adam.register_step_pre_hook(update)
    adam.register_step_post_hook(lambda adam, *_: _set_slices(adam, slices))


def _set_slices(adam: Any, slices: list[list[Tensor]]) -> None:
    """Sets the tensors of each parameter group of an optimizer."""
    for group, tensors in zip(adam.param_groups, slices, strict=True):
        group["params"] = tensors


def _matrices(
    part: Any, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], heads: Heads
) -> list[Matrix]:
    """Returns the matrices of an optimizer, of which this rank may own nothing. Arguments are those of `install`."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    matrices = []
    # In the order of the buffers, which all data ranks have: their collectives in a step meet.
    for buffer, parameter in ((shared, parameter) for shared in part.buffers for parameter in shared.params):
        if (name := names.get(id(parameter))) is None:
            continue
        shape = shapes[name]
        name_heads = heads if name.endswith(".linear_qkv.weight") else None
        data_group = part.data_parallel_group if _is_divided(part, buffer, parameter) else None
        tensor_group = _tensor_group(name) if parameter.numel() < math.prod(shape) else None
        place = _slice(part, parameter)
        matrices.append(Matrix(parameter, boxes(name, shape), shape, *place, name_heads, data_group, tensor_group))
    return matrices


def _is_divided(part: Any, buffer: Any, parameter: Tensor) -> bool:
    """Returns True if several data ranks own slices of a parameter: a bucket is cut into equal runs, one a rank."""
    start, stop, number = buffer.param_index_map[parameter]
    bucket = buffer.buckets[number]
    run = bucket.grad_data.numel() // part.data_parallel_group.size()
    first, last = ((index - bucket.offset) // run for index in (start, stop - 1))
    return bool(first != last)


def _slice(part: Any, parameter: Tensor) -> tuple[int, int, Tensor | None, int]:
    """Returns start, stop, values and parameter group of the slice of a parameter that this rank's optimizer owns."""
    place = part.model_param_group_index_map.get(parameter)
    if place is None:
        return 0, 0, None, 0
    group, number = place
    span = part._get_model_param_range_map(parameter)["param"]
    return span.start, span.end, part.optimizer.param_groups[group]["params"][number], group


def _tensor_group(name: str) -> dist.ProcessGroup:
    group: dist.ProcessGroup = (
        parallel_state.get_expert_tensor_parallel_group()
        if EXPERTS in name
        else parallel_state.get_tensor_model_parallel_group()
    )
    return group


def _update(matrix: Matrix, adam: Any, momentum: float) -> None:
    """Updates momentum and weights of this rank's slice of a matrix. Collective among the ranks that have parts."""
    main = matrix.main
    if main is None and matrix.data_group is None:
        return

    full = torch.zeros_like(matrix.parameter)
    if main is not None:
        state = adam.state[main]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(main)
        gradient: Any = main.grad
        mean = state[MOMENTUM].lerp_(gradient, 1 - momentum)
        # Nesterov's: the mean, moved once more towards the gradient.
        full.view(-1)[matrix.start : matrix.stop] = gradient.lerp(mean, momentum)
    # Sums of one rank's values and zeros of the others, which are exact.
    if matrix.data_group is not None:
        dist.all_reduce(full, group=matrix.data_group)
    if main is None:
        return
    if matrix.tensor_group is not None:
        local, full = full, torch.zeros(matrix.shape, dtype=full.dtype, device=full.device)
        paste(full, matrix.boxes, local)
        dist.all_reduce(full, group=matrix.tensor_group)
    update = cut(direction(full, matrix.heads), matrix.boxes).flatten()[matrix.start : matrix.stop]
    settings = adam.param_groups[matrix.group]
    main.mul_(1 - settings["lr"] * settings["weight_decay"])
    main.add_(update, alpha=-settings["lr"])


def direction(matrix: Tensor, heads: Heads | None = None) -> Tensor:
    """Returns what a step subtracts at learning rate 1, in fp32, by the momentum; `heads` as in `Matrix`."""
    if heads is None:
        return orthogonalize(matrix).float() * (UPDATE_RMS * math.sqrt(max(matrix.shape)))
    # A group of heads is its queries, its key and its value.
    groups = matrix.unflatten(0, (heads[0], -1, heads[1]))
    parts = groups.split((groups.shape[1] - 2, 1, 1), 1)
    updates = [direction(part.flatten(0, 2)).view(part.shape) for part in parts]
    return torch.cat(updates, 1).flatten(0, 2)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Returns about the orthogonal factor U V^T of a matrix U S V^T: its singular values become 0.7 to 1.2.

    Newton-Schulz iterations in the type of the matrix. For r rows and c columns, r the smaller number, each takes
    4 r^2 c + 2 r^3 FLOPs.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    # The norm is at least the largest singular value, which must be at most 1.
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
