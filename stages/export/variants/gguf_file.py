"""GGUF files of exported models: one file with weights, tokenizer and chat template, as llama.cpp loads it.

Tensors are read, encoded and written one after the other; the experts of a layer are one tensor. The bytes depend on
the model's files alone: all arithmetic is of single elements in IEEE fp32, the same on every processor.

Sources: the GGUF specification (ggml's docs/gguf.md), and the tables and decoders of the package `gguf`. Encodings with
32 weights a block are the package's own. The K-quants, which it only decodes, are encoded here: a block has 256 weights
of a row, in sub-blocks with small integer scales of their own. Rounding is to nearest, without a search over scales.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    TokenType,
    quants,
)
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import AtomError
from stages.export.variants.registry import SUPER_BLOCK
from stages.formats.chat_templates import INFERENCE_FILE
from stages.formats.tokenizer import PATTERN, TURN_END
from stages.train.checkpoint.release_checkpoint import Tensors

ARCHITECTURES = {"qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
"""{model_type of config.json: llama.cpp's architecture}"""
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")
PRE_TOKENIZERS = {"qwen2": [PATTERN], "gpt-2": []}
"""{llama.cpp's name: the patterns that split a text before byte pairs are merged}; none: those of GPT-2."""
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}\n?")
Kind: TypeAlias = GGMLQuantizationType
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
MORE_BITS = ("attn_v", "ffn_down")
"""Matrices of which Q4_K_M stores some layers with six bits."""


def file_name(encoding: str) -> str:
    """The name of a variant's file, by which the Hub and its clients recognize the encoding."""
    return f"model-{encoding}.gguf"


def write(model: Path, folder: Path, encoding: str) -> None:
    """Writes the exported model of a folder into the file of another one.

    Raises AtomError if llama.cpp has no class, tensor name or pre-tokenizer for it.
    """
    weights, config = Tensors(model), read_json(model / "config.json")
    writer = GGUFWriter(folder / file_name(encoding), architecture(config))
    _add_model(writer, config)
    _add_tokenizer(writer, model, config)
    writer.add_file_type(LlamaFileType["ALL_F32" if encoding == "F32" else f"MOSTLY_{encoding}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    shapes, tensors = weights.shapes(), tensors_of(list(weights))
    kinds = {}
    for tensor in tensors:
        shape = shapes[tensor.sources[0]]
        if tensor.stacked:
            shape = (len(tensor.sources), *shape)
        kinds[tensor] = kind = kind_of(
            encoding, tensor.name, shape, config["num_hidden_layers"], "lm_head.weight" not in shapes
        )
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
    for tensor in tensors_of(list(Tensors(model))):
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


def tensors_of(names: list[str]) -> list[GgufTensor]:
    """The tensors of a file that holds these exported ones.

    Raises AtomError for a name that llama.cpp does not know.
    """
    experts: dict[str, dict[int, str]] = {}
    plain: list[GgufTensor] = []
    for name in names:
        match = LAYER.fullmatch(name)
        if match and (expert := EXPERT.fullmatch(match[2])):
            experts.setdefault(f"blk.{match[1]}.ffn_{expert[2]}_exps.weight", {})[int(expert[1])] = name
        elif match and match[2] in IN_LAYER:
            plain.append(GgufTensor(f"blk.{match[1]}.{IN_LAYER[match[2]]}.weight", (name,)))
        elif name in OUTSIDE:
            plain.append(GgufTensor(OUTSIDE[name], (name,)))
        else:
            raise AtomError(f"the tensor {name} has no name in GGUF files; leave the variants of llama.cpp out")
    stacks = [GgufTensor(name, tuple(numbered[n] for n in sorted(numbered))) for name, numbered in experts.items()]
    return sorted([*plain, *stacks], key=lambda tensor: _place(tensor.name))


def _place(name: str) -> tuple[int, str]:
    """Sorts layers by number, after the tensors outside of them."""
    return (int(name.split(".")[1]) if name.startswith("blk.") else -1, name)


def architecture(config: Mapping[str, Any]) -> str:
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
    """Returns True if Q4_K_M stores a matrix with six bits.

    These are the output layer, and of MORE_BITS the first and last eighth of the layers and every third one between.
    """
    if not name.startswith("blk."):
        return name == "output.weight" or (tied and name == "token_embd.weight")
    layer, eighth = int(name.split(".")[1]), layers // 8
    if not any(f".{part}" in name for part in MORE_BITS):
        return False
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def encode(matrix: Floats, kind: Kind) -> NDArray[np.generic]:
    """The values of a tensor in an encoding, with the bytes of a row in the last dimension.

    Raises AtomError for a value that it does not hold.
    """
    if kind == Kind.F32:
        return matrix
    if kind == Kind.F16:
        # The sentence below takes the place of numpy's warning.
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
    """The quotient values / by, and 0 where it is divided by 0."""
    return np.divide(values, by, out=np.zeros_like(values), where=by != 0)


def _halves(values: Floats) -> tuple[Bytes, Floats]:
    """Numbers, [blocks, 1], as bytes of fp16, and the values of those bytes."""
    halves = values.astype(np.float16)
    return halves.view(np.uint8), halves.astype(np.float32)


def q4_k(blocks: Floats) -> Bytes:
    """Quantizes blocks of 256 weights to Q4_K, [blocks, 256] -> [blocks, 144].

    A block is two scales in fp16, then six bits for scale and minimum of each of eight sub-blocks, then four bits a
    weight.
    """
    parts = blocks.reshape(-1, 8, 32)
    # A block stores scale * n - minimum, with n from 0 to 15 and a minimum that is never negative.
    minimum = -np.minimum(parts.min(-1), 0)
    scale = (parts.max(-1) + minimum) / np.float32(15)
    # The numbers below are computed with the scales as they are stored, after their rounding to fp16.
    scale_bytes, d = _halves(scale.max(-1, keepdims=True) / np.float32(63))
    minimum_bytes, d_minimum = _halves(minimum.max(-1, keepdims=True) / np.float32(63))
    scales = np.rint(_divide(scale, np.broadcast_to(d, scale.shape))).clip(0, 63).astype(np.uint8)
    minima = np.rint(_divide(minimum, np.broadcast_to(d_minimum, scale.shape))).clip(0, 63).astype(np.uint8)
    step, offset = (d * scales)[..., None], (d_minimum * minima)[..., None]
    numbers = np.rint(_divide(parts + offset, np.broadcast_to(step, parts.shape))).clip(0, 15).astype(np.uint8)
    pairs = numbers.reshape(-1, 4, 2, 32)
    low, high = (np.stack([a[:, :4], a[:, 4:]]) for a in (scales, minima))
    # Four bytes each: the first four scales in six bits, and above them two bits of the others; the minima likewise;
    # then the other four bits of the last scales and minima.
    packed = [low[0] | (low[1] >> 4) << 6, high[0] | (high[1] >> 4) << 6, (low[1] & 15) | (high[1] & 15) << 4]
    weights = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([scale_bytes, minimum_bytes, *packed, weights], axis=-1)


def q6_k(blocks: Floats) -> Bytes:
    """Quantizes blocks of 256 weights to Q6_K, [blocks, 256] -> [blocks, 210].

    A block is the four low and two high bits of each weight, then eight bits for the scale of each of sixteen
    sub-blocks, then their common scale in fp16.
    """
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
