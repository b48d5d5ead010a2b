"""One process as any rank of a layout: collectives that do nothing, tensors without memory, and a count of both.

Large tensors are PyTorch's fake ones, which have shape, type and device but no values. What Megatron decides by is
real: positions, masks, and the map of tokens to experts, which is balanced. So the code that computes shapes from
values (split sizes, tokens of an expert, slices of attention) runs as it is.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.mcore import gpu, layer_spec, routers, row_tables
from stages.mcore.megatron_imports import TopKRouter, parallel_state, tensor_parallel
from stages.models.parallel_layout import Layout

aten = torch.ops.aten
MOST_REAL = 2**24
"""Elements of the largest tensor that has values."""
FACTORIES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


@contextmanager
def fake_groups(layout: Layout, rank: int) -> Iterator[None]:
    """Megatron's process groups of a rank of a layout, in one process: their collectives do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PyTorch's fake backend: groups of any size in one process, whose collectives do nothing.
        dist.init_process_group("fake", rank=rank, world_size=layout.ranks, store=FakeStore())
        try:
            parallel_state.initialize_model_parallel(**layout.group_sizes, create_gloo_process_groups=False)
            tensor_parallel.model_parallel_cuda_manual_seed(0)
            yield
        finally:
            routers.clear_losses()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def group_names() -> dict[str, str]:
    """The role of each of this rank's process groups, in Megatron's words, by the name that torch gives it."""
    groups = {
        "world": dist.group.WORLD,
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
        "dp_cp": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "tp_cp": parallel_state.get_tensor_and_context_parallel_group(),
        "tp_dp_cp": parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        "mp": parallel_state.get_model_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "etp": parallel_state.get_expert_tensor_parallel_group(),
        "etp_ep": parallel_state.get_expert_tensor_and_model_parallel_group(),
        "etp_ep_pp": parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
        "edp": parallel_state.get_expert_data_parallel_group(),
        "dist_opt": parallel_state.get_intra_distributed_optimizer_instance_group(),
        "embedding": parallel_state.get_embedding_group(check_initialized=False),
    }
    names: dict[str, str] = {}
    for role, group in groups.items():
        if isinstance(group, dist.ProcessGroup):
            names.setdefault(group.group_name, role)
    return names


@dataclass(frozen=True)
class Collective:
    """A collective or a message of this rank.

    It states its operation as torch names it, its group's role and ranks, and the bytes of its larger side on this rank
    (all gathered parts, all parts before they are summed and scattered).
    """

    operation: str
    group: str
    ranks: int
    bytes: int


class CollectiveLog(TorchDispatchMode):
    """Records the collectives of this process in the order in which it joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.names = group_names()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.record(func, args)
        return func(*args, **(kwargs or {}))

    def record(self, func: Any, args: Any) -> None:
        """Records a call of an operator of c10d."""
        group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject) and _is_group(x))
        sizes = [sum(x.numel() * x.element_size() for x in tree_leaves(arg) if torch.is_tensor(x)) for arg in args]
        # Such as allgather_ or _reduce_scatter_base_, without the marks of PyTorch's registry.
        operation = func._schema.name.split("::")[1].strip("_")
        role = self.names.get(group.group_name, "other")
        self.calls.append(Collective(operation, role, group.size(), max(sizes, default=0)))


def _is_group(argument: torch.ScriptObject) -> bool:
    return str(argument._type().qualified_name()).endswith(".ProcessGroup")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make and that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.host_peak = self._host = 0
        self._on_host = False
        self._sizes: dict[int, Any] = {}

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Counts what is made within it by itself, in `host_peak`."""
        self._on_host = True
        try:
            yield
        finally:
            self._on_host = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count(out)
        return out

    def count(self, out: Any) -> None:
        """Counts the storages of an operator's result."""
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self._track(tensor.untyped_storage())

    def _track(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._sizes:
            return

        on_host = self._on_host

        def free(_: Any) -> None:
            del self._sizes[address]
            self._add(-size, on_host)

        # A storage may outlive the tensor that made it, in a view or in autograd's graph: its own end counts.
        self._sizes[address] = weakref.ref(storage, free)
        self._add(size, on_host)

    def _add(self, size: int, on_host: bool) -> None:
        if on_host:
            self._host += size
            self.host_peak = max(self.host_peak, self._host)
        else:
            self.live += size
            self.peak = max(self.peak, self.live)


class SimulatedRank(CollectiveLog, LiveBytes):
    """Runs operators on fake tensors, and counts their bytes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        is_real = all(not isinstance(x, FakeTensor) for x in tensors) and _fits(func, tensors, args, kwargs)
        if is_real:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        elif func is aten.masked_select.default and not isinstance(args[1], FakeTensor):
            with unset_fake_temporarily():
                selected = int(args[1].sum())
            out = args[0].new_empty(selected)
        else:
            if func is aten.index.Tensor:
                args = (args[0], _numbers(args[1]))
            try:
                out = func(*args, **kwargs)
            except DataDependentOutputException:  # a value of a fake tensor: a loss, a norm, a flag
                if args[0].is_floating_point():
                    return 1.0
                return False if args[0].dtype is torch.bool else 1
        self.count(out)
        return out

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.record(func, args)
        if all(not isinstance(x, FakeTensor) for x in tree_leaves(args) if torch.is_tensor(x)):
            with unset_fake_temporarily():  # the fake group gives every rank the values of this one
                return func(*args, **kwargs)
        if "coalesced" in func._schema.name:  # these have no kernel for fake tensors
            work = torch._C._distributed_c10d.FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        return func(*args, **kwargs)


def _numbers(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Masks that have values as the numbers of what they select, whose count is then known."""
    numbers: list[torch.Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            numbers.append(index)
        else:
            with unset_fake_temporarily():
                numbers += index.nonzero().unbind(1)
    return numbers


def _fits(func: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> bool:
    """Returns True if an operator without fake tensors gives one with values: positions, indices, masks and counts."""
    if tensors:
        return all(x.numel() <= MOST_REAL for x in tensors)
    if func in FACTORIES:
        return True
    dtype = kwargs.get("dtype")
    if dtype is None or dtype.is_floating_point or dtype.is_complex or not args:
        return False
    return isinstance(args[0], (list, tuple)) and math.prod(args[0]) <= MOST_REAL


@contextmanager
def simulated(layout: Layout, rank: int) -> Iterator[SimulatedRank]:
    """A context in which this process is a rank of a layout, with tensors that have no memory.

    It yields the count of the rank's bytes and collectives. Norms are one kernel and keep their input, as on a GPU, and
    tokens are spread evenly over experts.
    """
    # It registers the collectives' kernels for fake tensors, and loads PyTorch's compiler, which takes seconds.
    import torch.distributed._tools.fake_collectives
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    with gpu.deterministic_kernels(layout.deterministic), fake_groups(layout, rank), contextlib.ExitStack() as stack:
        for target, name, replacement in (
            (torch.nn.Module, "bfloat16", _to_bfloat16),
            (layer_spec.Attention, "takes_documents", lambda attention, q: layer_spec.fits_flash_attention(q)),
            (row_tables, "on_a_gpu", lambda device: True),
            (layer_spec.RMSNorm, "forward", lambda norm, x: _FusedNorm.apply(x, norm.weight)),
            (TopKRouter, "routing", balanced(TopKRouter.routing)),
            # a tensor of the process: a fake one would give the balance loss of a later real step any weight
            (MoEAuxLossAutoScaler, "main_loss_backward_scale", None),
            # PyTorch remembers the values of constants up to this size, by itself of single numbers only.
            (fake_tensor, "CONSTANT_NUMEL_LIMIT", 4096),
            # Megatron's `torch` is not PyTorch's where there is no GPU
            *(
                (module, "all_gather_object", _repeat)
                for module in (dist, sys.modules["megatron.core.optimizer"].torch.distributed)
            ),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        # Positions and masks have values, and meet fake tensors in the same operators.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(SimulatedRank())


def _to_bfloat16(module: torch.nn.Module) -> torch.nn.Module:
    """`Module.bfloat16`, which fails on fake tensors: it swaps them, and they have weak references."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16)
    return module


def balanced(route: Callable[..., Any]) -> Callable[..., Any]:
    """A router whose map has values: each expert gets as many tokens as any other."""

    def routing(router: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        probabilities, routing_map = route(router, logits, *args, **kwargs)
        tokens, experts = routing_map.shape
        # Each expert in turn: all ranks then get equally many tokens, as the plan assumes.
        chosen = (torch.arange(tokens)[:, None] * router.topk + torch.arange(router.topk)) % experts
        return probabilities, torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)

    return routing


def _repeat(objects: list[Any], value: Any, group: Any = None) -> None:
    """`all_gather_object`, every rank having this one's value."""
    objects[:] = [value] * len(objects)


class _FusedNorm(torch.autograd.Function):
    """RMSNorm as one kernel, which keeps its input and 1/RMS."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
