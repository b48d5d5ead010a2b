"""Transformer Engine on a machine without a GPU: its own layers, quantizers, optimizer and control flow, with the CUDA
kernels that they call replaced by PyTorch on the CPU.

`install()` does it, once, before Megatron is imported. Each function below whose name is that of a function of the
compiled module `transformer_engine_torch` replaces it; its docstring is the formula. A kernel without a stand-in is not
reached, or fails: it is never skipped. The quantizers write the bytes, scales and layouts that the real kernels write,
so that a tensor that TE hands to the wrong product, or without the copy that the product needs, fails here as well.

Shown with them: names and shapes of tensors, what is multiplied and rounded in which order, which collectives are
called, what a checkpoint holds. Not shown: the kernels' own arithmetic, speed and memory.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from stages.mcore import megatron_patches

HOPPER, BLACKWELL = (9, 0), (10, 0)
FP8 = {"kFloat8E4M3": (torch.float8_e4m3fn, 448.0), "kFloat8E5M2": (torch.float8_e5m2, 57344.0)}
"""The PyTorch type and the largest number of a format, by TE's name."""
KERNELS: dict[str, Callable[..., Any]] = {}
"""The stand-ins by name."""
CALLS: Counter[str] = Counter()
"""How often TE called each."""


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    KERNELS[function.__name__] = counted
    return function


# --- Quantization ---------------------------------------------------------------------------------------------------


def format_of(dtype: Any) -> tuple[torch.dtype, float]:
    return FP8[getattr(dtype, "name", str(dtype)).rpartition(".")[2]]


def to_bytes(x: torch.Tensor, dtype: Any) -> torch.Tensor:
    """The format's nearest numbers, ties to even, saturating, as uint8."""
    type_, largest = format_of(dtype)
    return x.clamp(-largest, largest).to(type_).view(torch.uint8)


def from_bytes(data: torch.Tensor, dtype: Any) -> torch.Tensor:
    return data.view(format_of(dtype)[0]).float()


def power_of_two_below(x: torch.Tensor) -> torch.Tensor:
    """The largest power of two that is not above x."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x)[1] - 1)


def spread(scales: torch.Tensor, height: int, width: int, shape: Sequence[int]) -> torch.Tensor:
    """[blocks down, blocks across] -> a factor for each value of a matrix of that shape."""
    return scales.repeat_interleave(height, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]


def block_amax(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The largest magnitude of each block of a matrix: [blocks down, blocks across]. The last blocks may be smaller."""
    padded = F.pad(x.abs(), (0, -x.shape[1] % width, 0, -x.shape[0] % height))
    return padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width).amax((1, 3))


def store_scales(out: torch.Tensor, scales: torch.Tensor) -> None:
    """Into TE's buffer, which is padded for the tensor core. (The order that cuBLAS wants is not made: these products
    read rows and columns.)"""
    out.zero_()
    out[: scales.shape[0], : scales.shape[1]] = scales


@kernel
def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    """A quantized tensor of uninitialized buffers, as TE's own description of them has it."""
    context = quantizer.create_metadata(shape, dtype=dtype)
    buffers = quantizer.alloc_tensors(shape, device="cpu")
    return context["cls"].__tensor_unflatten__(buffers, context, torch.Size(shape), None)


@kernel
def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Rounds a tensor to FP8 by the quantizer, in each of the copies that it asks for.

    Current scaling: scale = largest number / largest magnitude of the tensor, of all ranks' parts if the quantizer says
    so. Blocks: the same by 1 x 128 along the summed dimension, or 128 x 128, rounded down to a power of two. MXFP8: by
    1 x 32, the inverse scale rounded up to a power of two (OCP MX 1.0), kept as its exponent plus 127.
    """
    out = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device="cpu") if output is None else output
    x = tensor.detach().float()
    matrix = x.reshape(-1, x.shape[-1])
    fill = {"Float8CurrentScalingQuantizer": _fill_tensor, "Float8BlockQuantizer": _fill_blocks,
            "MXFP8Quantizer": _fill_mxfp8}[type(quantizer).__name__]  # fmt: skip
    fill(matrix, quantizer, out)
    return out


def _fill_tensor(x: torch.Tensor, quantizer: Any, out: Any) -> None:
    amax = x.abs().max() if x.numel() else torch.zeros(())
    if quantizer.with_amax_reduction:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group())
    largest = format_of(quantizer.dtype)[1]
    scale = largest / amax if amax > 0 else torch.ones(())
    if quantizer.force_pow_2_scales:
        scale = power_of_two_below(scale)
    data = to_bytes(x * scale, quantizer.dtype)
    if out._data is not None:
        out._data.copy_(data.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(data.t().reshape(out._transpose.shape))
        out._transpose_invalid = False
    out._scale_inv.fill_(float(1 / scale))


def _fill_blocks(x: torch.Tensor, quantizer: Any, out: Any) -> None:
    assert quantizer.force_pow_2_scales and not quantizer.amax_epsilon
    size, square = quantizer.block_len, quantizer.block_scaling_dim == 2
    largest = format_of(quantizer.dtype)[1]
    # the copy of the other direction is the transposed matrix, rounded along its rows
    for matrix, data, scales in (
        (x, out._rowwise_data, out._rowwise_scale_inv),
        (x.t(), out._columnwise_data, out._columnwise_scale_inv),
    ):
        if data is None or not matrix.numel():
            continue
        height = size if square else 1
        amax = block_amax(matrix, height, size)
        scale = torch.where(amax > 0, power_of_two_below(largest / amax), 1.0)
        rounded = to_bytes(matrix * spread(scale, height, size, matrix.shape), quantizer.dtype)
        data.copy_(rounded.reshape(data.shape))
        store_scales(scales, 1 / scale if square else (1 / scale).t())


def _fill_mxfp8(x: torch.Tensor, quantizer: Any, out: Any) -> None:
    assert not quantizer.with_2d_quantization
    largest = format_of(quantizer.dtype)[1]
    for data, scales, (height, width) in (
        (out._rowwise_data, out._rowwise_scale_inv, (1, 32)),
        (out._columnwise_data, out._columnwise_scale_inv, (32, 1)),
    ):
        if data is None or not x.numel():
            continue
        amax = block_amax(x, height, width)
        mantissa, exponent = torch.frexp(amax / largest)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)  # rounded up
        exponent[amax == 0] = 0
        inverse = torch.ldexp(torch.ones_like(amax), -exponent)
        data.copy_(to_bytes(x * spread(inverse, height, width, x.shape), quantizer.dtype).view(data.shape))
        store_scales(scales, (exponent + 127).to(torch.uint8))


def values(x: Any, rowwise: bool) -> torch.Tensor:
    """The numbers that a product reads of an operand, as a matrix: of a quantized one, those of the copy that is scaled
    along rows or along columns. Raises AssertionError if TE has not kept that copy."""
    name = type(x).__name__.removesuffix("Storage").removesuffix("Tensor")
    if name == "Float8":
        if rowwise or x._transpose is None:
            assert x._data is not None and (rowwise or _cuda_names["get_device_capability"]() >= BLACKWELL)
            bytes_ = x._data.reshape(-1, x._data.shape[-1])
        else:
            assert not x._transpose_invalid
            bytes_ = x._transpose.reshape(x._transpose.shape[0], -1).t()
        return from_bytes(bytes_, x._fp8_dtype) * x._scale_inv
    if name == "Float8BlockwiseQ":
        data, scales = (
            (x._rowwise_data, x._rowwise_scale_inv) if rowwise else (x._columnwise_data, x._columnwise_scale_inv)
        )
        assert data is not None
        matrix = data.reshape(-1, data.shape[-1]) if rowwise else data.reshape(data.shape[0], -1)
        down, across = (math.ceil(n / 128) for n in matrix.shape)
        if x._is_2D_scaled:
            factors = spread(scales[:down, :across], 128, 128, matrix.shape)
        else:
            factors = spread(scales[:across, : matrix.shape[0]].t(), 1, 128, matrix.shape)
        numbers = from_bytes(matrix, x._fp8_dtype) * factors
        return numbers if rowwise else numbers.t()
    if name == "MXFP8":
        data, scales = (
            (x._rowwise_data, x._rowwise_scale_inv) if rowwise else (x._columnwise_data, x._columnwise_scale_inv)
        )
        assert data is not None
        matrix = data.reshape(-1, data.shape[-1])
        height, width = (1, 32) if rowwise else (32, 1)
        down, across = math.ceil(matrix.shape[0] / height), math.ceil(matrix.shape[1] / width)
        exponents = scales[:down, :across].int() - 127
        factors = torch.ldexp(torch.ones(exponents.shape), exponents)
        return from_bytes(matrix, x._fp8_dtype) * spread(factors, height, width, matrix.shape)
    return x.reshape(-1, x.shape[-1])


@kernel
def dequantize(input: Any, otype: Any) -> torch.Tensor:
    """The numbers that the bytes stand for, in a wider type."""
    rowwise = next(getattr(input, n) for n in ("_rowwise_data", "_data") if hasattr(input, n)) is not None
    return values(input, rowwise).to(_torch_type(otype)).view(input.size())


@kernel
def split_quantize(
    tensor: torch.Tensor,
    split_sections: Sequence[int],
    quantizer_list: Sequence[Any],
    disable_bulk_allocation: bool = False,
) -> list[Any]:
    """Rows by expert, each part rounded by a quantizer of its own."""
    return [quantize(part, q) for part, q in zip(tensor.split(list(split_sections)), quantizer_list, strict=True)]


@kernel
def fp8_transpose(input: torch.Tensor, dtype: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Bytes [.., n] -> [n, ..]."""
    transposed = input.movedim(-1, 0).contiguous()
    return transposed if out is None else out.copy_(transposed)


@kernel
def swizzle_scales_for_gemm_(tensor: Any) -> None:
    """Brings scales into the order of the tensor core; these products read rows and columns, so they stay."""


# --- Matrix products ------------------------------------------------------------------------------------------------


def _product(a: Any, transpose_a: bool, b: Any, transpose_b: bool) -> torch.Tensor:
    """op(B) op(A) of row-major matrices (cuBLAS's op(A) op(B) of column-major ones), summed in fp32."""
    a, b = values(a, transpose_a).float(), values(b, not transpose_b).float()
    return (b.t() if transpose_b else b) @ (a.t() if transpose_a else a)


def _write(out: torch.Tensor, product: torch.Tensor, accumulate: bool) -> None:
    flat = out.view(-1, out.shape[-1])
    flat.add_(product.to(out.dtype)) if accumulate else flat.copy_(product)


@kernel
def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any, bias: Any, bias_type: Any,
    gelu: bool, gelu_in: Any, grad: bool, workspace: Any, workspace_size: int, accumulate: bool,
    use_split_accumulator: bool, comm_overlap: Any = None, extra_output: Any = None, alpha: float = 1.0, **_: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """D = op(B) op(A) + bias, added to D if it accumulates; rounded once, to the type of D. Neither gradients of biases
    nor fused activations, overlapped collectives or quantized results, for which no test asks."""
    assert not (quantizer or (grad and bias is not None) or gelu or comm_overlap) and alpha == 1.0
    product = _product(A, transA, B, transB)
    if bias is not None:
        product = product + bias.float()
    if D is None:
        shape = product.shape if transB else (*B.size()[:-1], product.shape[-1])
        D = product.to(_torch_type(output_dtype)).view(shape)
    else:
        _write(D, product, accumulate)
    return D, None, None, extra_output


@kernel
def te_general_grouped_gemm(
    A: Sequence[Any], transA: bool, B: Sequence[Any], transB: bool, D: Sequence[torch.Tensor], D_type: Any,
    m_splits: Sequence[int], bias: Any, bias_type: Any, single_output: bool, pre_gelu_out: Any, grad: bool,
    workspace: Any, workspace_size: int, accumulate: bool, use_split_accumulator: bool, sm_count: int,
) -> Any:  # fmt: skip
    """The product of each expert and, in a forward pass, its bias, which is empty if it has none; with a single output
    the rows of the experts lie one after the other in it. An expert without tokens has an empty result, or a weight
    gradient of zero."""
    outputs = D[0].split(list(m_splits)) if single_output else D
    for n, (a, b, out) in enumerate(zip(A, B, outputs, strict=True)):
        if out.numel():
            product = _product(a, transA, b, transB)
            has_bias = not grad and len(bias) and bias[n].numel()
            _write(out, product + bias[n].float() if has_bias else product, accumulate)
    return bias


# --- Norms, padding, optimizer --------------------------------------------------------------------------------------


@kernel
def rmsnorm_fwd(
    input: torch.Tensor, weight: torch.Tensor, eps: float, ln_out: Any, quantizer: Any, otype: Any, sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, torch.Tensor]:  # fmt: skip
    """y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, 2019), in fp32; rounded to the output's type, and then by
    the quantizer if there is one. A gain that is centered around zero is w - 1. Also 1 / sqrt(...) of each row, for the
    way back."""
    inverse = input.float().square().mean(-1).add(eps).rsqrt()
    y = (input.float() * inverse[..., None] * (weight.float() + zero_centered_gamma)).to(_torch_type(otype))
    if quantizer is not None:
        y = quantize(y, quantizer, ln_out)
    elif ln_out is not None:
        y = ln_out.copy_(y)
    return y, None, inverse


@kernel
def rmsnorm_bwd(
    dz: torch.Tensor, x: torch.Tensor, rsigma: torch.Tensor, gamma: torch.Tensor, sm_margin: int, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """With n = x / rms and g = dz * w: dx = (g - n mean(g n)) / rms, dw = sum over rows of dz * n."""
    inverse = rsigma.view(*x.shape[:-1], 1)
    n, dz = x.float() * inverse, dz.float().view_as(x)
    g = dz * (gamma.float() + zero_centered)
    dx = (g - n * (g * n).mean(-1, keepdim=True)) * inverse
    return dx.to(x.dtype), (dz * n).reshape(-1, n.shape[-1]).sum(0).to(gamma.dtype)


@kernel
def fused_multi_row_padding(
    input: torch.Tensor, output: torch.Tensor, rows: Sequence[int], padded: Sequence[int]
) -> None:
    """The rows of each expert, and rows of zeros up to its padded number."""
    output.zero_()
    for source, target in zip(input.split(list(rows)), output.split(list(padded)), strict=True):
        target[: len(source)] = source


@kernel
def fused_multi_row_unpadding(
    input: torch.Tensor, output: torch.Tensor, padded: Sequence[int], rows: Sequence[int]
) -> None:
    """The first rows of each expert, as many as it has."""
    for source, target in zip(input.split(list(padded)), output.split(list(rows)), strict=True):
        target.copy_(source[: len(target)])


@kernel
def multi_tensor_l2norm(
    chunk: int, noop: torch.Tensor, lists: Sequence[Sequence[torch.Tensor]], per_tensor: bool | None = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Euclidean norm of all tensors together, and of each."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().view(1), norms if per_tensor else norms[:0]


@kernel
def multi_tensor_scale(chunk: int, noop: torch.Tensor, lists: Sequence[Sequence[torch.Tensor]], scale: Any) -> None:
    """out = in * scale."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


@kernel
def multi_tensor_scale_tensor(
    chunk: int, noop: torch.Tensor, lists: Sequence[Sequence[torch.Tensor]], scale: Any
) -> None:
    """The same with a scale that is a tensor."""
    multi_tensor_scale(chunk, noop, lists, scale)


@kernel
def multi_tensor_adam(
    chunk: int, noop: torch.Tensor, lists: Sequence[Sequence[torch.Tensor]], lr: float, beta1: float, beta2: float,
    eps: float, step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """AdamW (Loshchilov and Hutter, 2019): m, v the moving averages of g and g^2, corrected for their start at zero;
    p -= lr (m / (sqrt(v) + eps) + weight_decay p)."""
    assert mode == 1 and bias_correction
    for g, p, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        p.sub_(lr * (update + weight_decay * p))


@kernel
def get_fused_attn_backend(parameters: Any) -> Any:
    """cuDNN has no attention for this device, so TE takes its attention in PyTorch's own operations."""
    import transformer_engine_torch as tex

    return tex.NVTE_Fused_Attn_Backend.NVTE_No_Backend, "no GPU"


@kernel
def convert_thd_to_bshd(tensor: torch.Tensor, cu_seqlens: torch.Tensor, b: int, max_seq_len: int) -> torch.Tensor:
    """Documents one after the other, [tokens, ...] -> [documents, longest, ...] with zeros behind each."""
    out = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    for number, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        out[number, : end - start] = tensor[start:end]
    return out


@kernel
def convert_bshd_to_thd(tensor: torch.Tensor, cu_seqlens: torch.Tensor, t: int) -> torch.Tensor:
    """The way back, for `t` tokens; those that belong to no document are zeros."""
    out = tensor.new_zeros(t, *tensor.shape[2:])
    for number, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        out[start:end] = tensor[number, : end - start]
    return out


# --- Names of CUDA --------------------------------------------------------------------------------------------------

_cuda_names: dict[str, Any] = {}


def _torch_type(dtype: Any) -> torch.dtype:
    """PyTorch's type of TE's name for it."""
    from transformer_engine.pytorch import constants

    if isinstance(dtype, torch.dtype):
        return dtype
    return next(key for key, value in constants.TE_DType.items() if value == dtype)


def _modules(*packages: str) -> Iterator[types.ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.startswith(packages):
            yield module


def hide() -> None:
    """Makes this process one without Transformer Engine."""
    sys.modules["transformer_engine"] = sys.modules["transformer_engine_torch"] = None  # type: ignore[assignment]


def install(capability: tuple[int, int] = HOPPER) -> None:
    """Replaces the kernels, and what TE asks `torch.cuda`, for a device of that compute capability."""
    # what is fused by torch.compile or by a kernel of TE's is the same arithmetic in PyTorch without it
    os.environ.update(NVTE_MASKED_SOFTMAX_FUSION="0", NVTE_TORCH_COMPILE="0", ATOM_TE_ON_CPU="1")
    import transformer_engine.pytorch  # noqa: F401 - before the compiled part, which needs its library
    import transformer_engine_torch as tex

    import stages.mcore.megatron_imports  # noqa: F401 - imports all of TE that Megatron uses

    cpu_torch = megatron_patches._cpu_torch()
    _cuda_names.update(
        is_available=lambda: True,
        get_device_capability=lambda *_: capability,
        get_device_properties=lambda *_: types.SimpleNamespace(
            major=capability[0], minor=capability[1], multi_processor_count=132, name="stand-in", total_memory=80 << 30
        ),
        is_current_stream_capturing=lambda: False,
        is_bf16_supported=lambda *_: True,
    )
    cpu_torch.__dict__["cuda"].__dict__.update(_cuda_names)
    for module in _modules("transformer_engine", "megatron.core.ssm."):
        if module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = cpu_torch
    for name, function in KERNELS.items():
        real = getattr(tex, name)
        for module in [tex, *_modules("transformer_engine.", "megatron.")]:
            for key, value in list(vars(module).items()):
                if value is real:
                    setattr(module, key, function)

    # TE asks tensors, too, whether they are on a GPU, and brings some there
    is_cuda, cuda, to = torch.Tensor.is_cuda, torch.Tensor.cuda, torch.Tensor.to

    def called_by(*packages: str) -> bool:
        return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(packages)

    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda") and called_by("transformer_engine."):
            kwargs["device"] = "cpu"
        return to(self, *args, **kwargs)

    torch.Tensor.to = to_cpu
    torch.Tensor.is_cuda = property(lambda self: called_by("transformer_engine.") or is_cuda.__get__(self))
    torch.Tensor.cuda = lambda self, *args, **kwargs: (
        self if called_by("transformer_engine.", "megatron.") else cuda(self, *args, **kwargs)
    )
