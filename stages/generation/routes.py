"""The experts that a sampler chose for the tokens of an answer, as bytes: an unsigned integer each, in the order
[tokens, layers with experts, experts of a token], as vLLM has them. The tokens are those of question and answer without
the last one, which no layer has read."""

from __future__ import annotations

import numpy as np
import torch

from stages.models.base import Routing

BYTE = 256
"""Number of experts up to which one byte holds an expert."""


def encode(routes: torch.Tensor, experts: int) -> bytes:
    """routes: [tokens, layers, experts of a token]; experts: of a layer."""
    record: bytes = routes.numpy().astype(_type(experts)).tobytes()
    return record


def decode(record: bytes, tokens: int, routing: Routing) -> torch.Tensor:
    """int16 [tokens, layers, experts of a token]. Raises ValueError if the bytes are no such record: another number of
    tokens, an expert that the model does not have, or one twice."""
    values = np.frombuffer(record, _type(routing.experts))
    shape = tokens, len(routing.layers), routing.top_k
    if values.size != tokens * shape[1] * shape[2]:
        raise ValueError(f"{values.size} experts are not those of {tokens} tokens in {shape[1]} layers")
    routes = torch.from_numpy(values.astype(np.int16)).view(shape)
    ordered = routes.sort(-1).values
    if bool((routes >= routing.experts).any() or (ordered[..., 1:] == ordered[..., :-1]).any()):
        raise ValueError(f"a token visits an expert twice, or one that is not among {routing.experts}")
    return routes


def _type(experts: int) -> str:
    return "u1" if experts <= BYTE else "<u2"
