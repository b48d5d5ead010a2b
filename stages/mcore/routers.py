"""Routers of a mixture of experts: their losses, and the distribution of tokens over experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.core.errors import AtomError
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


def balance_loss(scores: Tensor, load: Tensor, tokens: Tensor) -> Tensor:
    """Returns this rank's part of the balance loss of a micro-batch under a given load, without its weight.

    It is that of Switch Transformer (Fedus et al., 2022): E times the sum over experts of load times mean score, which
    is 1 if load or scores are even. The parts of the ranks that share the micro-batch add up to it.

    Args:
        scores: Scores of this rank's tokens, [tokens, experts], of which each row sums to 1, or to 0 for padding.
        load: Share of each expert of the assignments, [experts].
        tokens: Tokens of the micro-batch on all ranks without padding, a scalar.
    """
    return scores.shape[1] * (scores.sum(0) @ load) / tokens.clamp(min=1)


class RouterWatch:
    """Counts the assignments of the routers in this rank's chunks while gradients are computed.

    Counts are exact whole numbers in float64, so every layout computes the same ones.

    With `routing.global_balance` the balance loss of a micro-batch takes the load of experts from the last step that
    updated weights: all ranks then have the same one from the first micro-batch of a step to the last, and need no
    further collective for it.
    """

    def __init__(self, chunks: Sequence[GPTModel], routing: Routing) -> None:
        self.routing = routing
        device = next(chunks[0].parameters()).device
        self.counts = torch.zeros(len(routing.layers), routing.experts + 2, dtype=torch.float64, device=device)
        """[layers with experts, experts + 2]: tokens of each expert, sum of entropies, tokens."""
        self.batch = self.counts[:, :-1].float()
        """[layers with experts, experts + 1]: tokens of each expert, and minus the sum of entropies, of one micro-batch
        in the layers `rows`."""
        self.rows = range(0)
        self.mask: Tensor | None = None
        self.place: tuple[Any, ...] = ()
        self.real = self.batch
        """The padding mask of that micro-batch, its part that a layer sees, and the real tokens in it."""
        self.load = torch.full(self.counts[:, :-2].shape, 1 / routing.experts, device=device)
        """[layers with experts, experts]: shares of the assignments in the last step that updated weights; before it
        even, which makes the loss constant."""
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    self._hook(module)
                    if routing.global_balance:
                        self._balance_by_load(module)

    def _hook(self, router: Any) -> None:
        route, sigmoid = router.routing, router.score_function
        row = self.routing.layers.index(router.model_layer)
        loads, entropy = self.batch[row, :-1], self.batch[row, -1]

        def routing(logits: Tensor, padding_mask: Tensor) -> Any:
            routed = route(logits, padding_mask=padding_mask)
            # Recomputation runs with gradients as well, and the first pass without: each token counts once.
            if router.training and torch.is_grad_enabled():
                with torch.no_grad():
                    real = self._real_tokens(row, padding_mask)
                    flat = logits.detach().reshape(-1, logits.shape[-1]).float()
                    score = flat.sigmoid() if sigmoid == "sigmoid" else flat.softmax(-1)
                    # Sigmoid scores do not sum to 1, and an entropy needs a distribution.
                    score = score / score.sum(-1, keepdim=True)
                    torch.mv(routed[1].float().t(), real, out=loads)
                    torch.dot(torch.xlogy(score, score).sum(-1), real, out=entropy)
            return routed

        router.routing = routing

    def _real_tokens(self, row: int, padding: Tensor) -> Tensor:
        """Returns 1 for each real token and 0 for padding, for a layer that is about to count a micro-batch.

        Layers in a row that share a micro-batch share the tensor, and add to the counts together: on a GPU each kernel
        of a layer costs the host as much time as a large one.
        """
        # Megatron gives each layer a view of one mask.
        mask = padding if padding._base is None else padding._base
        place = padding.shape, padding.stride(), padding.storage_offset(), mask._version
        if mask is not self.mask or place != self.place or row not in (self.rows.start - 1, self.rows.stop):
            self._add()
            self.mask, self.place, self.rows = mask, place, range(row, row)
            self.real = (~padding.reshape(-1)).float()
        # The backward pass computes layers again from the last one on.
        self.rows = range(min(row, self.rows.start), max(row + 1, self.rows.stop))
        return self.real

    def _add(self) -> None:
        """Adds the micro-batch that layers have counted, if any have."""
        if self.rows:
            part, batch = (each[self.rows.start : self.rows.stop] for each in (self.counts, self.batch))
            part[:, :-2].add_(batch[:, :-1])
            part[:, -2].sub_(batch[:, -1])
            part[:, -1].add_(self.real.sum())
        self.rows = range(0)

    def _balance_by_load(self, router: Any) -> None:
        """Replaces the balance loss of a router, which counts the tokens of a micro-batch."""
        weight, load = router.get_aux_loss_coeff("aux_loss"), self.load[self.routing.layers.index(router.model_layer)]

        def apply_aux_loss(probabilities: Tensor, scores: Tensor, routing_map: Tensor, **_: Any) -> Any:
            if not weight:
                return probabilities
            tokens = routing_map.sum().float() / self.routing.top_k
            if router.tp_cp_group.size() > 1:  # ranks that share the rows of a micro-batch
                dist.all_reduce(tokens, group=router.tp_cp_group)
            loss = weight * balance_loss(scores, load, tokens)
            return router.attach_and_log_load_balancing_loss(
                probabilities, weight, loss, "load_balancing_loss", router.tp_cp_group
            )

        router._apply_aux_loss = apply_aux_loss

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint needs to go on: `expert_load`, as nested lists, if the balance loss reads it."""
        return {"expert_load": self.load.tolist()} if self.routing.global_balance else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned; without it the load is even.

        Raises AtomError if the load is that of other layers or experts.
        """
        load = torch.full_like(self.load, 1 / self.routing.experts)
        if "expert_load" in state:
            load = torch.tensor(state["expert_load"])
        if load.shape != self.load.shape:
            raise AtomError(
                f"expert_load in the state of the checkpoint is {tuple(load.shape)}, not {tuple(self.load.shape)} for "
                "layers and experts of the model; continue from a checkpoint of this model"
            )
        self.load.copy_(load)

    def collect(self, all_reduce: Any) -> Experts:
        """The counts since the last call. all_reduce: sums a tensor over all ranks, in place."""
        self._add()
        # Collective over all ranks: each counts its own tokens and layers, and zeros elsewhere. The copy stays local.
        counts = all_reduce(self.counts.clone()).cpu()
        self.counts.zero_()
        assigned, tokens = counts[:, :-2], counts[:, -1]
        share = assigned / assigned.sum(-1, keepdim=True)
        dropped = int((tokens * self.routing.top_k - assigned.sum(-1)).sum())
        return Experts(list(self.routing.layers), share.float(), (counts[:, -2] / tokens).float(), dropped)
