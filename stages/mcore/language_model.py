"""Megatron's language model with this project's losses."""

from __future__ import annotations

from typing import Any

import torch

from stages.mcore.megatron_imports import GPTModel, tensor_parallel
from stages.mcore.sliced_loss import token_losses
from stages.models.parallel_layout import Layout


class TokenLosses:
    """For a language model of Megatron, left of it among the bases: a loss by slices of tokens where the layout has one
    (`Layout.slices_loss`). The argument `loss_mask` then has the meaning of `weights` in `sliced_loss.token_losses`.

    The model's `forward` passes its last hidden states to `_postprocess`, as GPTModel does. The argument `targets`
    (`stages.train.data.Batch`) computes the logits of these alone; the losses have the shape of `labels`, and are 0
    elsewhere.
    """

    config: Any
    output_layer: Any
    post_process: bool
    share_embeddings_and_output_weights: bool
    shared_embedding_or_output_weight: Any
    vocab_size: int
    layout: Layout
    real_vocab_size: int
    targets: torch.Tensor | None = None

    def forward(self, *inputs: Any, targets: torch.Tensor | None = None, **keywords: Any) -> Any:
        self.targets = targets
        return super().forward(*inputs, **keywords)  # type: ignore[misc]

    def _postprocess(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None, loss_mask: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Any:  # fmt: skip
        if not self.post_process or labels is None:
            return self._all_losses(hidden_states, labels, loss_mask, inputs)
        targets, grid = self.targets, labels
        is_sliced = self.layout.slices_loss(
            labels.numel() if targets is None else targets.shape[1], self.config.hidden_size, self.vocab_size
        )
        if self.layout.tp > 1 and (is_sliced or targets is not None):
            hidden_states, is_sliced = tensor_parallel.gather_from_sequence_parallel_region(hidden_states), True
        if targets is not None:
            hidden_states = hidden_states[:, 0].index_select(0, targets[0])[:, None]
            labels = labels.flatten().index_select(0, targets[1])[None]
            loss_mask = None if loss_mask is None else loss_mask.flatten().index_select(0, targets[1])[None]
        if is_sliced:
            for hook in self.output_layer._forward_pre_hooks.values():  # it would wait for weights (`overlap_weights`)
                hook(self.output_layer, ())
            shared = self.share_embeddings_and_output_weights
            head = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
            losses = token_losses(hidden_states, head, labels, self.real_vocab_size, loss_mask)
        else:
            losses = self._all_losses(hidden_states, labels, loss_mask, inputs)
        if targets is None:
            return losses
        return losses.new_zeros(grid.numel()).index_copy(0, targets[1], losses.flatten()).view(grid.shape)

    def _all_losses(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None, loss_mask: torch.Tensor | None, inputs: Any
    ) -> Any:
        """Megatron's."""
        postprocess = super()._postprocess  # type: ignore[misc]
        return postprocess(hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **inputs)


class LanguageModel(TokenLosses, GPTModel):  # type: ignore[misc]
    """Megatron's GPTModel with these losses."""
