"""The patches that Megatron-core needs: without CUDA all of them, without Transformer Engine its optimizer.

Megatron-core's schedules, DDP, optimizers and MoE layers are device-neutral except for names: they write
`device="cuda"`, request a stream from `torch.cuda`, or compare a tensor's type with its CUDA name. `enable()` gives
Megatron's modules a `torch` in which these names mean the CPU. PyTorch itself is unchanged: transformers, or any other
library in the same process, sees the original `torch`. (Replacing the factories in `torch` itself breaks
`from_pretrained` without an error: its tensors on the meta device stay uninitialized.)

PyTorch's fused AdamW and norm of many tensors get the interfaces of Transformer Engine's, which Megatron expects.

Import Megatron's names from `stages.mcore.megatron_imports`, which calls `enable()` first. The differences between
Megatron's versions are in `stages.mcore.megatron_compat`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stages.mcore import megatron_compat

# The parts of Megatron that the pipeline uses; `enable` imports them, so that all of them get the CPU's `torch`.
MODULES = (
    "megatron.core",
    "megatron.core.datasets.indexed_dataset",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.moe.token_dispatcher",
)
FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "as_tensor",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
)

_enabled = False


def te_on_cpu() -> bool:
    """Returns True if layers use Transformer Engine without a GPU, in every precision.

    Only `tests/te` sets this variable: it has replaced the kernels by PyTorch's.
    """
    return os.environ.get("ATOM_TE_ON_CPU") == "1"


def enable() -> None:
    """Makes Megatron run on this machine; it is idempotent.

    With CUDA it imports Megatron and adds the parts that are missing without Transformer Engine.
    """
    global _enabled
    if _enabled:
        return
    with_cuda = torch.cuda.is_available()
    with warnings.catch_warnings(), contextlib.nullcontext() if with_cuda else _no_compile():
        warnings.simplefilter("ignore")  # "Apex is not installed", five times over
        for name in MODULES:
            importlib.import_module(name)
    megatron_compat.after_import()
    install_optimizer()
    if not with_cuda:
        _patch_torch_names()
        _patch_functions()
    _enabled = True


@contextlib.contextmanager
def _no_compile() -> Iterator[None]:
    """Megatron decorates its fusions with torch.compile at import.

    None of them is used on CPU, and loading the compiler takes two seconds in every process, so during the import
    `torch.compile` returns functions unchanged.
    """
    compile_ = torch.compile

    def identity(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return function if function is not None else lambda f: f

    torch.compile = identity  # type: ignore[assignment]
    megatron_compat.before_import()
    try:
        yield
    finally:
        torch.compile = compile_


def _patch_torch_names() -> None:
    """Replaces the global name `torch` in every Megatron module by the CPU's version."""
    cpu_torch = _cpu_torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = cpu_torch

    # Two methods of tensors matter as well, and they belong to all tensors, so they change for Megatron's calls only:
    # `grad.type() == "torch.cuda.FloatTensor"` guards clipping and the distributed optimizer, and the last stage of a
    # pipeline calls `.cuda()` on the embedding that it shares with the first.
    type_, cuda = torch.Tensor.type, torch.Tensor.cuda

    def cpu_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = type_(self, *args, **kwargs)
        is_query = not args and not kwargs and _called_by_megatron()
        return name.replace("torch.", "torch.cuda.", 1) if is_query else name

    def cpu_cuda(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if _called_by_megatron() else cuda(self, *args, **kwargs)

    torch.Tensor.type = cpu_type  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = cpu_cuda  # type: ignore[method-assign,assignment]


def _called_by_megatron() -> bool:
    """Returns True if the calling function was called from a function of Megatron."""
    # Frame 1 is the replaced method, and frame 2 its caller.
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.")


def _patch_functions() -> None:
    """Replaces functions that the names of `torch` do not cover."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    # The all-to-all dispatcher brings split sizes from the GPU as numpy arrays; tensors that are on the CPU already
    # pass through unchanged, and `all_to_all_single` refuses tensors as sizes. Needed with expert parallelism.
    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, _unless_alone(getattr(param_and_grad_buffer, name)))

    # Megatron's named generators are states of "the GPU's" one, which it reaches below `torch.cuda`.
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective of DDP that does nothing if its group is one rank and the result is in place already.

    Gloo would copy all weights and all gradients in each step there. NCCL does nothing either.
    """

    def call(output: Tensor, input: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        places = {(x.untyped_storage()._cdata, x.storage_offset(), x.numel()) for x in (output, input)}
        # In place: the result is there already.
        if dist.get_world_size(group) == 1 and len(places) == 1:
            return None
        return collective(output, input, *args, group=group, **kwargs)

    return call


def _cpu_torch() -> types.ModuleType:
    """A module with torch's names, in which factories read "cuda" as "cpu" and `cuda` is the replacement below."""
    cpu_torch = types.ModuleType("torch")
    cpu_torch.__dict__.update(torch.__dict__)
    cpu_torch.__dict__["__getattr__"] = lambda name: getattr(torch, name)  # modules that torch itself loads lazily
    for name in FACTORIES:
        cpu_torch.__dict__[name] = _redirect_to_cpu(getattr(torch, name))
    cpu_torch.__dict__["cuda"] = _cpu_cuda()
    cpu_torch.__dict__["distributed"] = _gloo()
    return cpu_torch


def _gloo() -> types.ModuleType:
    distributed = types.ModuleType("torch.distributed")
    distributed.__dict__.update(dist.__dict__)
    distributed.__dict__.update(of_unequal_sizes(dist.all_gather, dist.reduce_scatter))
    return distributed


def of_unequal_sizes(all_gather: Callable[..., Any], reduce_scatter: Callable[..., Any]) -> dict[str, Any]:
    """Both collectives of `torch.distributed`, by name, on parts of unequal size too, which gloo lacks and NCCL has.

    Tokens of split experts are gathered and summed so. They are made of collectives on equal sizes.
    """

    def gather(parts: list[Tensor], tensor: Tensor, group: Any = None, **kwargs: Any) -> Any:
        sizes = [part.shape[0] for part in parts]
        if len(set(sizes)) == 1:
            return all_gather(parts, tensor, group=group, **kwargs)
        # gloo gathers equal sizes only: padded to the largest, and cut again.
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in parts]
        all_gather(gathered, padded, group=group)
        for part, received in zip(parts, gathered, strict=True):
            part.copy_(received[: part.shape[0]])
        return None

    def sum_and_scatter(output: Tensor, parts: list[Tensor], *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if len({part.shape[0] for part in parts}) == 1:
            return reduce_scatter(output, parts, *args, group=group, **kwargs)
        summed = torch.cat(parts)
        # gloo has no reduce-scatter of unequal parts: the whole sum, of which a rank takes its part.
        dist.all_reduce(summed, group=group)
        output.copy_(summed.split([part.shape[0] for part in parts])[dist.get_rank(group)])
        return None

    return {"all_gather": gather, "reduce_scatter": sum_and_scatter}


def _redirect_to_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _cpu_cuda() -> types.ModuleType:
    """`torch.cuda` for one in-order CPU: there is one stream, it is always synchronized, and nothing is allocated."""
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    stream = _Stream()

    def no_op(*args: Any, **kwargs: Any) -> None: ...

    replacements: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "device_count": lambda: 1,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": no_op,
        "set_device": no_op,
        "empty_cache": no_op,
        # as above: dropout draws from these
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    cuda.__dict__.update(replacements)
    return cuda


class _Stream:
    """A stream, or an event on one: everything before it has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def wait_stream(self, *args: Any) -> None: ...

    wait_event = wait = record = synchronize = wait_stream

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class FusedAdam(torch.optim.Optimizer):
    """Decoupled weight decay (AdamW) unless `adam_w_mode` is false; one fused kernel call for each group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        **_: Any,  # FusedAdam's switches for CUDA graphs and low-precision states
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)
        if not bias_correction:
            raise NotImplementedError("Adam without bias correction")
        self.fused = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Any = None, **_: Any) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # One count for the group, so that a resumed step has the same bias correction on every layout.
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            self.fused(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.full((), float(group["step"]), device=params[0].device)] * len(params),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def install_optimizer() -> None:
    """Installs both if Megatron finds neither Transformer Engine's nor Apex's."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        # Megatron would otherwise build torch.optim's class, with other arguments.
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = True
    # Only in place of Megatron's fallback, not of the kernels of Transformer Engine and Apex.
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = total_norm


def total_norm(_: int, __: Any, tensors: list[list[Tensor]], ___: bool) -> tuple[Tensor, None]:
    """The norm of all tensors of a list as one number, [1].

    Megatron's own reads the norm of each tensor on the host, which then waits for a GPU as often as there are
    tensors.
    """
    return torch.nn.utils.get_total_norm(tensors[0]).view(1), None
