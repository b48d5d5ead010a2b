"""Routers of a mixture of experts: their losses, and the distribution of tokens over experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.mcore import megatron_compat
from stages.mcore.megatron_imports import GPTModel, TopKRouter
from stages.models.base import Routing

DEAD_SHARE = 0.05
"""An expert with less than this part of its fair share of a step's tokens counts as dead."""


def collect_losses() -> tuple[Tensor, Tensor]:
    """The load-balancing loss and the z-loss since the last call, scalars without their weights.

    Each is this rank's part of the sum over layers, tokens and micro-batches.
    """
    losses = {"balance": torch.zeros(()), "z": torch.zeros(())}
    for name, values in megatron_compat.router_losses().items():
        kind = "z" if name == "z_loss" else "balance"
        losses[kind] = losses[kind].to(values.device) + values.sum()
        # Megatron adds to these over micro-batches, and resets them only in its own logging.
        values.zero_()
    return losses["balance"], losses["z"]


def clear_losses() -> None:
    """Clears Megatron's record of losses: its size is that of the first model of the process."""
    megatron_compat.clear_router_losses()


@dataclass(frozen=True)
class Experts:
    """The distribution of a step's tokens over experts, of all ranks and micro-batches, without padding.

    share: [layers with experts, experts], of the layer's assignments, rows sum to 1; entropy: [layers], mean entropy of
    the router's distribution over all experts, in nats; dropped: assignments that no expert took.
    """

    layers: list[int]
    share: Tensor
    entropy: Tensor
    dropped: int

    @property
    def max_violation(self) -> float:
        """The busiest expert's load over the mean load, less 1; the largest of all layers (Wang et al., 2024)."""
        return float(self.share.max() * self.share.shape[1]) - 1

    def dead(self) -> list[tuple[int, int]]:
        """(layer, expert) of the dead experts."""
        starved = (self.share * self.share.shape[1] < DEAD_SHARE).nonzero().tolist()
        return [(self.layers[row], expert) for row, expert in starved]

    def json(self) -> dict[str, Any]:
        """The metrics as JSON; null stands for a value that is not finite."""
        return {
            "layers": self.layers,
            "share": [[round(x, 6) if math.isfinite(x) else None for x in row] for row in self.share.tolist()],
            "entropy": [round(x, 6) if math.isfinite(x) else None for x in self.entropy.tolist()],
            "dropped": self.dropped,
            "dead": [list(pair) for pair in self.dead()],
        }


class RouterWatch:
    """Counts the assignments of the routers in this rank's chunks while gradients are computed.

    Counts are exact whole numbers in float64, so every layout computes the same ones.
    """

    def __init__(self, chunks: Sequence[GPTModel], routing: Routing) -> None:
        self.routing = routing
        device = next(chunks[0].parameters()).device
        self.counts = torch.zeros(len(routing.layers), routing.experts + 2, dtype=torch.float64, device=device)
        """[layers with experts, experts + 2]: tokens of each expert, sum of entropies, tokens."""
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    self._hook(module)

    def _hook(self, router: Any) -> None:
        route, sigmoid = router.routing, router.score_function
        row = self.counts[self.routing.layers.index(router.model_layer)]

        def routing(logits: Tensor, padding_mask: Tensor | None = None) -> Any:
            routed = route(logits, padding_mask=padding_mask)
            # Recomputation runs with gradients as well, and the first pass without: each token counts once.
            if router.training and torch.is_grad_enabled():
                with torch.no_grad():
                    flat = logits.detach().reshape(-1, logits.shape[-1]).float()
                    score = flat.sigmoid() if sigmoid == "sigmoid" else flat.softmax(-1)
                    # Sigmoid scores do not sum to 1, and an entropy needs a distribution.
                    score = score / score.sum(-1, keepdim=True)
                    entropy = -torch.xlogy(score, score).sum(-1)
                    not_padding = (
                        torch.ones_like(entropy) if padding_mask is None else (~padding_mask.reshape(-1)).float()
                    )
                    row[:-2] += not_padding @ routed[1].float()
                    row[-2] += entropy @ not_padding
                    row[-1] += not_padding.sum()
            return routed

        router.routing = routing

    def collect(self, all_reduce: Any) -> Experts:
        """The counts since the last call. all_reduce: sums a tensor over all ranks, in place."""
        # Collective over all ranks: each counts its own tokens and layers, and zeros elsewhere. The copy stays local.
        counts = all_reduce(self.counts.clone()).cpu()
        self.counts.zero_()
        assigned, tokens = counts[:, :-2], counts[:, -1]
        share = assigned / assigned.sum(-1, keepdim=True)
        dropped = int((tokens * self.routing.top_k - assigned.sum(-1)).sum())
        return Experts(list(self.routing.layers), share.float(), (counts[:, -2] / tokens).float(), dropped)
