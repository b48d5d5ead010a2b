"""Encodings of matrices in GGUF files. Those of 32 weights a block are the package `gguf`'s; the K-quants, which it
only decodes, are encoded here.

A block of a K-quant has 256 weights of a row, in sub-blocks with small integer scales of their own (ggml's
docs/gguf.md and the decoders of `gguf.quants` describe the bytes). Rounding is to nearest, without a search over
scales. All arithmetic is of single elements in IEEE fp32, so the bytes are the same on every processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from numpy.typing import NDArray

from pipeline.core.errors import AtomError
from stages.export.variants.registry import SUPER_BLOCK

Kind: TypeAlias = GGMLQuantizationType
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
MORE_BITS = ("attn_v", "ffn_down")
"""Matrices of which Q4_K_M stores some layers with six bits."""


def kind_of(encoding: str, name: str, shape: tuple[int, ...], layers: int, tied: bool) -> Kind:
    """The encoding of one tensor of a file. tied: whether the embedding is the output layer as well.

    Vectors and routers stay in fp32. Rows that are not made of whole blocks get the next larger encoding.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return Kind.F32
    kind = Kind.Q4_K if encoding == "Q4_K_M" else GGMLQuantizationType[encoding]
    if encoding == "Q4_K_M" and _has_more_bits(name, layers, tied):
        kind = Kind.Q6_K
    for larger in (kind, Kind.Q8_0, Kind.F16):
        if shape[-1] % GGML_QUANT_SIZES[larger][0] == 0:
            return larger
    raise AssertionError(shape)


def _has_more_bits(name: str, layers: int, tied: bool) -> bool:
    """Whether Q4_K_M stores a matrix with six bits: the output layer, and of MORE_BITS the first and last eighth of the
    layers and every third one between."""
    if not name.startswith("blk."):
        return name == "output.weight" or (tied and name == "token_embd.weight")
    layer, eighth = int(name.split(".")[1]), layers // 8
    if not any(f".{part}" in name for part in MORE_BITS):
        return False
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def encode(matrix: Floats, kind: Kind) -> NDArray[np.generic]:
    """The values of a tensor in an encoding, with the bytes of a row in the last dimension. Raises AtomError for a
    value that it does not hold."""
    if kind == Kind.F32:
        return matrix
    if kind == Kind.F16:
        with np.errstate(over="ignore"):
            halves = matrix.astype(np.float16)
        if not np.isfinite(halves).all():
            raise AtomError("a weight is larger than any number in fp16; take bf16 for this variant")
        return halves
    if (encoder := K_QUANTS.get(kind)) is None:
        encoded: NDArray[np.generic] = quants.quantize(matrix, kind)
        return encoded
    blocks = encoder(matrix.reshape(-1, SUPER_BLOCK))
    return blocks.reshape(*matrix.shape[:-1], -1)


def decode(values: NDArray[np.generic], kind: Kind) -> Floats:
    """The fp32 values of a tensor."""
    decoded: Floats = quants.dequantize(np.ascontiguousarray(values), kind).astype(np.float32)
    return decoded


def _divide(values: Floats, by: Floats) -> Floats:
    """values / by, and 0 where it is divided by 0."""
    return np.divide(values, by, out=np.zeros_like(values), where=by != 0)


def _halves(values: Floats) -> tuple[Bytes, Floats]:
    """[blocks, 1] numbers as bytes of fp16, and the values of those bytes."""
    halves = values.astype(np.float16)
    return halves.view(np.uint8), halves.astype(np.float32)


def q4_k(blocks: Floats) -> Bytes:
    """[blocks, 256] -> [blocks, 144]: two scales in fp16; six bits for scale and minimum of each of eight sub-blocks;
    four bits a weight."""
    parts = blocks.reshape(-1, 8, 32)
    minimum = -np.minimum(parts.min(-1), 0)
    scale = (parts.max(-1) + minimum) / np.float32(15)
    scale_bytes, d = _halves(scale.max(-1, keepdims=True) / np.float32(63))
    minimum_bytes, d_minimum = _halves(minimum.max(-1, keepdims=True) / np.float32(63))
    scales = np.rint(_divide(scale, np.broadcast_to(d, scale.shape))).clip(0, 63).astype(np.uint8)
    minima = np.rint(_divide(minimum, np.broadcast_to(d_minimum, scale.shape))).clip(0, 63).astype(np.uint8)
    step, offset = (d * scales)[..., None], (d_minimum * minima)[..., None]
    numbers = np.rint(_divide(parts + offset, np.broadcast_to(step, parts.shape))).clip(0, 15).astype(np.uint8)
    pairs = numbers.reshape(-1, 4, 2, 32)
    low, high = (np.stack([a[:, :4], a[:, 4:]]) for a in (scales, minima))
    packed = [low[0] | (low[1] >> 4) << 6, high[0] | (high[1] >> 4) << 6, (low[1] & 15) | (high[1] & 15) << 4]
    weights = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([scale_bytes, minimum_bytes, *packed, weights], axis=-1)


def q6_k(blocks: Floats) -> Bytes:
    """[blocks, 256] -> [blocks, 210]: the four low and two high bits of each weight; eight bits for the scale of each
    of sixteen sub-blocks; their scale in fp16."""
    parts = blocks.reshape(-1, 16, 16)
    scale = np.abs(parts).max(-1) / np.float32(31)
    scale_bytes, d = _halves(scale.max(-1, keepdims=True) / np.float32(127))
    scales = np.rint(_divide(scale, np.broadcast_to(d, scale.shape))).clip(0, 127).astype(np.int8)
    step = (d * scales)[..., None]
    numbers = np.rint(_divide(parts, np.broadcast_to(step, parts.shape))).clip(-32, 31) + 32
    groups = numbers.astype(np.uint8).reshape(-1, 2, 4, 32)  # halves of the block, of four groups each
    low = (groups[:, :, :2] & 15) | (groups[:, :, 2:] & 15) << 4
    high = np.zeros_like(groups[:, :, 0])
    for group in range(4):
        high |= (groups[:, :, group] >> 4) << np.uint8(2 * group)
    blocks_of_bytes = [low.reshape(-1, 128), high.reshape(-1, 64), scales.view(np.uint8), scale_bytes]
    return np.concatenate(blocks_of_bytes, axis=-1)


K_QUANTS: dict[Kind, Callable[[Floats], Bytes]] = {Kind.Q4_K: q4_k, Kind.Q6_K: q6_k}
