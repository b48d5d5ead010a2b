"""Transformer Engine's own Triton kernels by Triton's interpreter, on the CPU, as Megatron calls them: permutation of
tokens and cross-entropy, forward and backward. Prints the largest difference from plain operations as JSON, as a share
of the largest value.

    TRITON_INTERPRET=1 python -m tests.te.interpreted
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from triton.runtime.autotuner import Autotuner

TOKENS, EXPERTS, TOP_K, HIDDEN, VOCABULARY = 37, 6, 2, 24, 101
"""No power of two, of which the kernels' blocks are."""
Tensors = list[torch.Tensor | None]


def place_on_host() -> None:
    """Kernels run on tensors of the CPU, which their callers take for those of a GPU; without timing, the first of the
    tuned configurations is taken."""
    for name in ("empty", "zeros"):
        setattr(torch, name, _on_host(getattr(torch, name)))
    torch.Tensor.is_cuda = property(lambda tensor: True)
    Autotuner._bench = lambda *arguments, **options: [0.0, 0.0, 0.0]


def _on_host(factory: Any) -> Any:
    return lambda *arguments, device=None, **options: factory(*arguments, **options)


def permuted(dtype: torch.dtype, fused: bool) -> Tensors:
    """Tokens sorted by expert and back, with the gradients of tokens and probabilities. One expert gets none."""
    from megatron.core.transformer.moe import moe_utils

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    chosen = torch.rand(TOKENS, EXPERTS - 1, generator=generator).topk(TOP_K).indices
    routing_map = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, chosen, True)
    probabilities = torch.rand(TOKENS, EXPERTS, generator=generator).requires_grad_()
    out, of_out, order, *_ = moe_utils.permute(
        tokens, routing_map, probs=probabilities, num_out_tokens=TOKENS * TOP_K, fused=fused
    )
    weighted = out * of_out[:, None].to(dtype)
    back = moe_utils.unpermute(weighted, order, tokens.shape, routing_map=routing_map, fused=fused)
    (back.float() * torch.arange(HIDDEN)).sum().backward()
    return [out, of_out, back, tokens.grad, probabilities.grad]


def sorted_by_chunks(dtype: torch.dtype, fused: bool) -> Tensors:
    """Chunks of several ranks sorted by expert."""
    from megatron.core.transformer.moe import moe_utils

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    probabilities = torch.rand(TOKENS, generator=generator).requires_grad_()
    sizes, order = torch.tensor([5, 0, 9, 11, 2, 10]), torch.tensor([0, 3, 1, 4, 2, 5])
    out, of_out = moe_utils.sort_chunks_by_idxs(tokens, sizes, order, probs=probabilities, fused=fused)
    (out.float() * torch.arange(HIDDEN) * of_out[:, None]).sum().backward()
    return [out, of_out, tokens.grad, probabilities.grad]


def losses(dtype: torch.dtype, fused: bool) -> Tensors:
    """Losses of tokens, and the gradient of the logits."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(TOKENS, 2, VOCABULARY, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS, 2), generator=generator)
    weights = torch.rand(TOKENS, 2, generator=generator)
    if fused:
        loss = parallel_cross_entropy(logits, targets, 0.0, False, None)
    else:
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(TOKENS, 2)
    (loss * weights).sum().backward()
    return [loss, logits.grad]


def main() -> None:
    place_on_host()
    differences = {}
    for function in (permuted, sorted_by_chunks, losses):
        for dtype in (torch.float32, torch.bfloat16):
            pairs = zip(function(dtype, True), function(dtype, False), strict=True)
            largest = 0.0
            for fused, plain in pairs:
                assert fused is not None and plain is not None and fused.shape == plain.shape
                difference = (fused.float() - plain.float()).abs().max() / plain.float().abs().max()
                largest = max(largest, float(difference))
            differences[f"{function.__name__} {dtype}"] = largest
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
