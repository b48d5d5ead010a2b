"""One model under training: Megatron's DDP, schedules and distributed optimizer around our GPTModel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.errors import AtomError
from stages.model import balance
from stages.model.build import build, load_tensors, named_tensors
from stages.model.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    OptimizerConfig,
    finalize_model_grads,
    get_forward_backward_func,
    get_megatron_optimizer,
    parallel_state,
)
from stages.train.config import TrainConfig
from stages.train.data import Batch, Row, Shards, width_of
from stages.train.parallel import Ranks


@dataclass(frozen=True)
class StepFigures:
    """What one step gave, the same on every rank."""

    loss: float  # mean over the step's loss-carrying targets
    aux_loss: float  # load-balancing loss, summed over layers, mean over micro-batches, without its weight
    grad_norm: float  # before clipping


class Engine:
    """Holds model and optimizer. Every method is collective: all ranks call it with the same arguments."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        phase = config.phase
        self.step_done = 0
        if phase.rows % (phase.micro_rows * ranks.data_ranks):
            raise AtomError(
                f"{phase.rows} rows of batch.global_tokens cannot be dealt to {ranks.data_ranks} data-parallel ranks "
                f"in micro-batches of {phase.micro_rows} rows; run on a number of ranks that divides "
                f"{phase.rows // phase.micro_rows}"
            )
        self.gpt = build(config.model, config.padded_vocab_size)
        self.ddp = DistributedDataParallel(
            config=self.gpt.config,
            ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            module=self.gpt,
        )
        o = phase.optimizer
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
            [self.ddp],
        )
        self.gpt.config.finalize_model_grads_func = finalize_model_grads
        self.gpt.config.grad_scale_func = self.optimizer.scale_loss

    def step(self, rows: Sequence[Row], shards: Shards, lr: float, check: Callable[[float], None]) -> StepFigures:
        """Forward, backward and update on the rows of one step. `check` sees the loss before the update."""
        self._set_rates(lr)
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.gpt.train()
        loss, micro_batches = self._run(rows, shards, self.config.phase.micro_rows, forward_only=False)
        aux = self.ranks.sum(balance.take()) / (self.ranks.data_ranks * micro_batches)
        check(loss)
        _, grad_norm, _ = self.optimizer.step()
        self.step_done += 1
        return StepFigures(loss, aux.item(), float(grad_norm))

    def evaluate(self, rows: Sequence[Row], shards: Shards) -> float:
        """Mean loss over the targets of any rows; nothing is changed."""
        self.gpt.eval()
        with torch.no_grad():
            loss, _ = self._run(rows, shards, self.config.phase.micro_rows, forward_only=True)
        balance.take()
        return loss

    def _run(self, rows: Sequence[Row], shards: Shards, micro_rows: int, forward_only: bool) -> tuple[float, int]:
        """Runs this rank's share through Megatron's schedule; gives the mean loss over all ranks and the number of
        micro-batches.

        The loss of a step is the mean over its loss-carrying targets, wherever they lie. Megatron averages over
        micro-batches and DDP over ranks, so each micro-batch's sum is scaled back by both counts.
        """
        ranks, width = self.ranks, width_of(rows)
        per_rank = -(-len(rows) // ranks.data_ranks)
        own = rows[ranks.data_rank * per_rank : (ranks.data_rank + 1) * per_rank] or rows[:1]
        counted = ranks.data_rank * per_rank < len(rows)  # evaluation rows may not reach the last rank
        micro = [shards.batch(own[i : i + micro_rows], width) for i in range(0, len(own), micro_rows)]
        targets = sum(row.targets for row in rows)
        scale = len(micro) * ranks.data_ranks / targets
        positions = torch.arange(width).unsqueeze(0)
        device = next(self.gpt.parameters()).device

        def forward(batches: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            batch: Batch = next(batches)
            ids, labels, mask, padding = (
                x.to(device) for x in (batch.ids, batch.labels, batch.loss_mask, batch.padding)
            )
            where = positions.expand_as(ids).to(device)
            losses = model(ids, where, None, labels=labels, padding_mask=padding)

            def reduce(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                total = (losses.float() * mask).sum()
                return total * scale, {"sum": total.detach().clone()}  # a clone: the schedule divides in place

            return losses, reduce

        out = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(micro),
            model=[self.ddp],
            num_microbatches=len(micro),
            seq_length=width,
            micro_batch_size=micro_rows,
            forward_only=forward_only,
        )
        total = torch.stack([x["sum"] for x in out]).sum() if counted else torch.zeros((), device=device)
        return (ranks.sum(total) / targets).item(), len(micro)

    def _set_rates(self, lr: float) -> None:
        """Megatron marks groups that are not to be decayed (norms) with `wd_mult` 0 and leaves it to its scheduler to
        multiply; a loop without that scheduler would decay them silently."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.config.phase.optimizer.weight_decay * group.get("wd_mult", 1.0)

    # -- state ------------------------------------------------------------------------------------------------------

    def load_weights(self, tensors: Mapping[str, torch.Tensor], origin: str) -> None:
        """New weights under a fresh optimizer."""
        load_tensors(self.gpt, tensors, origin)
        self.weights_changed()

    def weights_changed(self) -> None:
        """To be called after the model's weights were set from outside: the optimizer may hold copies of them."""
        self.optimizer.reload_model_params()

    def weights(self) -> dict[str, torch.Tensor]:
        """Full tensors by global name."""
        return {name: p.detach() for name, p in named_tensors(self.gpt)}

    def moments(self) -> dict[str, torch.Tensor]:
        """Adam's moments as full tensors, `exp_avg.<name>` and `exp_avg_sq.<name>`.

        The distributed optimizer keeps on each data-parallel rank the moments of a stretch of the flat parameters; the
        stretches do not overlap, so a sum over ranks puts them together exactly.
        """
        names = {id(p): name for name, p in named_tensors(self.gpt)}
        out = {}
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for buffer in part.buffers:
                for parameter in buffer.param_index_map:
                    for key in ("exp_avg", "exp_avg_sq"):
                        whole = torch.zeros_like(parameter, requires_grad=False)
                        if parameter in part.model_param_group_index_map:
                            span = part._get_model_param_range_map(parameter)["param"]
                            state = part._get_main_param_and_optimizer_states(parameter)
                            whole.view(-1)[span.start : span.end] = state[key]
                        out[f"{key}.{names[id(parameter)]}"] = self.ranks.sum(whole)
        return out

    def state(self, loading: bool = False) -> dict[str, Any]:
        """The sharded state for Megatron's dist_checkpointing; independent of the number of ranks."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        model = self.gpt.sharded_state_dict(metadata={"dp_cp_group": group})
        optimizer = self.optimizer.sharded_state_dict(
            model,
            is_loading=loading,
            metadata={"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True},
        )
        return {"model": model, "optimizer": optimizer, "step": self.step_done}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.gpt.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_done = state["step"]
