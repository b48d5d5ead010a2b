"""Writes a variant of an exported model, and reads its weights back: pure functions of the model's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from stages.export.variants import compressed_weights
from stages.export.variants.registry import VARIANTS, VariantName
from stages.formats.tokenizer import TOKENIZER_FILES
from stages.train.checkpoint import release_checkpoint
from stages.train.checkpoint.release_checkpoint import Tensors

COPIED = (*TOKENIZER_FILES, "generation_config.json")
"""Files of a model that its variants have unchanged, but for GGUF, whose file holds their content."""


def write(name: VariantName, model: Path, folder: Path) -> None:
    """Writes the variant of the exported model in one folder into another, which is made anew. Holds a tensor, the
    experts of a layer or a file of shards at a time. Raises AtomError if the model has no such variant."""
    variant = VARIANTS[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if variant.writer == "gguf":
        from stages.export.variants import gguf_file

        gguf_file.write(model, folder, variant.encoding)
        return
    copy_tokenizer(model, folder)
    if variant.writer == "compressed-tensors":
        compressed_weights.write(model, folder, variant.encoding)
    else:
        rounded = ((name, tensor.bfloat16()) for name, tensor in Tensors(model).items())
        release_checkpoint.write_shards(folder, release_checkpoint.MODEL, rounded)
        _write_config(model, folder, variant.encoding)


def write_dequantized(name: VariantName, model: Path, folder: Path, target: Path, base: Path | None = None) -> None:
    """Writes the weights of the variant in `folder` in fp32, as a model that transformers loads, into `target`, which
    is made anew. model: the exported model of the variant. base: that of an adapter."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    copy_tokenizer(model, target)
    _write_config(model, target, "float32")
    release_checkpoint.write_shards(target, release_checkpoint.MODEL, _dequantized(name, model, folder, base))


def _dequantized(name: VariantName, model: Path, folder: Path, base: Path | None) -> Iterator[tuple[str, torch.Tensor]]:
    variant = VARIANTS[name]
    if variant.writer == "peft":
        from stages.export.variants import adapter_files

        assert base is not None, "an adapter has a base"
        return adapter_files.combined(base, folder)
    if variant.writer == "gguf":
        from stages.export.variants import gguf_file

        return gguf_file.dequantized(model, folder, variant.encoding)
    if variant.writer == "compressed-tensors":
        return compressed_weights.dequantized(model, folder, variant.encoding)
    return ((name, tensor.float()) for name, tensor in Tensors(folder).items())


def copy_tokenizer(model: Path, folder: Path) -> None:
    """Copies what a variant has unchanged beside its weights."""
    for name in COPIED:
        if (model / name).exists():
            shutil.copyfile(model / name, folder / name)


def _write_config(model: Path, folder: Path, dtype: str) -> None:
    """config.json of a model with weights of another type."""
    config = json.loads((model / "config.json").read_text())
    text = json.dumps({**config, "dtype": dtype, "torch_dtype": dtype}, indent=1, sort_keys=True)
    (folder / "config.json").write_text(f"{text}\n")
