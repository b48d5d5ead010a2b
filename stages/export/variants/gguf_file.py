"""GGUF files of exported models: one file with weights, tokenizer and chat template, as llama.cpp loads it.

Tensors are read, encoded and written one after the other; the experts of a layer are one tensor. The bytes depend on
the model's files alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGUFReader, GGUFWriter, LlamaFileType, RopeScalingType, TokenType

from pipeline.core.errors import AtomError
from stages.export.variants import gguf_blocks, gguf_names
from stages.export.variants.gguf_names import GgufTensor
from stages.formats.tokenizer import TURN_END
from stages.train.checkpoint.release_checkpoint import Tensors


def file_name(encoding: str) -> str:
    """The name of a variant's file, by which the Hub and its clients recognize the encoding."""
    return f"model-{encoding}.gguf"


def write(model: Path, folder: Path, encoding: str) -> None:
    """Writes the exported model of a folder into the file of another one. Raises AtomError if llama.cpp has no class,
    tensor name or pre-tokenizer for it."""
    weights, config = Tensors(model), gguf_names.read_json(model / "config.json")
    writer = GGUFWriter(folder / file_name(encoding), gguf_names.architecture(config))
    _add_model(writer, config)
    _add_tokenizer(writer, model, config)
    writer.add_file_type(LlamaFileType["ALL_F32" if encoding == "F32" else f"MOSTLY_{encoding}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    shapes, tensors = weights.shapes(), gguf_names.tensors_of(list(weights))
    kinds = {}
    for tensor in tensors:
        shape = shapes[tensor.sources[0]]
        if tensor.stacked:
            shape = (len(tensor.sources), *shape)
        kinds[tensor] = kind = gguf_blocks.kind_of(
            encoding, tensor.name, shape, config["num_hidden_layers"], "lm_head.weight" not in shapes
        )
        row = gguf_blocks.encode(np.zeros(shape[-1], np.float32), kind)
        size = row.nbytes * (np.prod(shape[:-1], dtype=int) if shape[:-1] else 1)
        writer.add_tensor_info(tensor.name, (*shape[:-1], len(row)), row.dtype, int(size), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in kinds.items():
        writer.write_tensor_data(gguf_blocks.encode(_values(weights, tensor), kind))
    writer.close()


def dequantized(model: Path, folder: Path, encoding: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The fp32 tensors of a file, under the names of the exported model. Raises AtomError if the file lacks one."""
    stored = {tensor.name: tensor for tensor in GGUFReader(folder / file_name(encoding)).tensors}
    for tensor in gguf_names.tensors_of(list(Tensors(model))):
        if tensor.name not in stored:
            raise AtomError(f"{file_name(encoding)} lacks the tensor {tensor.name}; run the variant again")
        entry = stored[tensor.name]
        values = torch.from_numpy(gguf_blocks.decode(entry.data, entry.tensor_type).copy())
        yield from zip(tensor.sources, values if tensor.stacked else (values,), strict=True)


def _values(weights: Mapping[str, torch.Tensor], tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = [weights[name].float().numpy() for name in tensor.sources]
    return np.stack(values) if tensor.stacked else values[0]


def _add_model(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """The settings of the architecture, from config.json."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type", "default") == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    elif rope.get("rope_type", "default") != "default":
        raise AtomError(f"rope_type {rope['rope_type']} is not known in GGUF files here; leave its variants out")
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: GGUFWriter, model: Path, config: Mapping[str, Any]) -> None:
    """The vocabulary, merges, special tokens and chat template."""
    tokenizer = gguf_names.read_json(model / "tokenizer.json")
    size, added = config["vocab_size"], tokenizer["added_tokens"]
    tokens, types = [f"[UNUSED{n}]" for n in range(size)], [TokenType.UNUSED] * size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(gguf_names.pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    for token in added:
        if token["content"] == TURN_END:
            writer.add_eot_token_id(token["id"])
    writer.add_add_bos_token(False)
    if (template := gguf_names.chat_template(model)) is not None:
        writer.add_chat_template(template)
