"""GGUF files of exported models: one file with weights, tokenizer and chat template, as llama.cpp loads it.

Tensors are read, encoded and written one after the other; the experts of a layer are one tensor. The bytes depend on
the model's files alone: all arithmetic is of single elements in IEEE fp32, the same on every processor.

Names of tensors and encodings are those of the package `gguf`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    TokenType,
    get_tensor_name_map,
    quants,
)
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import AtomError
from stages.formats.tokenizer import INFERENCE_FILE, PATTERN, TURN_END
from stages.train.checkpoint.release_checkpoint import Tensors

ARCHITECTURES = {"qwen3": MODEL_ARCH.QWEN3, "qwen3_moe": MODEL_ARCH.QWEN3MOE}
"""{model_type of config.json: llama.cpp's architecture}"""
EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(.+)")
PRE_TOKENIZERS = {"qwen2": [PATTERN], "gpt-2": []}
"""{llama.cpp's name: the patterns that split a text before byte pairs are merged}; none: those of GPT-2."""
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}\n?")
Kind: TypeAlias = GGMLQuantizationType
Floats = NDArray[np.float32]


def file_name(encoding: str) -> str:
    """The name of a variant's file, by which the Hub and its clients recognize the encoding."""
    return f"model-{encoding}.gguf"


def write(model: Path, folder: Path, encoding: str) -> None:
    """Writes the exported model of a folder into the file of another one.

    Raises AtomError if llama.cpp has no class, tensor name or pre-tokenizer for it.
    """
    weights, config = Tensors(model), read_json(model / "config.json")
    writer = GGUFWriter(folder / file_name(encoding), MODEL_ARCH_NAMES[architecture(config)])
    _add_model(writer, config)
    _add_tokenizer(writer, model, config)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{encoding}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    shapes, kinds = weights.shapes(), {}
    for tensor in tensors_of(list(weights), config):
        shape = shapes[tensor.sources[0]]
        if tensor.stacked:
            shape = (len(tensor.sources), *shape)
        kinds[tensor] = kind = kind_of(encoding, tensor.name, shape)
        # The header needs the size of each tensor before its values are read.
        row = encode(np.zeros(shape[-1], np.float32), kind)
        size = row.nbytes * (np.prod(shape[:-1], dtype=int) if shape[:-1] else 1)
        writer.add_tensor_info(tensor.name, (*shape[:-1], len(row)), row.dtype, int(size), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in kinds.items():
        writer.write_tensor_data(encode(_values(weights, tensor), kind))
    writer.close()


def dequantized(model: Path, folder: Path, encoding: str) -> Iterator[tuple[str, Tensor]]:
    """The fp32 tensors of a file, under the names of the exported model. Raises AtomError if the file lacks one."""
    stored = {tensor.name: tensor for tensor in GGUFReader(folder / file_name(encoding)).tensors}
    for tensor in tensors_of(list(Tensors(model)), read_json(model / "config.json")):
        if tensor.name not in stored:
            raise AtomError(f"{file_name(encoding)} lacks the tensor {tensor.name}; run the variant again")
        entry = stored[tensor.name]
        values = torch.from_numpy(decode(entry.data, entry.tensor_type).copy())
        yield from zip(tensor.sources, values if tensor.stacked else (values,), strict=True)


def _values(weights: Mapping[str, Tensor], tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
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
    tokenizer = read_json(model / "tokenizer.json")
    size, added = config["vocab_size"], tokenizer["added_tokens"]
    # The list has a text for every id, also for those without a token.
    tokens, types = [f"[UNUSED{n}]" for n in range(size)], [TokenType.UNUSED] * size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tokenizer["model"]["merges"]
    # A tokenizer.json has merges as texts or as pairs, depending on the version that wrote it.
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    for token in added:
        if token["content"] == TURN_END:
            writer.add_eot_token_id(token["id"])
    writer.add_add_bos_token(False)
    if (template := chat_template(model)) is not None:
        writer.add_chat_template(template)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file. sources: the exported tensors that it holds, stacked if there are several."""

    name: str
    sources: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return "_exps." in self.name


def tensors_of(names: list[str], config: Mapping[str, Any]) -> list[GgufTensor]:
    """The tensors of a file that holds these exported ones.

    Raises AtomError for a name that llama.cpp does not know.
    """
    known = get_tensor_name_map(architecture(config), config["num_hidden_layers"])
    sources: dict[str, dict[int, str]] = {}
    for name in names:
        expert = EXPERT.fullmatch(name)
        stored = known.get_name(f"{expert[1]}.{expert[3]}" if expert else name, (".weight",))
        if stored is None:
            raise AtomError(f"the tensor {name} has no name in GGUF files; leave the variants of llama.cpp out")
        sources.setdefault(stored, {})[int(expert[2]) if expert else 0] = name
    tensors = [GgufTensor(name, tuple(numbered[n] for n in sorted(numbered))) for name, numbered in sources.items()]
    return sorted(tensors, key=lambda tensor: _place(tensor.name))


def _place(name: str) -> tuple[int, str]:
    """Sorts layers by number, after the tensors outside of them."""
    return (int(name.split(".")[1]) if name.startswith("blk.") else -1, name)


def architecture(config: Mapping[str, Any]) -> MODEL_ARCH:
    """llama.cpp's architecture of a model. Raises AtomError if it has none for it."""
    kind = config["model_type"]
    if kind not in ARCHITECTURES or config.get("mlp_only_layers"):
        what = f"model_type {kind}" if kind not in ARCHITECTURES else "layers without experts among others"
        raise AtomError(f"llama.cpp has no class for {what} here; leave its variants out")
    return ARCHITECTURES[kind]


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json. Raises AtomError for one that it does not have.

    A converter that looks up a hash of token ids, as llama.cpp's own does, knows no vocabulary that was trained here.
    """
    stage = tokenizer.get("pre_tokenizer") or {}
    steps = stage["pretokenizers"] if stage.get("type") == "Sequence" else [stage]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    last = steps[-1]
    for name, expected in PRE_TOKENIZERS.items():
        byte_level = last.get("type") == "ByteLevel" and not last["add_prefix_space"]
        # GPT-2's pattern is built into ByteLevel, and `use_regex` says whether it is used.
        if byte_level and patterns == expected and last.get("use_regex", True) == (not expected):
            return name
    raise AtomError("llama.cpp has no name for the pre-tokenizer in tokenizer.json; leave its variants out")


def chat_template(folder: Path) -> str | None:
    """Returns the chat template of a model; None without one.

    Blocks that mark the assistant's tokens for training, which older versions of llama.cpp refuse, are left out.
    """
    path = folder / INFERENCE_FILE
    return GENERATION.sub("", path.read_text("utf-8")) if path.is_file() else None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def kind_of(encoding: str, name: str, shape: tuple[int, ...]) -> Kind:
    """The encoding of one tensor of a file.

    Vectors and routers stay in fp32. Rows that are not made of whole blocks are in fp16.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return Kind.F32
    kind = GGMLQuantizationType[encoding]
    return Kind.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def encode(matrix: Floats, kind: Kind) -> NDArray[np.generic]:
    """The values of a tensor in an encoding, with the bytes of a row in the last dimension.

    Raises AtomError for a value that it does not hold.
    """
    # The sentence below takes the place of numpy's warning.
    with np.errstate(over="ignore"):
        encoded: NDArray[np.generic] = quants.quantize(matrix, kind)
    if kind == Kind.F16 and not np.isfinite(encoded).all():
        raise AtomError("a weight is larger than any number in fp16; take bf16 for this variant")
    return encoded


def decode(values: NDArray[np.generic], kind: Kind) -> Floats:
    """The fp32 values of a tensor."""
    decoded: Floats = quants.dequantize(np.ascontiguousarray(values), kind).astype(np.float32)
    return decoded
