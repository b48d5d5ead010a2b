"""The memory of a vLLM server, in closed form. No torch: `atom plan` imports this file."""

from __future__ import annotations

from stages.models.base import ModelConfig

SERVER_BYTES = 3_000_000_000
"""Of a server's process on a core without weights; on a GPU of its context, graphs and activations; and of the host's
memory for each GPU and the server itself."""
PYTHON_BYTES = 700_000_000
"""Of a process that has imported PyTorch and transformers."""
TOKENS_AT_ONCE = 2048
"""Tokens that a server on GPUs reads in one step."""
LOGITS = 3
"""Copies of their logits in fp32 that a GPU holds at a time: as computed, converted, and as log-probabilities."""


def beside_weights(model: ModelConfig, padded_vocab_size: int, width: int, gpus: int) -> int:
    """Bytes of a server's process beside its weights, on each of its GPUs if it has some: with keys and values of one
    row of the whole context. width: bytes of a weight."""
    row = model.cache_bytes(width, max(1, gpus), model.context_length)
    return SERVER_BYTES + row + (LOGITS * 4 * TOKENS_AT_ONCE * padded_vocab_size if gpus else 0)


def host_bytes(gpus: int) -> int:
    """Bytes of a server on so many GPUs in the memory of its host."""
    return (gpus + 1) * SERVER_BYTES


def on_cores(weight_bytes: int, beside: int) -> int:
    """Bytes of a server without GPUs. vLLM packs matrices anew, so that both are there."""
    return PYTHON_BYTES + 2 * weight_bytes + beside
