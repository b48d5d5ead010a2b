"""Initial weights that do not depend on the layout: each tensor has a generator of its own.

The generator is seeded from (seed, global name); an expert's name contains its index in the whole model, so any split
over any number of ranks starts from the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from stages.mcore.param_names import INTO_THE_STREAM, MATRICES, VECTORS
from stages.models.base import ModelConfig


def full_tensor(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """The whole initial fp32 tensor of that global name.

    Ones for norms (zeros where 1 is added to them), zeros for biases and sinks, otherwise normal with standard
    deviation `init_std`, divided by sqrt(2 * layers) where a layer writes into the residual stream (GPT-2's scaling).
    A gated delta net starts as Megatron's: ones for the biases of the decay, its rates uniform from 1 to 16, and a
    convolution as PyTorch's.
    Of an adapter, B is zero and A uniform up to 1 / sqrt(its columns), as PEFT draws it.
    """
    if name.endswith("layernorm.weight"):
        return torch.zeros(shape) if model.zero_centered_norms else torch.ones(shape)
    if name.endswith(("out_norm.weight", ".dt_bias")):
        return torch.ones(shape)
    if name.endswith(("expert_bias", ".lora_B", *VECTORS)):
        return torch.zeros(shape)
    if name.endswith(".lora_A"):
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=_generator(name, seed))
    if name.endswith(".A_log"):
        # Rates of decay as in Mamba-2 and in Megatron's layer, kept as logarithms.
        return torch.empty(shape).uniform_(1.0, 16.0, generator=_generator(name, seed)).log_()
    if name.endswith(".conv1d.weight"):
        bound = 1 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=_generator(name, seed))
    if not name.endswith(MATRICES):
        raise ValueError(f"there is no rule for the initial weights of {name}; add one to stages/mcore/weight_init.py")
    std = model.init_std
    if name.endswith(INTO_THE_STREAM):
        # Two such matrices a layer: the variance of the stream then stays that of one layer (GPT-2).
        std /= math.sqrt(2 * model.layers)
    return torch.empty(shape).normal_(0.0, std, generator=_generator(name, seed))


def _generator(name: str, seed: int) -> torch.Generator:
    # Not from Python's hash, which differs from process to process.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Initial(Mapping[str, Tensor]):
    """The initial tensors of a model, each drawn on access."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, seed: int) -> None:
        """shapes: by global name."""
        self.shapes, self.model, self.seed = shapes, model, seed

    def __getitem__(self, name: str) -> Tensor:
        return full_tensor(name, self.shapes[name], self.model, self.seed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
