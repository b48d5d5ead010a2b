"""The parity check of an export: plain transformers in an interpreter of its own.

    python -P parity.py MODEL_FOLDER [--by-layer] < EXPECTED

EXPECTED is a line of JSON, `rows` (token ids) and `positions` (of a slice), and then Megatron's logits: for each row,
slices of so many positions, fp32 [positions, vocabulary]. The last printed line is one JSON object: keys that were
missing, left over or of another shape, the largest logit difference and its location. With --by-layer, one layer of the
model is in memory at a time. This file imports no module of this project, on purpose: the CPU patches of Megatron must
not affect the compared model.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")


class Whole:
    """A model that `from_pretrained` has loaded."""

    def __init__(self, folder: str) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        self.model, loading = loaded
        self.keys = [f"{kind.replace('_', ' ')} {key}" for kind in KINDS for key in sorted(map(str, loading[kind]))]

    def load(self, at: str) -> None: ...

    def drop(self, module: torch.nn.Module) -> None: ...


class ByLayer:
    """A model without weights, of which parts get theirs by the method that `from_pretrained` calls for all of them."""

    def __init__(self, folder: str) -> None:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.eval()
        base = self.model.base_model
        base.rotary_emb = type(base.rotary_emb)(config)  # its tables are computed, not loaded
        self.prefix = f"{self.model.base_model_prefix}.layers."
        self.conversions = get_model_conversion_mapping(self.model)
        self.keys: list[str] = []
        self.parts: dict[str, dict[str, Path]] = defaultdict(dict)  # layer's prefix, or "" -> tensor -> its file
        for name, path in files(Path(folder)).items():
            number = name.removeprefix(self.prefix).split(".")[0]
            layer = name.startswith(self.prefix) and number.isdigit() and int(number) < len(base.layers)
            self.parts[f"{self.prefix}{number}." if layer else ""][name] = path
        self.load("")
        self.model.tie_weights()

    def load(self, at: str) -> None:
        """Loads the tensors whose names start with `at`; "" stands for all that are in no layer."""
        opened: dict[Path, Any] = {}
        state = {}
        for name, path in self.parts[at].items():
            if path not in opened:
                opened[path] = safe_open(path, framework="pt")
            state[name] = opened[path].get_slice(name)
        settings = LoadStateDictConfig(dtype=torch.float32, weight_mapping=self.conversions)
        loading, _ = self.model._load_pretrained_model(self.model, state, None, settings)
        tied = self.model.all_tied_weights_keys
        names = [n for n, p in self.model.named_parameters() if n.startswith(at) and p.is_meta]
        missing = [n for n in names if n not in tied and (at or not n.startswith(self.prefix))]
        for kind, keys in zip(KINDS, (missing, loading.unexpected_keys, loading.mismatched_keys), strict=True):
            self.keys += [f"{kind.replace('_', ' ')} {key}" for key in sorted(map(str, keys))]
        self.keys += [f"{error} at {key}" for key, error in sorted(loading.conversion_errors.items())]

    def drop(self, module: torch.nn.Module) -> None:
        module.to("meta")


def files(folder: Path) -> dict[str, Path]:
    """The file of each tensor. Raises ValueError if an index does not add up with its files."""
    index = folder / "model.safetensors.index.json"
    stated = json.loads(index.read_text())["weight_map"] if index.exists() else None
    file_of: dict[str, Path] = {}
    for path in sorted({folder / name for name in stated.values()} if stated else [folder / "model.safetensors"]):
        with safe_open(path, framework="pt") as file:
            file_of |= dict.fromkeys(file.keys(), path)
    if stated is not None and {name: path.name for name, path in file_of.items()} != stated:
        raise ValueError(f"{index.name} does not list the tensors of its files")
    return file_of


@torch.no_grad()  # type: ignore[untyped-decorator]
def hidden_states(source: Whole | ByLayer, rows: list[list[int]]) -> list[torch.Tensor]:
    """The rows' hidden states after the last norm, [1, length, hidden]; each layer is loaded once."""
    base = source.model.base_model
    states: list[torch.Tensor] = []
    calls: list[list[dict[str, Any]]] = []  # of each row, the keywords of each layer: masks, rotary tables

    def record(hidden: torch.Tensor, **keywords: Any) -> torch.Tensor:
        if not calls[-1]:
            states.append(hidden)
        calls[-1].append(keywords)
        return hidden

    for layer in base.layers:
        layer.forward = record
    for row in rows:
        calls.append([])
        base(input_ids=torch.tensor([row]), use_cache=False)
    for number, layer in enumerate(base.layers):
        del layer.forward
        source.load(f"{source.model.base_model_prefix}.layers.{number}.")
        if source.keys:
            return []
        for place, call in enumerate(calls):
            states[place] = layer(states[place], **call[number])
        source.drop(layer)
    return [base.norm(state) for state in states]


@torch.no_grad()  # type: ignore[untyped-decorator]
def compare(model: Any, states: list[torch.Tensor], positions: int) -> dict[str, float | int]:
    """The largest difference to the logits on standard input."""
    worst: dict[str, float | int] = {"delta": 0.0, "row": 0, "position": 0}
    for row, state in enumerate(states):
        for first in range(0, state.shape[1], positions):
            logits = model.get_output_embeddings()(state[:, first : first + positions])[0].float()
            content = sys.stdin.buffer.read(4 * logits.numel())
            expected = torch.frombuffer(bytearray(content), dtype=torch.float32).view(logits.shape)
            deltas = torch.nan_to_num((logits - expected).abs().amax(-1), nan=float("inf"))
            place = int(deltas.argmax())
            if float(deltas[place]) > worst["delta"]:
                worst = {"delta": float(deltas[place]), "row": row, "position": first + place}
    return worst


def main(folder: str, by_layer: bool) -> None:
    logging.disable_progress_bar()
    request = json.loads(sys.stdin.buffer.readline())
    source = ByLayer(folder) if by_layer else Whole(folder)
    states = [] if source.keys else hidden_states(source, request["rows"])
    print(json.dumps({"keys": source.keys, **compare(source.model, states, request["positions"])}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], "--by-layer" in sys.argv[2:])
