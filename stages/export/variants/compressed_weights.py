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
from typing import Any

import torch

from stages.train.checkpoint import release_checkpoint
from stages.train.checkpoint.release_checkpoint import Tensors

SCALE = "_scale"


@dataclass(frozen=True)
class Encoding:
    """matrices: pattern of the tensors that are quantized. ignore: patterns of the other linear layers, for servers.
    largest: number of the type. form, type: their names in the format."""

    matrices: re.Pattern[str]
    ignore: tuple[str, ...]
    largest: float
    form: str
    type: str
    convert: Callable[[torch.Tensor], torch.Tensor]


ALL = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight")
ATTENTION = re.compile(r"model\.layers\.\d+\.self_attn\..*_proj(_with_mqa)?\.weight")
HEAD, ROUTERS, FEED_FORWARD = "lm_head", r"re:.*mlp\.gate$", r"re:.*\.mlp\..*"


def _fp8(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float8_e4m3fn)


def _int8(values: torch.Tensor) -> torch.Tensor:
    return values.round().to(torch.int8)


ENCODINGS = {
    "fp8": Encoding(ALL, (HEAD, ROUTERS), 448.0, "float-quantized", "float", _fp8),
    "fp8-attention": Encoding(ATTENTION, (HEAD, FEED_FORWARD), 448.0, "float-quantized", "float", _fp8),
    "int8": Encoding(ALL, (HEAD, ROUTERS), 127.0, "int-quantized", "int", _int8),
}


def write(model: Path, folder: Path, name: str) -> None:
    """Writes the exported model of a folder into another one, without the files of the tokenizer."""
    encoding = ENCODINGS[name]
    release_checkpoint.write_shards(folder, release_checkpoint.MODEL, _quantized(Tensors(model), encoding))
    config = json.loads((model / "config.json").read_text())
    text = json.dumps({**config, "quantization_config": _config(encoding)}, indent=1, sort_keys=True)
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


def _config(encoding: Encoding) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    eight_bits = {"num_bits": 8, "type": encoding.type, "symmetric": True, "group_size": None, "actorder": None,
                  "block_structure": None, "observer_kwargs": {}}  # fmt: skip
    group = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False, "observer": "minmax"},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True, "observer": None},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": encoding.form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(encoding.ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
