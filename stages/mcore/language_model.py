"""Megatron's language model with this project's losses, by slices of tokens if all logits would be too large.

`Layout.slices_loss` decides. A slice is computed as Megatron computes the whole: logits in the model's precision, their
softmax in fp32, the vocabulary split over tensor ranks. The gradient of the head is summed over slices in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stages.mcore.megatron_imports import GPTModel, parallel_state, tensor_parallel
from stages.models import parallel_layout
from stages.models.parallel_layout import Layout


def token_losses(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    vocab_size: int,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Returns minus the log-probability of each label, fp32 [batch, sequence].

    Args:
        hidden: Inputs of the head [sequence, batch, hidden_size], all of them on each tensor rank.
        head: This tensor rank's part of the matrix [vocabulary / tensor ranks, hidden_size].
        labels: Ids [batch, sequence].
        vocab_size: Ids from this one on have probability zero.
        weights: Weights of the losses [batch, sequence], if the backward pass is of a multiple of
            sum(weights * losses). The gradients are then computed with the losses, from the same logits. Without them,
            the backward pass computes the logits again.
        z_loss: Weight of a z-loss beside each loss: the square of the log-sum-exp of the logits, which keeps the logits
            from drifting (PaLM, arXiv:2204.02311, section 5). It is in the gradients and not in the losses, and
            needs `weights`.
    """
    flat_weights = None if weights is None else weights.t().flatten().float()
    flat_labels = labels.t().flatten()
    losses: Tensor = _TokenLosses.apply(hidden.flatten(0, 1), head, flat_labels, vocab_size, flat_weights, z_loss)
    return losses.view(labels.t().shape).t().contiguous()


def mask_padding(logits: Tensor, vocab_size: int) -> None:
    """Gives ids from `vocab_size` on a logit of minus infinity, in place, as they do not exist in any runtime.

    logits: [..., this tensor rank's part of the padded vocabulary].
    """
    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    # An empty slice on the ranks whose ids all exist.
    logits[..., max(0, vocab_size - first) :] = -math.inf


class _TokenLosses(torch.autograd.Function):
    """The losses of tokens by slices, and their gradients.

    `hidden` is [tokens, hidden_size]; `labels`, `weights` and the losses are [tokens].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        vocab_size: int,
        weights: Tensor | None,
        z_loss: float,
    ) -> Tensor:
        ctx.vocab_size = vocab_size
        ctx.has_gradients = weights is not None and any(ctx.needs_input_grad)
        # Without weights nothing is known of the backward pass, so the gradients are left to it.
        if weights is None or not ctx.has_gradients:
            ctx.save_for_backward(head, hidden, labels)
            return _losses(hidden, head, labels, vocab_size)
        losses, *gradients = _losses_and_gradients(hidden, head, labels, vocab_size, weights, z_loss)
        ctx.save_for_backward(head, *gradients, weights)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.has_gradients:
            head, of_hidden, of_head, weights = ctx.saved_tensors
            # The backward pass is a multiple of the weighted sum, whose factor this recovers.
            scale = gradient.dot(weights) / weights.dot(weights).clamp_min(torch.finfo(torch.float32).tiny)
            of_hidden = of_hidden * scale.to(of_hidden.dtype)
            of_head = torch.mul(of_head, scale, out=torch.empty_like(head))
        else:
            head, hidden, labels = ctx.saved_tensors
            _, of_hidden, of_head = _losses_and_gradients(hidden, head, labels, ctx.vocab_size, gradient)
        return of_hidden, of_head.to(head.dtype), None, None, None, None


def _parts(count: int) -> list[slice]:
    """Returns the slices of that many tokens."""
    size = parallel_layout.LOSS_SLICE
    return [slice(begin, begin + size) for begin in range(0, count, size)]


def _losses(hidden: Tensor, head: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    return torch.cat([_slice(hidden[part], head, labels[part], vocab_size)[0] for part in _parts(len(labels))])


def _losses_and_gradients(
    hidden: Tensor, head: Tensor, labels: Tensor, vocab_size: int, weights: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the losses, and the gradients of sum(weights * losses) with respect to `hidden` and `head`.

    With a z-loss they are those of sum(weights * (losses + z_loss * square of the logits' log-sum-exp)).

    That of `hidden` is this tensor rank's share of a sum; that of `head` is in fp32.
    """
    losses = torch.empty_like(weights)
    of_hidden, of_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
    for part in _parts(len(labels)):
        # `of_logits` begins as the probabilities and becomes the gradient in place.
        losses[part], of_logits, at_labels, is_here, log_sums = _slice(hidden[part], head, labels[part], vocab_size)
        # d loss / d logits = softmax - one at the label, by the weight of the token.
        of_logits *= weights[part, None]
        if z_loss:
            # d log_sum² / d logits = 2 log_sum softmax
            of_logits *= 1 + 2 * z_loss * log_sums[:, None]
        of_logits[at_labels] -= weights[part] * is_here
        # Under the same name, so that the fp32 tensor is freed before the products.
        of_logits = of_logits.to(hidden.dtype)
        torch.mm(of_logits, head, out=of_hidden[part])
        if of_logits.dtype == of_head.dtype:
            of_head.addmm_(of_logits.t(), hidden[part])
        else:
            of_head += of_logits.t() @ hidden[part]
        del of_logits
    return losses, of_hidden, of_head


def _slice(
    hidden: Tensor, head: Tensor, labels: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Returns the losses of a slice of tokens, and what their gradients are made of.

    After the losses come the probabilities of this tensor rank's ids, fp32 [tokens, ids]; the indices of the labels in
    them; True for each label that this rank has; and the log-sum-exp of the logits [tokens].
    """
    group, rank = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_rank()
    logits = hidden @ head.t()
    mask_padding(logits, vocab_size)
    logits = logits.float()
    # Cross-entropy over a split vocabulary (Shoeybi et al., 2019, arXiv:1909.08053, section 3): maximum, sum of
    # exponentials and the label's logit are reduced, instead of gathering the logits.
    maxima = logits.amax(-1)
    if group.size() > 1:
        # Without the common maximum, the exponentials of the ranks would have different scales.
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
    logits -= maxima[:, None]

    local_ids = labels - rank * len(head)
    is_here = (local_ids >= 0) & (local_ids < len(head))
    at_labels = torch.arange(len(local_ids), device=local_ids.device), local_ids.where(is_here, 0)
    label_logits = logits[at_labels].where(is_here, 0.0)
    exponentials = logits.exp_()
    # Both in one collective, as latency is all that it costs.
    sums = torch.stack([label_logits, exponentials.sum(-1)])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    label_logits, total = sums
    log_total = total.log()
    return log_total - label_logits, exponentials.div_(total[:, None]), at_labels, is_here, maxima + log_total


class LanguageModel(GPTModel):  # type: ignore[misc]
    """Megatron's GPTModel with its loss by slices of tokens where the layout has this (`Layout.slices_loss`).

    The argument `loss_mask` then has the meaning of `weights` in `token_losses`. With the argument `targets`
    (`stages.train.data.Batch`) the logits of these alone are computed; the losses have the shape of `labels`, and are 0
    elsewhere.

    Attributes:
        layout: The layout, which states whether losses are computed by slices.
        real_vocab_size: Ids from this one on are padding.
        z_loss: Weight of the z-loss of the logits (`token_losses`).
        targets: The targets of the present forward pass; None for all tokens.
    """

    layout: Layout
    real_vocab_size: int
    z_loss: float = 0.0
    targets: Tensor | None = None

    def forward(self, *inputs: Any, targets: Tensor | None = None, **keywords: Any) -> Any:
        self.targets = targets
        return super().forward(*inputs, **keywords)

    def _postprocess(
        self, hidden_states: Tensor, labels: Tensor | None, loss_mask: Tensor | None = None, **inputs: Any
    ) -> Any:
        if not self.post_process or labels is None:
            return self._megatron_postprocess(hidden_states, labels, loss_mask, inputs)
        targets, all_labels = self.targets, labels
        is_sliced = self.layout.slices_loss(
            labels.numel() if targets is None else targets.shape[1],
            self.config.hidden_size,
            self.vocab_size,
            has_z_loss=self.z_loss > 0,
        )
        if self.layout.tp > 1 and (is_sliced or targets is not None):
            # Collective among the tensor ranks: each has a part of the vocabulary and needs all tokens. The backward
            # pass scatters the sum of their gradients.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states)
            # Megatron's loss would gather them again.
            is_sliced = True
        if targets is not None:
            # One row of documents: only its targets pass through the head.
            hidden_states = hidden_states[:, 0].index_select(0, targets[0])[:, None]
            labels = labels.flatten().index_select(0, targets[1])[None]
            loss_mask = None if loss_mask is None else loss_mask.flatten().index_select(0, targets[1])[None]
        if is_sliced:
            for hook in self.output_layer._forward_pre_hooks.values():  # it would wait for weights (`overlap_weights`)
                hook(self.output_layer, ())
            shared = self.share_embeddings_and_output_weights
            head = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
            losses = token_losses(hidden_states, head, labels, self.real_vocab_size, loss_mask, self.z_loss)
        else:
            losses = self._megatron_postprocess(hidden_states, labels, loss_mask, inputs)
        if targets is None:
            return losses
        # Megatron's schedule expects the shape of the labels.
        return losses.new_zeros(all_labels.numel()).index_copy(0, targets[1], losses.flatten()).view(all_labels.shape)

    def _megatron_postprocess(
        self, hidden_states: Tensor, labels: Tensor | None, loss_mask: Tensor | None, inputs: dict[str, Any]
    ) -> Any:
        """Returns what Megatron returns: hidden states before the last stage, logits without labels, else losses."""
        return super()._postprocess(hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **inputs)
