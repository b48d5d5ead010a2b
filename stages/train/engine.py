"""One model in training: Megatron's DDP, schedules and distributed optimizer around its GPTModel, in any layout."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import RecipeError
from stages.mcore import gpu, lora_layers, routers
from stages.mcore.layer_spec import uses_transformer_engine
from stages.mcore.megatron_imports import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    finalize_model_grads,
    get_forward_backward_func,
    parallel_state,
)
from stages.mcore.model import build, full_tensor, missing_requirement, named_buffers, named_tensors
from stages.mcore.optimizer import parts_of
from stages.mcore.routers import Experts, RouterWatch
from stages.mcore.row_tables import context_positions
from stages.mcore.tensor_sharding import Box, FullTensors, boxes, cut
from stages.train.config import TrainerConfig
from stages.train.data import Batch, RankBatch
from stages.train.parallel import Ranks

UpdateCheck = Callable[[float, float | None], str | None]
"""(loss, gradient norm or None before it is known) -> the reason to skip the update, or None. May raise."""


Objective = Callable[[Tensor, Batch], tuple[Tensor, dict[str, Tensor]]]
"""(minus the log-probability of each target [rows, width], the batch) -> the sum to minimize, and figures.

The engine divides the sum by the share's targets. The figures are summed over the step; for a name `max_…` the maximum
is kept.
"""


@dataclass(frozen=True)
class RouterFigures:
    """The metrics of the routers of a mixture of experts in one step, the same on every rank."""

    aux_loss: float  # load-balancing loss, summed over layers, mean over micro-batches, without its weight
    z_loss: float | None  # the router's z-loss, likewise; None if the model has none
    experts: Experts


@dataclass(frozen=True)
class StepFigures:
    """The metrics of one step, the same on every rank."""

    loss: float  # mean over the step's loss-carrying targets
    grad_norm: float  # before clipping
    router: RouterFigures | None  # of a model with experts
    refused: str | None = None  # reason for a skipped update
    extras: dict[str, float] = field(default_factory=dict)  # figures of the objective

    def metrics(self, lr: float) -> dict[str, float]:
        """The metrics of the update for the log."""
        metrics = {"loss": self.loss, "grad_norm": self.grad_norm, "lr": lr}
        if router := self.router:
            metrics |= {"aux_loss": router.aux_loss, "expert_max_violation": router.experts.max_violation}
            metrics |= {"router_entropy": float(router.experts.entropy.mean())}
            metrics |= {} if router.z_loss is None else {"z_loss": router.z_loss}
        return metrics


@dataclass(frozen=True)
class Piece:
    """The part of one tensor that this rank's distributed optimizer owns: a range of the flat local tensor."""

    name: str
    boxes: tuple[Box, ...]
    start: int
    stop: int


class BucketedDDP(DistributedDataParallel):  # type: ignore[misc]
    """Megatron's DDP with gradients cut into buckets on every pipeline rank.

    `overlap_gradients` then hides their reduction. Megatron does so on the first rank only, and reduces all of a later
    rank's at once, after its backward pass.
    """

    @property
    def bucket_size(self) -> int | None:
        size: int | None = self.ddp_config.bucket_size
        return size

    @bucket_size.setter
    def bucket_size(self, size: int | None) -> None:
        """Leaves the size as configured."""


class Engine:
    """Holds model and optimizer. Every method is collective: all ranks call it with the same arguments."""

    def __init__(self, config: TrainerConfig, ranks: Ranks, vocab_size: int) -> None:
        """Builds the model and its optimizer, without initial weights.

        `vocab_size` is that of the tokenizer; ids beyond it only pad the model's table.
        """
        self._build(config, ranks, vocab_size)
        kind, model = config.phase.precision, config.model
        self.step_done = 0
        self.lora = config.phase.adapter
        self.shapes = self.lora.shapes(self.model_shapes) if self.lora else self.model_shapes
        """Shapes of the tensors that training changes, which checkpoints hold."""
        if self.lora:
            if uses_transformer_engine(self.chunks[0].config.params_dtype):
                raise RecipeError(
                    f"lora with precision = {kind} needs PyTorch's layers, and this machine has Transformer Engine's, "
                    "which compute with their own copies of a matrix; use precision = fp32"
                )
            # Before DDP, which makes buffers of gradients for the parameters that require them now.
            lora_layers.install(self.chunks, self.lora)
        for chunk in self.chunks:
            chunk.z_loss = config.phase.logit_z_loss
        self.routers = RouterWatch(self.chunks, model.routing) if model.routing else None
        megatron = self.chunks[0].config
        modules = self._modules()
        overlap = self.layout.overlap_gradients
        # By default on GPUs only: on a CPU the collective would take the cores of the backward pass.
        if overlap is None:
            overlap = self.layout.overlap_weights or (gpu.device().type == "cuda" and ranks.data_ranks > 1)
        self.ddp = [
            # The first chunk of a rank gets buckets wherever it lies in the pipeline. Later chunks are one bucket each,
            # as in Megatron.
            (DistributedDataParallel if number else BucketedDDP)(
                config=megatron,
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=config.phase.gradient_precision == "fp32",
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=overlap,
                    overlap_param_gather=self.layout.overlap_weights,
                ),
                module=chunk,
                disable_bucketing=number > 0,
            )
            for number, chunk in enumerate(modules)
        ]
        # The session clears these at its end, as their hooks hold process groups in a cycle.
        ranks.wrapped.extend(self.ddp)
        self.optimizer = config.phase.optimizer.build(
            self.ddp,
            dict(named_tensors(self.chunks)),
            self.shapes,
            overlap_param_gather=self.layout.overlap_weights,
            bf16=kind != "fp32",
            params_dtype=megatron.params_dtype,
        )
        for part in parts_of(self.optimizer)[:-1]:
            part.model_chunks = []  # each would gather all weights of its chunks: the last one does, after all updates
        # Megatron's schedules read this and the next two from the config. Without it they would neither finish the
        # reduction of gradients nor sum those of norms and tied tables, without an error.
        megatron.finalize_model_grads_func = finalize_model_grads
        megatron.grad_scale_func = _weak_method(self.optimizer.scale_loss)
        if overlap:  # reduce with the last micro-batch only
            no_sync = [_weak_method(chunk.no_sync) for chunk in self.ddp]
            megatron.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def _build(self, config: TrainerConfig, ranks: Ranks, vocab_size: int) -> None:
        """Builds this rank's part of the model, without weights."""
        self.config, self.ranks, self.layout = config, ranks, ranks.layout
        self._is_stale = False
        """True if this rank lacks the updated weights of others, which the next step's forward pass gathers."""
        kind = config.phase.precision
        # Before the model is built: without the kernels, Transformer Engine fails late and in its own words.
        if reason := missing_requirement(kind):
            raise RecipeError(reason)
        self.model_shapes = config.model.shapes(config.padded_vocab_size)
        if vocab_size > config.padded_vocab_size:
            raise RecipeError(
                f"tokenizer.padded_vocab_size = {config.padded_vocab_size} is less than the {vocab_size} tokens of the "
                "tokenizer; raise it"
            )
        self.chunks = build(
            config.model,
            config.padded_vocab_size,
            self.layout,
            kind,
            config.phase.packed,
            vocab_size,
        )

    def _modules(self) -> list[Any]:
        """Returns the chunks in the type of the phase, with their buffers in fp32."""
        # Float16Module converts the weights, and inputs and outputs at the ends of the pipeline.
        megatron, is_fp32 = self.chunks[0].config, self.config.phase.precision == "fp32"
        modules = self.chunks if is_fp32 else [Float16Module(megatron, chunk) for chunk in self.chunks]
        self.buffers = named_buffers(self.chunks)
        for name, buffer in self.buffers.items():
            # Biases of experts are fp32 in every precision: a step changes them by less than bf16 can hold.
            buffer.data = torch.zeros(self.model_shapes[name], dtype=torch.float32, device=buffer.device)
        return modules

    def initialize(self) -> None:
        """The initial weights, which are the same in every layout and fp32 where the optimizer keeps them."""

        def read(kind: str, piece: Piece) -> Tensor:
            full = full_tensor(piece.name, self.shapes[piece.name], self.config.model, self.config.seed)
            return cut(full, piece.boxes).flatten()[piece.start : piece.stop]

        self.load_state(read, 0)

    def step(
        self,
        rank_batch: RankBatch,
        lr: float,
        check_update: UpdateCheck,
        norm_first: bool = False,
        objective: Objective | None = None,
    ) -> StepFigures:
        """Forward, backward and update on this rank's batch of a step.

        objective: the function to minimize, by default the mean loss over targets.

        check_update: gets the loss and then, if norm_first, the gradient norm, before the update, which is skipped if
        it returns a reason. Without norm_first it gets the norm after the update and can only raise.
        """
        # Megatron's own scheduler would set these; the loop of this project has none.
        self._set_rates(lr)
        for chunk in self.ddp:
            # The buffers of DDP, which `zero_grad` of the optimizer does not know.
            chunk.zero_grad_buffer()
            chunk.train()
        self.optimizer.zero_grad()
        self._is_stale = False
        # The backward pass moves the biases of experts, so a refused update has to put them back.
        saved_buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        loss, extras = self._run(rank_batch, forward_only=False, objective=objective or cross_entropy)
        router = self._router_figures(len(rank_batch.micro))
        # Every rank has the same loss and norm, so all of them refuse an update or none does.
        reason, norm = check_update(loss, None), math.nan
        if reason or norm_first:
            # The norm is needed before the update. Collective: each rank adds the squares of its slices.
            self.optimizer.prepare_grads()
            norm = float(self.optimizer.get_grad_norm())
            reason = reason or check_update(loss, norm)
        if reason:
            for name, buffer in self.buffers.items():  # Megatron moves the biases of experts with the backward pass
                buffer.copy_(saved_buffers[name])
            return StepFigures(loss, norm, router, reason, extras)
        # Collective: the norm over all ranks, and, unless overlap_weights defers it, the gathering of the weights.
        _, norm, _ = self.optimizer.step()
        self._is_stale = self.layout.overlap_weights
        self.step_done += 1
        if self.routers and router:
            self.routers.load.copy_(router.experts.share)
        if not norm_first:
            check_update(loss, float(norm))
        return StepFigures(loss, float(norm), router, extras=extras)

    def _router_figures(self, micro_batches: int) -> RouterFigures | None:
        """The metrics of the step whose gradients were computed; None for a model without experts."""
        if self.routers is None:
            return None
        # Sums over all ranks and micro-batches, of which the mean is logged.
        aux, z = (self.ranks.sum(x).item() / (self.ranks.data_ranks * micro_batches) for x in routers.collect_losses())
        experts = self.routers.collect(self.ranks.sum)
        z /= self.layout.tp * self.layout.cp  # each of these ranks has its own tokens' mean
        return RouterFigures(aux, z if self.routers.routing.z_loss else None, experts)

    def evaluate(self, rank_batch: RankBatch) -> float:
        """Mean loss over the targets of any rows, without an update."""
        return self.figures(rank_batch, cross_entropy)[0]

    def figures(self, rank_batch: RankBatch, objective: Objective) -> tuple[float, dict[str, float]]:
        """An objective's mean and figures over any rows, without an update."""
        self._gather_weights()
        for chunk in self.ddp:
            chunk.eval()
        with torch.no_grad():
            result = self._run(rank_batch, forward_only=True, objective=objective)
        # Dropped: the figures of the next step are to be of that step alone.
        routers.collect_losses()
        return result

    def full_tensors(self, by_turns: bool = True) -> FullTensors:
        """The full tensors that training changes, as the model computes with them, by global name.

        Each is put together when it is read. `by_turns` has data ranks take turns at it.
        """
        self._gather_weights()
        tensors = {**{name: tensor.data for name, tensor in named_tensors(self.chunks)}, **self.buffers}
        return FullTensors(tensors, self.shapes, self.config.model.tie_embeddings, by_turns)

    def local_weights(self) -> list[Tensor]:
        """Copies on CPU of this rank's tensors that the model computes with, in the model's order."""
        return [tensor.to("cpu", copy=True) for tensor in self._computed_with()]

    @contextmanager
    def computing_with(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Within it, `figures` and `evaluate` compute with the `local_weights` of another time."""
        # Copies on the host: the device may have no room for the weights twice.
        present = self.local_weights()
        try:
            self._compute_with(weights)
            yield
        finally:
            self._compute_with(present)

    def _compute_with(self, weights: Sequence[Tensor]) -> None:
        for tensor, value in zip(self._computed_with(), weights, strict=True):
            tensor.copy_(value)

    def _gather_weights(self) -> None:
        """Gathers the weights that the last step has updated, if its successor has not."""
        if self._is_stale:
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)
            self._is_stale = False

    def _computed_with(self) -> list[Tensor]:
        self._gather_weights()
        return [*(tensor.data for _, tensor in named_tensors(self.chunks)), *self.buffers.values()]

    def _run(self, rank_batch: RankBatch, forward_only: bool, objective: Objective) -> tuple[float, dict[str, float]]:
        """Runs this rank's batch through Megatron's schedule.

        Returns the mean of the objective over all ranks, and its figures.

        The loss of a step is the mean over its loss-carrying targets on all ranks. Megatron averages over micro-batches
        and DDP over ranks, so each micro-batch's sum is scaled back by both counts.
        """
        # The schedule divides each loss by the micro-batches, and DDP each gradient by the data ranks.
        scale = len(rank_batch.micro) * self.ranks.data_ranks / rank_batch.targets
        device = next(self.chunks[0].parameters()).device

        def forward(batches: Any, model: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch: Batch = next(batches)
            is_plain = batch.targets is None and not batch.extras
            # A batch with targets or extras of its own is one row, which no context rank may cut.
            assert is_plain or self.layout.cp == 1, "context ranks hold parts of rows"
            ids, positions, labels, mask, padding = (gpu.upload(x, device) for x in self._inputs(batch, model))
            # They let the sliced loss compute its gradients at once, which is right for a weighted sum only.
            weights = mask if objective is cross_entropy else None
            targets = None if batch.targets is None else gpu.upload(batch.targets, device)
            losses = model(
                ids,
                positions,
                batch.segments,
                labels=labels,
                padding_mask=padding,
                loss_mask=weights,
                targets=targets,
            )
            extras = {n: gpu.upload(x, device) for n, x in batch.extras.items()}
            device_batch = replace(batch, loss_mask=mask, extras=extras)

            def reduce(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                loss_sum, extras = objective(losses.float(), device_batch)
                # a clone: the schedule divides in place
                return loss_sum * scale, {
                    "sum": loss_sum.detach().clone(),
                    **{n: x.detach() for n, x in extras.items()},
                }

            return losses, reduce

        # Each virtual stage reads the micro-batches from the start, in its own order.
        iterators: list[Any] = [iter(rank_batch.micro) for _ in self.ddp]
        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.ddp,
            num_microbatches=len(rank_batch.micro),
            seq_length=rank_batch.width,
            micro_batch_size=rank_batch.micro[0].ids.shape[0],
            forward_only=forward_only,
        )
        # Tensor ranks have the same loss and earlier stages have none: one rank for each share of the tokens counts.
        has_loss = self.ranks.counts_loss and outputs
        loss_sum = torch.stack([x["sum"] for x in outputs]).sum() if has_loss else torch.zeros((), device=device)
        local_extras = [{n: float(v) for n, v in x.items() if n != "sum"} for x in outputs] if has_loss else []
        # All ranks join, those without a loss with a zero; the sum has the same bits on each of them.
        loss = float(self.ranks.sum(loss_sum) / rank_batch.targets)
        extras: dict[str, float] = {}
        # Gathered as objects by all ranks, since only the last stage knows the names of the figures.
        for micro_extras in (
            [x for part in self.ranks.gather(local_extras) for x in part] if objective is not cross_entropy else []
        ):
            for n, v in micro_extras.items():
                extras[n] = max(extras.get(n, v), v) if n.startswith("max_") else extras.get(n, 0.0) + v
        return loss, extras

    def _inputs(self, batch: Batch, model: Any) -> Iterator[Tensor]:
        """The ids, positions, labels, loss mask and padding for this rank's part of the model.

        Positions are only for Megatron's signature: attention computes its own.
        """
        gpt = self.chunks[self.ddp.index(model)]
        positions = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        parts = [batch.ids, positions, batch.labels, batch.loss_mask, batch.padding]
        if self.layout.cp > 1:
            # Two slices for each context rank, which evens out causal attention; contiguous, as collectives need it.
            local_positions = context_positions(batch.ids.shape[1])
            parts = [x[:, local_positions].contiguous() for x in parts]
        if self.layout.tp > 1 and not gpt.pre_process:
            # Megatron cuts the router's padding for sequence parallelism where the embedding is, and nowhere else
            parts[-1] = parts[-1].chunk(self.layout.tp, 1)[parallel_state.get_tensor_model_parallel_rank()]
        yield from parts

    def _set_rates(self, lr: float) -> None:
        """Sets the learning rate and weight decay of each group of the optimizer.

        Megatron marks groups that are not to be decayed, such as norms, with `wd_mult` 0 and leaves it to its scheduler
        to multiply; a loop without that scheduler would decay them silently.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.config.phase.optimizer.weight_decay * group.get("wd_mult", 1.0)

    # -- state ------------------------------------------------------------------------------------------------------

    def state(self) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
        """This rank's optimizer state: of each piece `weight` and, after the first step, its states, flat and fp32.

        The pieces of all ranks together cover every tensor; what several ranks hold (norms under tensor parallelism,
        tied embeddings under pipeline parallelism) comes from each of them, and so does what has no gradient.
        """
        for piece, _, main, states in self._owned_state():
            yield piece, {"weight": main, **{name: states[name] for name in self._states_of(piece) if name in states}}
        for piece, buffer in self._buffer_pieces():
            yield piece, {"weight": buffer.flatten()}

    def _buffer_pieces(self) -> Iterator[tuple[Piece, Tensor]]:
        # An adapter leaves the biases of experts as they are: they are its base's.
        for name, buffer in ({} if self.lora else self.buffers).items():
            yield Piece(name, boxes(name, self.shapes[name]), 0, buffer.numel()), buffer

    def router_state(self) -> dict[str, Any]:
        """Returns the state of the routers beside the tensors: entries of state.json, the same on every rank."""
        return self.routers.state() if self.routers else {}

    def load_state(
        self,
        read: Callable[[str, Piece], Tensor],
        step: int,
        moments: bool = True,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Loads weights and, if `moments`, the optimizer's states and step count.

        Args:
            read: ("weight" or the name of a state, piece) -> the flat fp32 values of that piece.
            step: Updates that the optimizer has made.
            moments: False leaves the optimizer as it is.
            state: The state.json of the checkpoint, whose entries of `router_state` are restored; None for a beginning.

        The step count is in Megatron's parameter groups, which differ in number between layouts (experts have
        their own under expert parallelism), so it is set in each instead of being merged.
        """
        for piece, part, main, states in self._owned_state():
            main.data.copy_(read("weight", piece))
            for name in self._states_of(piece) if moments else ():
                if step:
                    states[name] = read(name, piece).to(main.device, torch.float32)
                else:  # none were there yet
                    states.pop(name, None)
            for group in part.optimizer.param_groups if moments else ():
                group["step"] = step
        for piece, buffer in self._buffer_pieces():
            buffer.copy_(read("weight", piece).view_as(buffer))
        for part in parts_of(self.optimizer):
            # The fp32 slices become the model's weights, in its type, and are gathered from all data ranks below.
            part._copy_main_params_to_model_params()
        for chunk in self.ddp:
            chunk.start_param_sync(force_sync=True)
        if self.routers:
            self.routers.load_state(state or {})
        # Without the moments a new optimizer begins, whose updates count from 0.
        self.step_done = step if moments else 0

    def load_frozen(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the tensors that an adapter leaves as they are. tensors: full ones by global name."""
        # The optimizer has no slices of these, so they are written into the model itself.
        frozen = [(name, tensor) for name, tensor in named_tensors(self.chunks) if not tensor.requires_grad]
        for name, tensor in [*frozen, *self.buffers.items()]:
            tensor.data.copy_(cut(tensors[name], boxes(name, self.model_shapes[name])))

    def _states_of(self, piece: Piece) -> tuple[str, ...]:
        return self.config.phase.optimizer.rule_of(piece.name, self.shapes[piece.name]).states

    def _owned_state(self) -> Iterator[tuple[Piece, Any, Tensor, dict[str, Tensor]]]:
        """(piece, its optimizer, the optimizer's flat fp32 weights, its state) of all pieces of this rank."""
        for piece, part, main in self._pieces:
            yield piece, part, main, part.optimizer.state[main]

    @cached_property
    def _pieces(self) -> list[tuple[Piece, Any, Tensor]]:
        pieces = []
        # Megatron knows its parameters by identity alone, in an order that depends on the layout.
        names = {id(p): name for name, p in named_tensors(self.chunks)}
        for part in parts_of(self.optimizer):
            for parameter, (group, number) in part.model_param_group_index_map.items():
                name, span = names[id(parameter)], part._get_model_param_range_map(parameter)["param"]
                main = part.optimizer.param_groups[group]["params"][number]
                pieces.append((Piece(name, boxes(name, self.shapes[name]), span.start, span.end), part, main))
        return pieces


class FrozenModel(Engine):
    """A model that is only read: `load_frozen`, `figures` and `evaluate`. It has neither gradients nor an optimizer."""

    def __init__(self, config: TrainerConfig, ranks: Ranks, vocab_size: int) -> None:
        """Builds the model, without weights."""
        self._build(config, ranks, vocab_size)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
        # Without DDP, whose buffers hold gradients.
        self.ddp = self._modules()


def cross_entropy(losses: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the loss over targets with loss_mask 1."""
    return (losses * batch.loss_mask).sum(), {}


def _weak_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method for Megatron's config, which outlives the engine.

    Held there, model, optimizer and the threads of their process groups would outlive it too.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        bound = reference()
        assert bound is not None
        return bound(*args)

    return call
