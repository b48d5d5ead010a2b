"""The gated delta rule and the short convolution before it in plain PyTorch, for rows of several documents.

A head has a state S [dim of a key, dim of a value]. A token with query q, key k, value v, decay exp(g) and rate beta
changes it, and reads it (Yang et al., 2024, "Gated Delta Networks", arXiv:2412.06464):

    S <- exp(g) S        S <- S + k (beta (v - S^T k))^T        output = S^T q / sqrt(dim of a key)

By chunks of tokens, only the states between chunks are computed one after the other. The state and the convolution
start anew with each document, by masks and not by rows of their own, so a row costs the same however it is divided.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from stages.models.qwen3_next import CHUNK


def gated_delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """query, key: [rows, length, heads, dim], of length 1 each; value: [rows, length, heads, dim of a value]; g, beta:
    [rows, length, heads]; starts: the first position of each position's document, [rows, length], or None if a row is
    one document. Returns the outputs in the shape of value, in its type; the arithmetic is fp32."""
    length, kind = value.shape[1], value.dtype
    chunks = -(-length // CHUNK)
    query, key, value, g, beta = (_by_chunks(x, chunks) for x in (query, key, value, g, beta))
    position = torch.arange(chunks * CHUNK, device=value.device).view(1, chunks, CHUNK)
    if starts is None:
        starts = torch.zeros_like(position)
    else:
        starts = F.pad(starts, (0, chunks * CHUNK - length), value=length).view(-1, chunks, CHUNK)
    same = (starts[..., None] == starts[..., None, :])[:, None]  # [rows, 1, chunks, CHUNK, CHUNK]
    earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=value.device).tril()
    goes_on = (starts < position[..., :1])[:, None].unsqueeze(-1)  # the document began before the chunk

    decay = g.cumsum(-1)  # of the chunk up to a token
    difference = (decay[..., None] - decay[..., None, :]).masked_fill(~(same & earlier), -torch.inf).exp()
    from_before = decay.exp()[..., None] * goes_on
    # within a chunk, what a token writes depends on what the earlier ones wrote: a triangular system
    weights = beta[..., None] * (key @ key.mT) * difference
    system = weights.tril(-1) + torch.eye(CHUNK, device=value.device)
    written = torch.linalg.solve_triangular(
        system, torch.cat((value, key * from_before), -1) * beta[..., None], upper=False, unitriangular=True
    )
    written, read = written.split((value.shape[-1], key.shape[-1]), -1)
    query = query / math.sqrt(query.shape[-1])
    scores = (query @ key.mT) * difference
    query = query * from_before
    # what of a chunk is in the state after it: the document of its last token
    kept = key * difference[..., -1, :, None]
    carried = from_before[..., -1:, :]

    state, outputs = value.new_zeros(*value.shape[:2], key.shape[-1], value.shape[-1]), []
    for n in range(chunks):
        new = written[:, :, n] - read[:, :, n] @ state
        outputs.append(query[:, :, n] @ state + scores[:, :, n] @ new)
        state = state * carried[:, :, n] + kept[:, :, n].mT @ new
    out = torch.stack(outputs, 2).flatten(2, 3)[:, :, :length]
    return out.transpose(1, 2).to(kind)


def _by_chunks(x: torch.Tensor, chunks: int) -> torch.Tensor:
    """[rows, length, heads, ...] -> fp32 [rows, heads, chunks, CHUNK, ...], padded with zeros, which write nothing."""
    x = x.transpose(1, 2).float()
    padding = (0, 0) * (x.dim() - 3) + (0, chunks * CHUNK - x.shape[2])
    padded: torch.Tensor = F.pad(x, padding).unflatten(2, (chunks, CHUNK))
    return padded


def short_convolution(x: torch.Tensor, weight: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
    """Each channel's causal convolution, and SiLU. x: [rows, length, channels]; weight: [channels, 1, width], the last
    of which multiplies the token itself; starts: as above."""
    width = weight.shape[-1]
    if starts is None:
        padded = F.pad(x.transpose(1, 2), (width - 1, 0))
        return F.silu(F.conv1d(padded, weight, groups=len(weight)).transpose(1, 2))
    position = torch.arange(x.shape[1], device=x.device)
    out = x * weight[:, 0, -1]
    for back in range(1, min(width, x.shape[1])):
        inside = (position[back:] - back >= starts[:, back:])[..., None]
        out = out + F.pad(x[:, :-back] * inside * weight[:, 0, -1 - back], (0, 0, back, 0))
    return F.silu(out)
