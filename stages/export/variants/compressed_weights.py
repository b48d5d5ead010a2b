"""Folders in the format of compressed-tensors, which vLLM serves: 8-bit weights with one scale an output channel.

Each quantized matrix has `X.weight` [out, in] in 8 bits and `X.weight_scale` [out, 1] in fp32; the value is their
product. A server rounds activations to 8 bits by token as it goes. Embeddings, norms, routers and the output layer are
those of the export.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.export.variants.written_settings import quantization_config
from stages.train.checkpoint import release_checkpoint
from stages.train.checkpoint.release_checkpoint import Tensors

SCALE = "_scale"


@dataclass(frozen=True)
class Encoding:
    """matrices: pattern of the tensors that are quantized. largest: number of the type."""

    matrices: re.Pattern[str]
    largest: float
    convert: Callable[[torch.Tensor], torch.Tensor]


ALL = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight")
ATTENTION = re.compile(r"model\.layers\.\d+\.self_attn\..*_proj(_with_mqa)?\.weight")


def _fp8(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float8_e4m3fn)


def _int8(values: torch.Tensor) -> torch.Tensor:
    return values.round().to(torch.int8)


ENCODINGS = {
    "fp8": Encoding(ALL, 448.0, _fp8),
    "fp8-attention": Encoding(ATTENTION, 448.0, _fp8),
    "int8": Encoding(ALL, 127.0, _int8),
}


def write(model: Path, folder: Path, name: str) -> None:
    """Writes the exported model of a folder into another one, without the files of the tokenizer."""
    encoding = ENCODINGS[name]
    release_checkpoint.write_shards(folder, release_checkpoint.MODEL, _quantized(Tensors(model), encoding))
    config = json.loads((model / "config.json").read_text())
    text = json.dumps({**config, "quantization_config": quantization_config(name)}, indent=1, sort_keys=True)
    (folder / "config.json").write_text(f"{text}\n")


def dequantized(model: Path, folder: Path, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The fp32 tensors of a folder, under the names of the exported model."""
    tensors = Tensors(folder)
    for tensor in Tensors(model):
        values = tensors[tensor].float()
        yield tensor, values * tensors[tensor + SCALE] if tensor + SCALE in tensors.files else values


def _quantized(tensors: Mapping[str, torch.Tensor], encoding: Encoding) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        if not encoding.matrices.fullmatch(name):
            yield name, tensor
            continue
        values = tensor.float()
        scale = values.abs().amax(1, keepdim=True) / encoding.largest
        scale[scale == 0] = 1.0
        yield name, encoding.convert((values / scale).clamp(-encoding.largest, encoding.largest))
        yield name + SCALE, scale
