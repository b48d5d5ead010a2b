"""Resource estimate of a training phase. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.core.stage import RECOMPUTED, Accelerator, Estimate, Published, TrainingEstimate, TrainingTime
from stages.data.order.order_config import ROW_BYTES
from stages.mcore.memory import (
    GRADIENT,
    MASTER,
    Activations,
    layers_of,
    memory_share,
    owned_bytes,
    sharing,
    state_bytes,
)
from stages.mcore.throughput import UNFITTED_ERRORS, Shape, StepSetup, shape_of, step_time
from stages.models.base import MemoryShare, Rows, layers_in_bf16
from stages.models.parallel_layout import Layout
from stages.train.checkpoint import SHARD_BYTES
from stages.train.config import WORK_CHECKPOINTS, PhaseConfig, TrainConfig, TrainerConfig

# Sustained training FLOP/s of one CPU thread in fp32 on matrices this small: 493,536 parameters, 24 x 48 tokens in
# 54 ms (docs/lab-log.md), that is 2.3e9 FLOPs a step.
CPU_FLOPS = 4.3e10
# Ids up to here take two bytes in a token shard (stages/data/order/tokenize_stage.py), larger ones four.
TWO_BYTE_IDS = 65_536


def estimate(config: TrainConfig) -> Estimate:
    """FLOPs, memory of the fullest rank, and disk of a phase. Time is only estimated for fp32 on CPU threads."""
    phase, model, layout = config.phase, config.model, config.phase.parallelism
    parameters = model.parameters(config.padded_vocab_size)
    steps, tokens = phase.steps - phase.first_step + 1, phase.tokens(phase.first_step)
    per_token = model.flops_per_token(config.padded_vocab_size, phase.sequence_length)
    rows = Rows(phase.micro_rows, phase.sequence_length, phase.pack)
    states, activations, owned, memory = fullest(config, rows)
    checkpoint = checkpoint_size(config)
    # A fresh optimizer has no states yet at step 0.
    releases, has_step_0 = release_checkpoints(phase), phase.first_step == 1 and phase.optimizer_state == "fresh"
    trained = releases - 1 if has_step_0 else releases
    # While a work checkpoint is written there is one more than is kept
    work = WORK_CHECKPOINTS + 1
    if phase.spikes and phase.spikes.action == "rewind":
        work += 2  # the one to which a spike at the next step would rewind, and the next one
    disk = checkpoint.all * (trained + work) + (checkpoint.weights if has_step_0 else 0)
    order_rows = phase.rows_from(phase.first_step)
    return Estimate(
        cpu_seconds=tokens * per_token / CPU_FLOPS if phase.precision == "fp32" else None,
        tokens=tokens,
        flops=tokens * per_token,
        memory_bytes=memory,
        host_bytes=owned,
        disk_bytes=disk,
        # A work checkpoint has two files of each rank, its marker and the parts of a release checkpoint.
        files=work * (2 * layout.ranks + 1 + checkpoint.files) + releases * checkpoint.files,
        published=checkpoint.published(trained, has_step_0),
        parameters=parameters,
        training=TrainingEstimate(
            steps=steps,
            batch_tokens=(*(share.global_tokens for share in phase.batch.ramp), phase.batch.global_tokens),
            sequence_length=phase.sequence_length,
            precision=phase.precision,
            layout=layout_label(layout),
            gflop_per_token=per_token / 1e9,
            state_bytes=states,
            activation_bytes=activations,
            recomputed=recomputed_flops(config, phase.sequence_length),
            checkpoint_bytes=checkpoint.all,
            release_checkpoints=releases,
            work_checkpoints=work - 1,
            checkpoint_interval=phase.checkpoint_interval,
            order_rows=order_rows,
            data_bytes=tokens * (2 if config.padded_vocab_size <= TWO_BYTE_IDS else 4) + order_rows * ROW_BYTES,
        ),
    )


def training_time(config: TrainConfig, gpu: Accelerator) -> TrainingTime:
    """The time of the steps still to be trained, all batches of the ramp, by stages/mcore/throughput.py."""
    seconds = training_seconds(config, gpu, shape_of(config.model, config.padded_vocab_size))
    return TrainingTime(seconds, *UNFITTED_ERRORS)


def training_seconds(config: TrainConfig, gpu: Accelerator, shape: Shape) -> float:
    """Returns the seconds of `training_time`, where the shape of the model is known."""
    phase, layout = config.phase, config.phase.parallelism
    rows, first, seconds = Rows(phase.micro_rows, phase.sequence_length), phase.first_step, 0.0
    for last, batch_rows in (*phase.row_ramp, (phase.steps, phase.rows_of(phase.steps))):
        micro_batches = batch_rows // rows.rows // layout.data
        # A continued phase begins beyond the steps of some batch sizes.
        if last >= first:
            bf16_layers = layers_in_bf16(phase.precision, config.model.layers)
            rule = phase.optimizer.matrices
            run = StepSetup(
                layout,
                phase.precision,
                rows,
                micro_batches,
                phase.gradient_bytes,
                rule.bytes,
                rule.iterations,
                bf16_layers=bf16_layers,
            )
            seconds += (last - first + 1) * step_time(shape, gpu, run).total
            first = last + 1
    return seconds


def recomputed_flops(config: TrainerConfig, sequence_length: int) -> float:
    """Returns the FLOPs of a step with those that the backward pass repeats, beside the model's."""
    layout, model, vocabulary = config.phase.parallelism, config.model, config.padded_vocab_size
    if layout.recompute == "layer":
        return RECOMPUTED
    # Forward again: two FLOPs a parameter.
    return 1 + 2 * model.matrices_again(layout.recomputed) / model.flops_per_token(vocabulary, sequence_length)


def trained_parameters(config: TrainerConfig) -> int:
    """The parameters that the phase trains and its checkpoints hold: all, or those of its adapters."""
    if (lora := config.phase.adapter) is None:
        return config.model.parameters(config.padded_vocab_size)["total"]
    return sum(math.prod(shape) for shape in lora.shapes(config.model.shapes(config.padded_vocab_size)).values())


def fullest(config: TrainerConfig, rows: Rows) -> tuple[int, int, int, int]:
    """Returns the largest bytes of any rank: state, activations, what the optimizer owns, and the first two together.

    `rows` is a micro-batch.
    """
    layout = config.phase.parallelism
    most_state = most_activations = most_owned = most = 0.0
    for rank in range(layout.pp):
        share, state, activations = rank_memory(config, rows, rank)
        # An adapter's optimizer owns the adapter only.
        owned = adapter_share(config, rank) if config.phase.adapter else share
        most_state, most_activations = max(most_state, state), max(most_activations, activations)
        most_owned = max(most_owned, owned_bytes(owned, layout, config.phase.optimizer))
        most = max(most, state + activations)
    return round(most_state), round(most_activations), round(most_owned), round(most)


def rank_memory(config: TrainerConfig, rows: Rows, pipeline_rank: int) -> tuple[MemoryShare, float, float]:
    """(parameters, bytes of state, bytes of activations) of the ranks at that position of the pipeline.

    rows: a micro-batch.
    """
    phase, model, layout, vocabulary = config.phase, config.model, config.phase.parallelism, config.padded_vocab_size
    # The largest batch of a ramp has the most micro-batches in flight.
    micro_batches = max(phase.micro_batch_counts) // layout.data
    share = memory_share(model, vocabulary, layout, pipeline_rank)
    settings = {"frozen": phase.adapter is not None, "has_z_loss": phase.logit_z_loss > 0}
    on_rank = Activations(model, vocabulary, layout, phase.precision, rows, micro_batches, pipeline_rank, **settings)
    activations = on_rank.peak()
    state = state_bytes(share, layout, phase.precision, phase.optimizer, phase.gradient_bytes)
    # before the update gradients are scaled, each with a copy; a table's is large
    if not phase.adapter:
        dense, experts = sharing(layout)
        # A rank owns at most its slice of the table.
        copied = min(vocabulary * model.hidden_size / layout.tp, share.dense / dense) if share.table else 0.0
        if phase.gradient_bytes < GRADIENT:  # the optimizer reads fp32 copies of all that it owns
            copied += share.dense / dense + share.experts / experts
        activations = max(activations, GRADIENT * copied)
    if phase.adapter:  # of the base only the weights
        adapters = adapter_share(config, pipeline_rank)
        # The frozen base has weights, and neither gradients nor states.
        state = (4 if phase.precision == "fp32" else 2) * share.all
        state += state_bytes(adapters, layout, phase.precision, phase.optimizer, phase.gradient_bytes)
        share += adapters
        activations += on_rank.merged(phase.adapter)
        activations -= on_rank.unkept(phase.adapter)
    return share, state, activations


def adapter_share(config: TrainerConfig, pipeline_rank: int) -> MemoryShare:
    """The parameters of the adapters on each of the ranks at that position of the pipeline; none without adapters."""
    phase, model, layout = config.phase, config.model, config.phase.parallelism
    if phase.adapter is None:
        return MemoryShare(0, 0)
    layers = {layer for chunk in layers_of(model, layout, pipeline_rank) for layer in chunk}
    return phase.adapter.memory_share(model, layout, layers)


def release_checkpoints(phase: PhaseConfig) -> int:
    """Checkpoints that a phase seals: step 0 unless it continues, every n-th and the last."""
    interval, last, first = phase.release_checkpoint_interval, phase.steps, phase.first_step
    further = {last, *(step for step in phase.release_checkpoint_steps if step >= first)}
    # A phase may have a billion steps, so those at the interval are counted by division.
    count = last // interval - (first - 1) // interval + sum(step % interval > 0 for step in further)
    return count + 1 if first == 1 else count


@dataclass(frozen=True)
class CheckpointSize:
    """Sizes of a release checkpoint in bytes.

    Attributes:
        weights: Of all fp32 weights.
        states: Of all states of the optimizer; 0 at step 0.
    """

    weights: int
    states: int

    @property
    def all(self) -> int:
        return self.weights + self.states

    @property
    def files(self) -> int:
        """Weights and states in shards, their indices, state.json and manifest."""
        return -(-self.weights // SHARD_BYTES) - (-self.states // SHARD_BYTES) + 4

    def published(self, count: int, first: bool = False) -> tuple[Published, ...]:
        """Returns the files of `count` checkpoints, each a branch of its own, and, if `first`, of step 0."""
        whole = Published("checkpoint", "", self.files, self.all)
        if not first:
            return (whole,) * count
        beginning = CheckpointSize(self.weights, 0)
        return (Published("checkpoint", "", beginning.files, beginning.all), *(whole,) * count)


def checkpoint_size(config: TrainerConfig) -> CheckpointSize:
    """Returns the sizes of a release checkpoint of a phase after its first step."""
    trained, model = trained_parameters(config), config.model
    tables = 0 if config.phase.adapter else model.parameters(config.padded_vocab_size)["embedding"]
    if not model.tie_embeddings:
        tables *= 2
    return CheckpointSize(MASTER * trained, round(config.phase.optimizer.state_bytes(trained, tables)))


def layout_label(layout: Layout) -> str:
    """A layout in shorthand, without sizes of 1: `TP4 PP2 CP8 EP32 DP8`."""
    sizes = {"TP": layout.tp, "PP": layout.pp, "VP": layout.vpp, "CP": layout.cp, "EP": layout.ep, "DP": layout.data}
    parts = [name + str(size) for name, size in sizes.items() if size > 1]
    if layout.split_experts != layout.tp:
        parts.insert(-1, f"ETP{layout.split_experts}")
    if layout.pp_layers:
        parts.append("uneven")
    if layout.recompute == "layer":
        parts.append("recompute")
    if layout.recompute == "selective":
        parts.append("selective" + (f"({'+'.join(layout.recompute_modules)})" if layout.recompute_modules else ""))
    if layout.dispatcher == "flex":
        parts.append("flex")
    if layout.cuda_graphs:
        parts.append("graphs")
    return " ".join(parts) or "one rank"
