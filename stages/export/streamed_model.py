"""A model in plain transformers, whole or a layer at a time, and the parity check of an export with it.

    python -P streamed_model.py MODEL_FOLDER [--by-layer] < EXPECTED

EXPECTED is a line of JSON, `rows` (token ids), `steps` (of each row, the distance of its neighbors' positions),
`positions` (of a slice), `tolerance` and `ties` (of each row, the positions at which two experts of a router nearly
tie), and then Megatron's logits: for each row, slices of so many positions, fp32 [positions, vocabulary]. The last
printed line is one JSON object: keys that were missing, left over or of another shape, the largest logit difference,
its location, and the tokens that are compared by it. With --by-layer, one layer of the model is in memory at a time.

This file imports no module of this project, on purpose: the CPU patches of Megatron must not affect the compared model.
load_check.py loads it by its path.
"""

from __future__ import annotations

import atexit
import gc
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

gc.set_threshold(20_000)  # the imports leave half a million objects that never end
atexit.register(gc.freeze)  # nor does the end of the process walk over them

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig  # noqa: E402
from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: E402
from transformers.modeling_utils import LoadStateDictConfig  # noqa: E402
from transformers.utils import logging  # noqa: E402

KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")
SAFE = {"trust_remote_code": False, "local_files_only": True}
"""Options that run nothing of an untrusted folder, without a prompt."""


class Whole:
    """A model that `from_pretrained` has loaded, in fp32.

    keys: sentences on tensors that are missing, left over or of another shape.
    """

    in_memory = True

    def __init__(self, folder: str) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **SAFE
        )
        self.model, loading = loaded
        self.keys = [f"{kind.replace('_', ' ')} {key}" for kind in KINDS for key in sorted(map(str, loading[kind]))]

    def load(self, at: str) -> None: ...

    def drop(self, module: torch.nn.Module) -> None: ...


class ByLayer:
    """A model in fp32 without weights, of which parts are loaded one at a time.

    Parts get their weights by the method that `from_pretrained` calls for all of them. `keys` are as those of `Whole`,
    of the parts that were loaded.
    """

    in_memory = False

    def __init__(self, folder: str) -> None:
        config = AutoConfig.from_pretrained(folder, **SAFE)
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        self.model.eval()
        if Path(folder, "generation_config.json").exists():
            self.model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
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
            # A slice is read when transformers asks for it, in its type.
            state[name] = opened[path].get_slice(name)
        settings = LoadStateDictConfig(dtype=torch.float32, weight_mapping=self.conversions)
        # A private method of transformers, as the public one loads all tensors at once.
        loading, _ = self.model._load_pretrained_model(self.model, state, None, settings)
        tied = self.model.all_tied_weights_keys
        names = [n for n, p in self.model.named_parameters() if n.startswith(at) and p.is_meta]
        missing = [n for n in names if n not in tied and (at or not n.startswith(self.prefix))]
        for kind, keys in zip(KINDS, (missing, loading.unexpected_keys, loading.mismatched_keys), strict=True):
            self.keys += [f"{kind.replace('_', ' ')} {key}" for key in sorted(map(str, keys))]
        self.keys += [f"{error} at {key}" for key, error in sorted(loading.conversion_errors.items())]

    def drop(self, module: torch.nn.Module) -> None:
        module.to("meta")


def fp32_bytes(folder: Path) -> int:
    """Bytes of the tensors of all files in fp32."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return 4 * count


def files(folder: Path) -> dict[str, Path]:
    """The file of each tensor. Raises ValueError if an index does not add up with its files."""
    index = folder / "model.safetensors.index.json"
    stated = json.loads(index.read_text())["weight_map"] if index.exists() else None
    # File names alone: the index of a stranger must not lead out of the folder.
    if outside := [name for name in set(stated.values()) if Path(name).name != name] if stated else []:
        raise ValueError(f"{index.name} names the file {outside[0]}, which is not in its folder")
    file_of: dict[str, Path] = {}
    for path in sorted({folder / name for name in stated.values()} if stated else [folder / "model.safetensors"]):
        with safe_open(path, framework="pt") as file:
            file_of |= dict.fromkeys(file.keys(), path)
    if stated is not None and {name: path.name for name, path in file_of.items()} != stated:
        raise ValueError(f"{index.name} does not list the tensors of its files")
    return file_of


@torch.no_grad()
def hidden_states(source: Whole | ByLayer, rows: list[list[int]], steps: list[int] | None = None) -> list[Tensor]:
    """The rows' hidden states after the last norm, [1, length, hidden]; each layer is loaded once.

    An empty list if layers lack tensors, which `source.keys` then names. steps: of each row, the distance of its
    neighbors' positions; None: 1.
    """
    base = source.model.base_model
    states: list[Tensor] = []
    calls: list[list[dict[str, Any]]] = []  # of each row, the keywords of each layer: masks, rotary tables

    def record(hidden: Tensor, **keywords: Any) -> Tensor:
        if not calls[-1]:
            states.append(hidden)
        calls[-1].append(keywords)
        return hidden

    # The model's own code makes masks and rotary tables: record what it calls its layers with, then call them one by
    # one.
    for layer in base.layers:
        layer.forward = record
    for row, step in zip(rows, steps or [1] * len(rows), strict=True):
        calls.append([])
        spread: dict[str, Any] = {}
        if step > 1:  # without a mask, positions with gaps would be those of several documents
            positions = torch.arange(len(row))[None] * step
            spread = {"position_ids": positions, "attention_mask": torch.ones_like(positions)}
        base(input_ids=torch.tensor([row]), use_cache=False, **spread)
    for number, layer in enumerate(base.layers):
        del layer.forward
        source.load(f"{source.model.base_model_prefix}.layers.{number}.")
        if source.keys:
            return []
        for place, call in enumerate(calls):
            states[place] = layer(states[place], **call[number])
        source.drop(layer)
    return [base.norm(state) for state in states]


LOOSE = 100
"""Tolerances by which half the tokens after a near tie may differ at most: 33 by a tie of atom-mini, where a wrong
position or scale gives thousands."""


@torch.no_grad()
def compare(
    model: Any, states: list[Tensor], positions: int, tolerance: float, ties: list[list[int]]
) -> dict[str, float | int]:
    """The largest difference to the logits on standard input, and the number of tokens that are compared by it.

    A row is compared up to a near tie at which it differs, if half the tokens after that differ little.
    """
    worst: dict[str, float | int] = {"delta": 0.0, "row": 0, "position": 0, "tokens": 0}
    for row, state in enumerate(states):
        slices = []
        for first in range(0, state.shape[1], positions):
            logits = model.get_output_embeddings()(state[:, first : first + positions])[0].float()
            content = sys.stdin.buffer.read(4 * logits.numel())
            expected = torch.frombuffer(bytearray(content), dtype=torch.float32).view(logits.shape)
            # No comparison with NaN is true, so that it would pass for no difference.
            slices.append(torch.nan_to_num((logits - expected).abs().amax(-1), nan=float("inf")))
        deltas = torch.cat(slices)
        apart = (deltas >= tolerance).nonzero().flatten().tolist()
        if apart and apart[0] in ties[row]:
            after = deltas[apart[0] + 1 :]
            if not len(after) or float(after.median()) < LOOSE * tolerance:
                deltas = deltas[: apart[0]]
        worst["tokens"] += len(deltas)
        if len(deltas) and float(deltas.max()) > worst["delta"]:
            worst |= {"delta": float(deltas.max()), "row": row, "position": int(deltas.argmax())}
    return worst


def main(folder: str, by_layer: bool) -> None:
    logging.disable_progress_bar()
    request = json.loads(sys.stdin.buffer.readline())
    source = (ByLayer if by_layer else Whole)(folder)
    states = [] if source.keys else hidden_states(source, request["rows"], request["steps"])
    result = compare(source.model, states, request["positions"], request["tolerance"], request["ties"])
    print(json.dumps({"keys": source.keys, **result}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], "--by-layer" in sys.argv[2:])
