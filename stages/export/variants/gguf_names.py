"""The names and settings of exported models in GGUF files, as llama.cpp's classes of the same architectures read them.

Sources: the GGUF specification (ggml's docs/gguf.md) and the tables of the package `gguf`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from stages.formats.chat_templates import INFERENCE_FILE
from stages.formats.tokenizer import PATTERN

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


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file. sources: the exported tensors that it holds, stacked if there are several."""

    name: str
    sources: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return "_exps." in self.name


def tensors_of(names: list[str]) -> list[GgufTensor]:
    """The tensors of a file that holds these exported ones. Raises AtomError for a name that llama.cpp does not
    know."""
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
    stacks = [GgufTensor(name, tuple(of[n] for n in sorted(of))) for name, of in experts.items()]
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
        if byte_level and patterns == expected and last.get("use_regex", True) == (not expected):
            return name
    raise AtomError("llama.cpp has no name for the pre-tokenizer in tokenizer.json; leave its variants out")


def chat_template(folder: Path) -> str | None:
    """Returns the chat template of a model; None without one. Blocks that mark the assistant's tokens for training,
    which older versions of llama.cpp refuse, are left out."""
    path = folder / INFERENCE_FILE
    return GENERATION.sub("", path.read_text("utf-8")) if path.is_file() else None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
