"""An adapter in PEFT's format, and the model that it makes of its base.

`adapter_config.json` and `adapter_model.safetensors` are those of PEFT's `save_pretrained`. The rows of each B are
split as the export splits the matrix itself, so queries, keys and values repeat their common A. transformers 5 holds
the experts of a layer in two stacked tensors, for which PEFT takes the factors of all experts in one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.errors import CheckFailed
from pipeline.core.store import Artifact, sha256_file
from stages.export.variants.registry import STACKED, adapter_config
from stages.formats.table import write_json
from stages.mcore.hf_mapping import to_hf
from stages.mcore.lora import A, B, Lora, factor
from stages.models.base import ModelConfig
from stages.train.checkpoint import release_checkpoint
from stages.train.checkpoint.release_checkpoint import Tensors
from stages.train.imported_weights import NAME as BASE

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
PREFIX = "base_model.model."
EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
PLACES = {"gate_up": "base_layer.", "down": ""}
"""Where PEFT has the factors of a stacked tensor, in its module."""
ROUNDING = 8
"""Units in the last place of the largest weight by which two ways to add a product of low rank may differ."""


class _Marked(Mapping[str, Tensor]):
    """Megatron's tensors, in which every value is the number of the tensor in their order; they take no memory."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes, self.numbers = shapes, {name: number for number, name in enumerate(shapes)}

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(float(self.numbers[name]), dtype=torch.float64).expand(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Rows(_Marked):
    """Megatron's tensors: a matrix with an adapter has B in its first columns; all other values are zero."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], adapter: Mapping[str, Tensor], lora: Lora) -> None:
        super().__init__(shapes)
        self.adapter, self.lora = adapter, lora

    def __getitem__(self, name: str) -> Tensor:
        if not self.lora.is_target(name):
            return torch.zeros(1).expand(self.shapes[name])
        b = self.adapter[factor(name, B)]
        return torch.nn.functional.pad(b, (0, self.shapes[name][1] - b.shape[1]))


def factors(
    adapter: Mapping[str, Tensor], lora: Lora, model: ModelConfig, vocab_size: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (transformers' name of a matrix, A, B) for every matrix with an adapter.

    `adapter` has Megatron's tensors by global name.
    """
    shapes = model.shapes(vocab_size)
    names = list(shapes)
    # The mapping renames matrices and cuts their rows. A mark tells from which of Megatron's matrices a result is, and
    # the padded B has the rows of that result.
    marked = to_hf(_Marked(shapes), model, vocab_size)
    rows = to_hf(_Rows(shapes, adapter, lora), model, vocab_size)
    for (hf_name, mark), (_, padded) in zip(marked, rows, strict=True):
        name = names[int(mark.flatten()[0])]
        if lora.is_target(name):
            yield hf_name, adapter[factor(name, A)], padded[:, : lora.rank]


def write(
    adapter: Mapping[str, Tensor], lora: Lora, model: ModelConfig, vocab_size: int, base: Path, repo: str, folder: Path
) -> None:
    """Writes the adapter into a folder, beside base.json with the digests of its base's weights.

    Args:
        adapter: Megatron's tensors by global name.
        lora: The settings of the adapter.
        model: The settings of the model.
        vocab_size: The rows of the embedding.
        base: The folder of the exported base.
        repo: The repository of the base on the Hub.
        folder: The folder to write.
    """
    tensors: dict[str, Tensor] = {}
    # {module of the experts of a layer: {number of an expert: {gate, up or down: (A, B)}}}.
    stacks: dict[str, dict[int, dict[str, tuple[Tensor, Tensor]]]] = {}
    for name, a, b in factors(adapter, lora, model, vocab_size):
        if match := EXPERT.fullmatch(name):
            stacks.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = a, b
        else:
            module = PREFIX + name.removesuffix(".weight")
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    # The last part of a module's name, such as q_proj.
    modules = sorted({name.split(".")[-3] for name in tensors})
    for module, experts in stacks.items():
        for stacked, parts in {"gate_up": ("gate", "up"), "down": ("down",)}.items():
            a_of_experts, b_of_experts = [], []
            for n in sorted(experts):
                pairs = [experts[n][part] for part in parts]
                a_of_experts.append(pairs[0][0])  # gate and up share their A
                b_of_experts.append(torch.cat([b for _, b in pairs]))
            # PEFT multiplies the factors of all experts as one matrix; in B the rank comes first, then the expert.
            stacked_b = torch.stack(b_of_experts, -1).flatten(1)
            place = f"{PREFIX}{module}.{PLACES[stacked]}"
            tensors |= {f"{place}lora_A.weight": torch.cat(a_of_experts), f"{place}lora_B.weight": stacked_b}
    folder.mkdir(parents=True, exist_ok=True)
    release_checkpoint.save_tensors(folder / f"{WEIGHTS}.safetensors", dict(sorted(tensors.items())))
    settings = adapter_config(repo, lora.rank, lora.alpha, modules or None, list(STACKED) if stacks else None)
    write_json(folder / CONFIG, settings)
    write_json(folder / BASE, {"repo": repo, "files": digests(base)})


def write_trained(checkpoint: Artifact, lora: Lora, model: ModelConfig, base: Path, repo: str, folder: Path) -> None:
    """Writes the adapter of a release checkpoint, as `write` does."""
    tensors = release_checkpoint.weights_of(checkpoint)
    vocab_size = json.loads((base / "config.json").read_text())["vocab_size"]
    write(tensors, lora, model, vocab_size, base, repo, folder)


def digests(model: Path) -> dict[str, str]:
    """Returns {name: SHA-256} of the files of weights of an exported model."""
    return {path.name: sha256_file(path) for path in sorted(model.glob("model*.safetensors*"))}


def combined(base: Path, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (transformers' name, tensor) of the base with the adapter of a folder added by PEFT's formulas, in fp32.

    Raises CheckFailed if the adapter is of another base, or changes a tensor that the base does not have.
    """
    stated = json.loads((folder / BASE).read_text())["files"]
    if stated != digests(base):
        raise CheckFailed(f"{folder} is an adapter of other weights than those of {base}; take the base that it names")
    config = json.loads((folder / CONFIG).read_text())
    rank, scale = int(config["r"]), float(config["lora_alpha"]) / int(config["r"])
    pairs = _pairs(Tensors(folder, WEIGHTS), rank)
    weights = Tensors(base)
    if strange := sorted(pairs.keys() - set(weights)):
        raise CheckFailed(f"{folder} changes {strange[0]}, which {base} does not have")
    for name, weight in weights.items():
        tensor = weight.float()
        if name in pairs:
            a, b = pairs[name]
            tensor = tensor + scale * (b.float() @ a.float())
        yield name, tensor


def _pairs(tensors: Mapping[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns {transformers' name of a matrix: its A and B}, from PEFT's tensors."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        a, b = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if not re.search(r"\.mlp\.experts(\.base_layer)?$", module):
            pairs[f"{module}.weight"] = a, b
            continue
        # The inner module has the factors of gate and up, the outer one those of down (`PLACES`).
        experts, is_inner = module.removesuffix(".base_layer"), module.endswith(".base_layer")
        count = len(a) // rank
        for number in range(count):
            expert_a = a[number * rank : (number + 1) * rank]
            expert_b = b.unflatten(1, (rank, count))[:, :, number]
            if not is_inner:
                pairs[f"{experts}.{number}.down_proj.weight"] = expert_a, expert_b
                continue
            gate_rows, up_rows = expert_b.chunk(2)
            pairs[f"{experts}.{number}.gate_proj.weight"] = expert_a, gate_rows
            pairs[f"{experts}.{number}.up_proj.weight"] = expert_a, up_rows
    return pairs


def largest_difference(base: Path, folder: Path, merged: Path) -> tuple[float, float]:
    """Returns the largest difference of a weight between base plus adapter and the merged model; NaN if one is NaN.

    The second number is the largest difference that rounding explains. Raises CheckFailed if the tensors of the two
    differ in name or shape.
    """
    expected = Tensors(merged)
    # A tensor, because Python's `max` drops a NaN.
    worst = torch.zeros(())
    largest = eps = 0.0
    seen = set()
    for name, tensor in combined(base, folder):
        seen.add(name)
        if name not in expected or expected[name].shape != tensor.shape:
            raise CheckFailed(f"{merged} does not have {name} of {folder} on its base")
        eps = max(eps, torch.finfo(expected[name].dtype).eps)
        worst = torch.maximum(worst, (tensor - expected[name].float()).abs().max())
        largest = max(largest, float(tensor.abs().max()))
    if missing := sorted(set(expected) - seen):
        raise CheckFailed(f"{folder} on its base does not have {missing[0]} of {merged}")
    return float(worst), ROUNDING * eps * largest


def require_sum(base: Path, folder: Path, merged: Path) -> str:
    """Returns the largest difference, in one sentence.

    Raises CheckFailed if the base with the adapter in a folder is not the merged model.
    """
    difference, explained = largest_difference(base, folder, merged)
    if not difference <= explained < math.inf:  # NaN and infinite weights fail too
        raise CheckFailed(
            f"{folder} on its base differs from {merged} by {difference:.3g} in a weight, which rounding explains up "
            f"to {explained:.3g}; run sft and its export again"
        )
    return f"base and adapter are the merged model to {difference:.3g}, allowed {explained:.3g}"
