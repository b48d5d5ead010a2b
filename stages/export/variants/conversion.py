"""Writes a variant of an exported model, and reads its weights back: pure functions of the model's files.

compressed-tensors is the format that vLLM serves: each quantized matrix has `X.weight` [out, in] in e4m3 and
`X.weight_scale` [out, 1] in fp32, and the value is their product. A server rounds activations to 8 bits by token as it
goes. Embeddings, norms, routers and the output layer are those of the export.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.export.variants.registry import QUANTIZATION_CONFIG, VARIANTS, VariantName
from stages.formats.tokenizer import TOKENIZER_FILES
from stages.train.checkpoint import release_checkpoint
from stages.train.checkpoint.release_checkpoint import Tensors

COPIED = (*TOKENIZER_FILES, "generation_config.json")
"""Files of a model that its variants have unchanged, but for GGUF, whose file holds their content."""
SCALE = "_scale"
MATRICES = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight")
"""The tensors that are quantized."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def write(name: VariantName, model: Path, folder: Path) -> None:
    """Writes the variant of the exported model in one folder into another, which is made anew.

    Holds a tensor, the experts of a layer or a file of shards at a time. Raises AtomError if the model has no such
    variant.
    """
    variant = VARIANTS[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if variant.writer == "gguf":
        from stages.export.variants import gguf_file

        gguf_file.write(model, folder, variant.encoding)
        return
    copy_tokenizer(model, folder)
    if variant.writer == "compressed-tensors":
        tensors = _quantized(Tensors(model))
        _write_config(model, folder, quantization_config=QUANTIZATION_CONFIG)
    else:
        tensors = ((name, tensor.bfloat16()) for name, tensor in Tensors(model).items())
        _write_config(model, folder, dtype=variant.encoding, torch_dtype=variant.encoding)
    release_checkpoint.write_shards(folder, release_checkpoint.MODEL, tensors)


def write_dequantized(name: VariantName, model: Path, folder: Path, target: Path, base: Path | None = None) -> None:
    """Writes the weights of the variant in `folder` in fp32 into `target`, as a model that transformers loads.

    `target` is made anew. `model` is the exported model of the variant, `base` that of an adapter.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    copy_tokenizer(model, target)
    _write_config(model, target, dtype="float32", torch_dtype="float32")
    release_checkpoint.write_shards(target, release_checkpoint.MODEL, _dequantized(name, model, folder, base))


def _dequantized(name: VariantName, model: Path, folder: Path, base: Path | None) -> Iterator[tuple[str, Tensor]]:
    variant = VARIANTS[name]
    if variant.writer == "peft":
        from stages.export.variants import adapter_files

        assert base is not None, "an adapter has a base"
        return adapter_files.combined(base, folder)
    if variant.writer == "gguf":
        from stages.export.variants import gguf_file

        return gguf_file.dequantized(model, folder, variant.encoding)
    if variant.writer == "compressed-tensors":
        return _rescaled(model, folder)
    return ((name, tensor.float()) for name, tensor in Tensors(folder).items())


def copy_tokenizer(model: Path, folder: Path) -> None:
    """Copies what a variant has unchanged beside its weights."""
    for name in COPIED:
        if (model / name).exists():
            shutil.copyfile(model / name, folder / name)


def _write_config(model: Path, folder: Path, **entries: Any) -> None:
    """Writes config.json of a model with these entries."""
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}, indent=1, sort_keys=True) + "\n")


def _rescaled(model: Path, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The fp32 tensors of a folder, under the names of the exported model."""
    tensors = Tensors(folder)
    for tensor in Tensors(model):
        values = tensors[tensor].float()
        yield tensor, values * tensors[tensor + SCALE] if tensor + SCALE in tensors.files else values


def _quantized(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if not MATRICES.fullmatch(name):
            yield name, tensor
            continue
        values = tensor.float()
        scale = values.abs().amax(1, keepdim=True) / LARGEST
        # A channel of zeros stays zeros.
        scale[scale == 0] = 1.0
        # The division may round the largest value to a little more than the type holds.
        yield name, (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        yield name + SCALE, scale
