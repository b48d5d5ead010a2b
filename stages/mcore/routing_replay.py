"""Routing replay (R3, arXiv 2510.11370): tokens visit the experts that the sampler chose for them, in the forward and
in the backward pass. Megatron's own switch does it: it takes the given experts in place of the best ones, with their
present probabilities, through which gradients flow.

Megatron keeps its switches in a list of the process, in the order of construction. Here each chunk of a model keeps
its own, so that other models of the process do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from stages.mcore.megatron_imports import GPTModel, RouterReplay, RouterReplayAction, TopKRouter
from stages.models.base import Routing

UNRECORDED = -1
"""In the place of an expert: the router chooses for this token, which has no record."""


class Replay(RouterReplay):  # type: ignore[misc]
    """Megatron's, with tokens for which the router chooses."""

    target_topk_idx: torch.Tensor
    replay_backward_list: list[torch.Tensor]

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if self.router_replay_action is not None:
            chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)[1]
            if self.router_replay_action == RouterReplayAction.REPLAY_FORWARD:
                self.target_topk_idx = _fill(self.target_topk_idx, chosen)
            else:
                self.replay_backward_list[0] = _fill(self.replay_backward_list[0], chosen)
        return super().get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)  # type: ignore[no-any-return]


def _fill(target: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return torch.where(target == UNRECORDED, chosen, target)


class RoutingReplay:
    """The switch of all routers of a rank's chunks, which were built with `routing_replay`."""

    def __init__(self, chunks: Sequence[GPTModel], routing: Routing) -> None:
        self.of_chunks: list[list[tuple[int, Replay]]] = []
        """For each chunk, (index among the layers with experts, switch) of its routers."""
        for chunk in chunks:
            routers = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
            for router in routers:
                router.router_replay = Replay()
            self.of_chunks.append(
                [(routing.layers.index(router.model_layer), router.router_replay) for router in routers]
            )
        RouterReplay.clear_global_router_replay_instances()  # it would keep those of models that are gone

    @contextmanager
    def forward(self, chunk: int, routes: torch.Tensor | None) -> Iterator[None]:
        """Within it a chunk computes with these experts: [tokens, layers with experts, experts of a token], or
        `UNRECORDED`; None: with those that its routers choose. A layer that is computed again in the backward pass
        takes them in the order of the forward passes."""
        if routes is None:
            yield
            return
        for layer, switch in self.of_chunks[chunk]:
            switch.set_target_indices(routes[:, layer].long())
            switch.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        yield
        for _, switch in self.of_chunks[chunk]:
            switch.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)

    def clear(self) -> None:
        """Forgets the routes of a step."""
        for switches in self.of_chunks:
            for _, switch in switches:
                switch.clear_indices()
                switch.clear_router_replay_action()
