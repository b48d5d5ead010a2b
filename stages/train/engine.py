"""One model under training: Megatron's DDP, schedules and distributed optimizer around our GPTModel, in any layout."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from stages.model import balance
from stages.model.build import build, named_tensors
from stages.model.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    OptimizerConfig,
    finalize_model_grads,
    get_forward_backward_func,
    get_megatron_optimizer,
    parallel_state,
)
from stages.model.placement import Box, boxes
from stages.model.spec import context_positions
from stages.train.config import TrainConfig
from stages.train.data import Batch, Share
from stages.train.parallel import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepFigures:
    """What one step gave, the same on every rank."""

    loss: float  # mean over the step's loss-carrying targets
    aux_loss: float  # load-balancing loss, summed over layers, mean over micro-batches, without its weight
    grad_norm: float  # before clipping


@dataclass(frozen=True)
class Piece:
    """What this rank's distributed optimizer owns of one tensor: a stretch of the flat local tensor."""

    name: str
    boxes: tuple[Box, ...]
    start: int
    stop: int


class Engine:
    """Holds model and optimizer. Every method is collective: all ranks call it with the same arguments."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks, self.layout = config, ranks, ranks.layout
        self.step_done = 0
        self.shapes = config.model.shapes(config.padded_vocab_size)
        self.chunks = build(config.model, config.padded_vocab_size, self.layout)
        megatron = self.chunks[0].config
        self.ddp = [
            DistributedDataParallel(
                config=megatron,
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=self.layout.overlap_gradients,
                ),
                module=chunk,
                disable_bucketing=number > 0,
            )
            for number, chunk in enumerate(self.chunks)
        ]
        o = config.phase.optimizer
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=o.lr,
                weight_decay=o.weight_decay,
                adam_beta1=o.beta1,
                adam_beta2=o.beta2,
                clip_grad=o.clip,
                use_distributed_optimizer=True,
                params_dtype=torch.float32,
            ),
            self.ddp,
        )
        megatron.finalize_model_grads_func = finalize_model_grads
        megatron.grad_scale_func = _weak(self.optimizer.scale_loss)
        if self.layout.overlap_gradients:  # reduce with the last micro-batch only
            quiet = [_weak(chunk.no_sync) for chunk in self.ddp]
            megatron.no_sync_func = quiet if len(quiet) > 1 else quiet[0]

    def step(self, share: Share, lr: float, check: Callable[[float], None]) -> StepFigures:
        """Forward, backward and update on this rank's share of a step. `check` sees the loss before the update."""
        self._set_rates(lr)
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
            chunk.train()
        self.optimizer.zero_grad()
        loss = self._run(share, forward_only=False)
        aux = self.ranks.sum(balance.take()) / (self.ranks.data_ranks * len(share.micro))
        check(loss)
        _, grad_norm, _ = self.optimizer.step()
        self.step_done += 1
        return StepFigures(loss, aux.item(), float(grad_norm))

    def evaluate(self, share: Share) -> float:
        """Mean loss over the targets of any rows; nothing is changed."""
        for chunk in self.ddp:
            chunk.eval()
        with torch.no_grad():
            loss = self._run(share, forward_only=True)
        balance.take()
        return loss

    def _run(self, share: Share, forward_only: bool) -> float:
        """Runs this rank's share through Megatron's schedule; gives the mean loss over all ranks.

        The loss of a step is the mean over its loss-carrying targets, wherever they lie. Megatron averages over
        micro-batches and DDP over ranks, so each micro-batch's sum is scaled back by both counts.
        """
        scale = len(share.micro) * self.ranks.data_ranks / share.targets
        device = next(self.chunks[0].parameters()).device

        def forward(batches: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            batch: Batch = next(batches)
            ids, where, labels, mask, padding = (x.to(device) for x in self._inputs(batch, model.module))
            losses = model(ids, where, None, labels=labels, padding_mask=padding)

            def reduce(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                total = (losses.float() * mask).sum()
                return total * scale, {"sum": total.detach().clone()}  # a clone: the schedule divides in place

            return losses, reduce

        feeds: list[Any] = [iter(share.micro) for _ in self.ddp]
        out = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=feeds if len(feeds) > 1 else feeds[0],
            model=self.ddp,
            num_microbatches=len(share.micro),
            seq_length=share.width,
            micro_batch_size=share.micro[0].ids.shape[0],
            forward_only=forward_only,
        )
        counted = self.ranks.counts_loss and out
        total = torch.stack([x["sum"] for x in out]).sum() if counted else torch.zeros((), device=device)
        return float(self.ranks.sum(total) / share.targets)

    def _inputs(self, batch: Batch, gpt: Any) -> Iterator[torch.Tensor]:
        """ids, positions, labels, loss mask and padding as this rank's part of the model takes them."""
        where = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        parts = [batch.ids, where, batch.labels, batch.loss_mask, batch.padding]
        if self.layout.context > 1:
            held = context_positions(batch.ids.shape[1])
            parts = [x[:, held].contiguous() for x in parts]
        if self.layout.tensor > 1 and not gpt.pre_process:
            # Megatron cuts the router's padding for sequence parallelism where the embedding is, and nowhere else
            parts[-1] = parts[-1].chunk(self.layout.tensor, 1)[parallel_state.get_tensor_model_parallel_rank()]
        yield from parts

    def _set_rates(self, lr: float) -> None:
        """Megatron marks groups that are not to be decayed (norms) with `wd_mult` 0 and leaves it to its scheduler to
        multiply; a loop without that scheduler would decay them silently."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.config.phase.optimizer.weight_decay * group.get("wd_mult", 1.0)

    # -- state ------------------------------------------------------------------------------------------------------

    def weights_changed(self) -> None:
        """To be called after the model's weights were set from outside: the optimizer may hold copies of them."""
        self.optimizer.reload_model_params()

    def state(self) -> Iterator[tuple[Piece, dict[str, torch.Tensor]]]:
        """What this rank owns: of each piece `weight` and, after the first step, Adam's moments, all flat and fp32.

        The pieces of all ranks together cover every tensor; what several ranks hold (norms under tensor parallelism,
        tied embeddings under pipeline parallelism) comes from each of them.
        """
        for piece, _, main, moments in self._owned():
            yield piece, {"weight": main, **{k: moments[k] for k in MOMENTS if k in moments}}

    def load_state(self, read: Callable[[str, Piece], torch.Tensor], step: int, moments: bool = True) -> None:
        """Takes over weights and, if `moments`, Adam's moments and step count.

        read: ("weight" | "exp_avg" | "exp_avg_sq", piece) -> the flat fp32 values of that piece.
        The step count stands in Megatron's parameter groups, which differ in number between layouts (experts have
        their own under expert parallelism), so it is set in each instead of being merged.
        """
        for piece, part, main, states in self._owned():
            main.data.copy_(read("weight", piece))
            if moments and step:
                for kind in MOMENTS:
                    states[kind] = read(kind, piece).to(main.device, torch.float32)
            for group in part.optimizer.param_groups if moments else ():
                group["step"] = step
        for part in self._parts():
            part._copy_main_params_to_model_params()
        for chunk in self.ddp:
            chunk.start_param_sync(force_sync=True)
        self.step_done = step if moments else 0

    def _parts(self) -> list[Any]:
        """Megatron's distributed optimizers: one for dense tensors, another for experts if they are spread."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [part for part in parts if not part.is_stub_optimizer]

    def _owned(self) -> Iterator[tuple[Piece, Any, torch.Tensor, dict[str, torch.Tensor]]]:
        """(piece, its optimizer, the optimizer's flat fp32 weights, its state) of all that this rank owns."""
        for piece, part, main in self._pieces:
            yield piece, part, main, part.optimizer.state[main]

    @cached_property
    def _pieces(self) -> list[tuple[Piece, Any, torch.Tensor]]:
        found = []
        names = {id(p): name for name, p in named_tensors(self.chunks)}
        for part in self._parts():
            for parameter, (group, number) in part.model_param_group_index_map.items():
                name, span = names[id(parameter)], part._get_model_param_range_map(parameter)["param"]
                main = part.optimizer.param_groups[group]["params"][number]
                found.append((Piece(name, boxes(name, self.shapes[name]), span.start, span.end), part, main))
        return found


def _weak(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method for Megatron's config, which outlives the engine: held there, model, optimizer and the threads of their
    process groups would outlive it too."""
    held = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        found = held()
        assert found is not None
        return found(*args)

    return call
