"""The training sections of a recipe, and the config of the stages that run them.

The sections are `pretrain`, `midtrain` and `long_context`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import MOST_RAMP_STEPS, Context, Flag, Line, Mix, Range, Seed, Steps
from pipeline.core.stage import Config, added, operational
from pipeline.core.text import shown
from stages.data.order.order_config import LongDocuments, rows_from
from stages.mcore.layout_check import multiples_around, problem
from stages.mcore.lora import Lora
from stages.mcore.optimizer import Optimizer
from stages.models.base import MOST_PARAMETERS, LossWeight, PositiveInt, Precision, Rope
from stages.models.parallel_layout import Layout
from stages.models.registry import Model

BatchTokens = Annotated[int, Range(1, 2**30, "Llama 3: 1.6e7, DeepSeek-V3: 6.3e7, MiniMax-01: 1.3e8")]
Patience = Annotated[float, Range(0, 604_800, "seconds; 604800 are a week", above=True)]
WORK_CHECKPOINTS = 2
"""The newest work checkpoints that are kept."""
MOST_EXCLUDED = 10_000
"""Steps of one phase."""
MOST_RELEASE_STEPS = 100
"""Release checkpoints of one phase beside those at an interval."""


class RampStep(Config):
    """A smaller batch at the beginning of a phase."""

    until_step: Steps
    """last step with this batch size"""
    global_tokens: BatchTokens
    """token slots of one optimizer step up to that step, over all ranks"""


class BatchSizes(Config):
    """Batch sizes in token slots (rows times sequence_length), padding included."""

    global_tokens: BatchTokens
    """token slots of one optimizer step, over all ranks"""
    micro_tokens: BatchTokens
    """token slots of one forward and backward pass on one rank"""
    ramp: tuple[RampStep, ...] = added((), max_length=MOST_RAMP_STEPS)
    """smaller batches at the beginning of the phase, in order"""

    @model_validator(mode="after")
    def _possible(self) -> BatchSizes:
        steps, sizes = [0], [0]
        for number, part in enumerate(self.ramp):
            if part.until_step <= steps[-1]:
                raise ValueError(f"ramp.{number}.until_step = {part.until_step} is not after the one before; sort them")
            if not sizes[-1] < part.global_tokens < self.global_tokens:
                raise ValueError(
                    f"ramp.{number}.global_tokens = {part.global_tokens} does not lie between the batch before it and "
                    f"batch.global_tokens = {self.global_tokens}; a ramp only grows"
                )
            steps.append(part.until_step)
            sizes.append(part.global_tokens)
        return self


class Validation(Config):
    """Measurement of the loss on held-out documents during training."""

    every: Steps
    """steps between measurements; the last step is always measured"""
    rows: Annotated[int, Range(1, 1e6)]
    """held-out documents that are measured, divided among the sources as in mix"""


class Spikes(Config):
    """Detection of spikes in the loss and the gradient norm, before the weights are updated, and the response to them.

    A loss is a spike above median + loss_sigmas standard deviations (1.4826 x the median absolute deviation, at least
    1 % of the median) of the last `window` accepted steps; a gradient norm, above norm_factor x its median. NaN and
    infinity are always spikes. Other spikes are detected only after `window` accepted steps.
    """

    action: Literal["skip", "rewind", "stop"]
    """skip: discard the update; rewind: return to an earlier checkpoint and train again without the last
    rewind_steps batches; stop: end the phase with an error that names the documents"""
    loss_sigmas: Annotated[float, Range(0, 1000, above=True)] = 6.0
    """standard deviations above the median beyond which a loss is a spike"""
    norm_factor: Annotated[float, Range(1, 1e6, above=True)] = 10.0
    """multiple of the median beyond which a gradient norm is a spike"""
    window: Annotated[int, Range(4, 1e5)] = 64
    """accepted steps from which the medians are computed"""
    rewind_steps: Annotated[int, Range(1, 1e5, "PaLM: 200 to 500")] = 1
    """batches that a rewind excludes, ending with that of the spike"""
    max_spikes: Annotated[int, Range(1, 1e5)] = 16
    """maximum number of spikes; one more stops the phase"""


class Merge(Config):
    """Averaging of the weights of a phase's last release checkpoints."""

    last: Annotated[int, Range(2, 100)]
    """number of release checkpoints that are averaged; the last one is always among them"""


class PhaseBase(Config):
    """Settings of every phase that trains."""

    steps: Steps
    """optimizer steps, counted from the beginning of the phase"""
    optimizer: Optimizer
    """optimizer and its learning-rate schedule"""
    precision: Precision = "fp32"
    """data type of matrix multiplications"""
    gradient_precision: Literal["fp32", "bf16"] = added("fp32")
    """data type in which gradients are summed over micro-batches and ranks; bf16, with any precision but fp32: half
    their memory and traffic, and what is small beside a sum is lost"""
    release_checkpoint_interval: Steps
    """steps between sealed checkpoints"""
    checkpoint_interval: Steps = operational(1000)
    """steps between checkpoints from which an interrupted run resumes"""
    watchdog_timeout_seconds: Patience = operational(1800.0)
    """seconds without a finished step or progress of a checkpoint after which a rank is considered hung"""
    parallelism: Layout = operational(Layout())
    """distribution of the phase over processes"""

    @model_validator(mode="after")
    def _gradients_follow_weights(self) -> PhaseBase:
        # Megatron sums them in the type of the weights, or in fp32.
        if self.gradient_precision == "bf16" and self.precision == "fp32":
            raise ValueError(
                "gradient_precision = bf16 is not possible with precision = fp32, whose weights have gradients in "
                "fp32; leave it out, or use precision = bf16"
            )
        return self

    @property
    def adapter(self) -> Lora | None:
        """The adapters that are trained in place of the model's weights, if any are."""
        return None

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient that is summed over micro-batches and ranks."""
        return 2 if self.gradient_precision == "bf16" else 4

    @property
    def logit_z_loss(self) -> float:
        """Weight of the z-loss of the output logits; 0: off."""
        return 0.0

    @property
    def quantized(self) -> bool:
        """True if matrix products multiply numbers of 8 or 4 bits."""
        return self.precision not in ("fp32", "bf16")

    @property
    def packed(self) -> bool:
        """True if rows hold several documents."""
        return False

    @property
    def all_updates(self) -> int:
        """Updates of the weights, which the optimizer's schedule counts."""
        return self.steps

    def is_release_step(self, step: int) -> bool:
        """Returns True if a step, counted from 1, has a release checkpoint. The last one always has."""
        return step == self.steps or step % self.release_checkpoint_interval == 0

    @property
    def micro_batch_counts(self) -> list[int]:
        """Micro-batches of one optimizer step, over all ranks; several if the batch grows."""
        raise NotImplementedError


class PhaseConfig(PhaseBase):
    """One training phase on text: data mix, batch size, number of steps and optimizer."""

    mix: Mix
    """share of rows by source; with pack, share of tokens"""
    sequence_length: Context
    """tokens predicted in one row"""
    batch: BatchSizes
    """batch sizes"""
    validation: Validation
    """measurement of the loss on held-out documents"""
    precision: Precision = added("fp32")
    """data type of matrix multiplications"""
    rope: Rope | None = added(None)
    """rotary embedding from this phase on; null: as in the previous phase"""
    pack: Flag = added(False)
    """pack several documents into a row, each with its own attention and positions"""
    long_documents: LongDocuments | None = added(None)
    """up-weighting of long documents; requires pack; null: none"""
    spikes: Spikes | None = added(None)
    """response to loss spikes; null: only NaN or infinity stops the phase"""
    excluded_steps: tuple[Steps, ...] = added((), max_length=MOST_EXCLUDED)
    """steps whose batch is skipped because its data is known to be bad"""
    continue_from: Line | None = added(None)
    """release checkpoint to continue from, such as pretrain@1200; only later steps are trained"""
    optimizer_state: Literal["fresh", "carried"] = added("fresh")
    """fresh: the optimizer begins anew; carried: its states and its count of updates are those of the last release
    checkpoint of the phase before"""
    output_z_loss: LossWeight = added(0.0)
    """weight of the z-loss of the output, the squared log-sum-exp of a token's logits; stated losses are without it;
    0: off"""
    release_checkpoint_steps: tuple[Steps, ...] = added((), max_length=MOST_RELEASE_STEPS)
    """further steps with sealed checkpoints, such as 1, 2, 4, 8, beside those of release_checkpoint_interval"""
    merge: Merge | None = added(None)
    """averages the weights of the phase's last release checkpoints; the next phase and the export read the average;
    null: they read the last checkpoint"""

    @model_validator(mode="after")
    def _possible(self) -> PhaseConfig:
        length, batch = self.sequence_length, self.batch
        sizes = [("global_tokens", batch.global_tokens, length, "sequence_length")]
        sizes += [("micro_tokens", batch.micro_tokens, length, "sequence_length")]
        sizes += [("global_tokens", batch.global_tokens, batch.micro_tokens, "batch.micro_tokens")]
        for number, part in enumerate(batch.ramp):
            sizes += [(f"ramp.{number}.global_tokens", part.global_tokens, batch.micro_tokens, "batch.micro_tokens")]
            if part.until_step >= self.steps:
                raise ValueError(
                    f"batch.ramp.{number}.until_step = {part.until_step} leaves no step with the full batch; "
                    f"use less than steps = {self.steps}"
                )
        for name, value, unit, unit_name in sizes:
            if value % unit:
                near = multiples_around(value, unit)
                raise ValueError(f"batch.{name} = {value} is not a multiple of {unit_name} {unit}; nearest: {near}")
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} leaves nothing of steps = {self.steps} to "
                f"train at the full rate; use at most {self.steps - 1}"
            )
        decay = self.optimizer.decay_steps or 0
        if self.optimizer.warmup_steps + decay > self.steps:
            raise ValueError(
                f"optimizer.decay_steps = {decay} and warmup_steps = {self.optimizer.warmup_steps} are more than "
                f"steps = {self.steps}; use at most {self.steps - self.optimizer.warmup_steps}"
            )
        if self.long_documents and not self.pack:
            raise ValueError("long_documents = … weighs chunks by their tokens, which only packed rows do; set pack")
        release_steps = self.release_checkpoint_steps
        if list(release_steps) != sorted(set(release_steps)) or (release_steps and release_steps[-1] > self.steps):
            raise ValueError(
                f"release_checkpoint_steps = {shown(release_steps)} must increase, up to steps = {self.steps} at most"
            )
        if self.excluded_steps and max(self.excluded_steps) > self.steps:
            raise ValueError(
                f"excluded_steps = {shown(self.excluded_steps)} goes beyond steps = {self.steps}; leave later ones out"
            )
        if self.long_documents and self.long_documents.over >= length:
            raise ValueError(
                f"long_documents.over = {self.long_documents.over} leaves no chunk of sequence_length = {length} that "
                f"is longer; use less, such as the context before"
            )
        if self.continue_from and not re.fullmatch(r"[a-z][a-z0-9-]*@[1-9][0-9]{0,11}", self.continue_from):
            raise ValueError(f"continue_from = {self.continue_from} is no checkpoint; write it as in pretrain@1200")
        if self.first_step > self.steps:
            raise ValueError(
                f"steps = {self.steps} leaves nothing to train after {self.continue_from}; "
                f"use at least {self.first_step}, since steps are counted from the beginning of the phase"
            )
        # Steps before the origin are not trained in this phase in any case.
        excluded = sum(step >= self.first_step for step in set(self.excluded_steps))
        if excluded == self.steps - self.first_step + 1:
            raise ValueError(f"excluded_steps = {shown(self.excluded_steps)} leaves no step to train; leave some in")
        if self.merge and (count := len(self.last_release_steps(self.merge.last))) < self.merge.last:
            raise ValueError(
                f"merge.last = {self.merge.last} is more than the {count} release checkpoints after step "
                f"{self.first_step - 1}; lower it or release_checkpoint_interval = {self.release_checkpoint_interval}"
            )
        return self

    def last_release_steps(self, count: int) -> list[int]:
        """Returns the steps of the last release checkpoints that the phase trains, ascending: `count`, or all."""
        steps, step = list[int](), self.steps
        further = set(self.release_checkpoint_steps)
        while step >= self.first_step and len(steps) < count:
            steps.append(step)
            # The last step has a checkpoint, whether or not it is a multiple of the interval.
            regular = (step - 1) // self.release_checkpoint_interval * self.release_checkpoint_interval
            step = max([regular, *(each for each in further if each < step)])
        return steps[::-1]

    def is_release_step(self, step: int) -> bool:
        return super().is_release_step(step) or step in self.release_checkpoint_steps

    @property
    def logit_z_loss(self) -> float:
        return self.output_z_loss

    @property
    def first_step(self) -> int:
        """The first step that is trained; 1 unless the phase continues from a checkpoint."""
        return int(self.continue_from.rsplit("@")[1]) + 1 if self.continue_from else 1

    def rows_of(self, step: int) -> int:
        """Rows of an optimizer step, over all ranks."""
        sizes = [part.global_tokens for part in self.batch.ramp if step <= part.until_step]
        return (sizes[0] if sizes else self.batch.global_tokens) // self.sequence_length

    @property
    def row_ramp(self) -> list[tuple[int, int]]:
        """(last step, rows of each step) of the smaller batches at the beginning."""
        return [(part.until_step, part.global_tokens // self.sequence_length) for part in self.batch.ramp]

    def rows_from(self, first: int) -> int:
        """Rows of the steps from `first` to the last."""
        return rows_from(first, (*self.row_ramp, (self.steps, self.rows_of(self.steps))))

    def tokens(self, first: int = 1) -> int:
        """Token slots of the steps from `first` to the last."""
        return self.rows_from(first) * self.sequence_length

    @property
    def packed(self) -> bool:
        return self.pack

    @property
    def least_slots(self) -> int:
        """Inputs that each row has at least, with padding.

        They are all of the sequence if kernels are repeated with the sizes of a first run.
        """
        return self.sequence_length if self.parallelism.cuda_graphs else 0

    @property
    def micro_rows(self) -> int:
        return self.batch.micro_tokens // self.sequence_length

    @property
    def micro_batch_counts(self) -> list[int]:
        sizes = [*(part.global_tokens for part in self.batch.ramp), self.batch.global_tokens]
        return [size // self.batch.micro_tokens for size in sizes]


class SftPhase(PhaseConfig):
    """Supervised fine-tuning: of all weights, or of adapters on them."""

    lora: Lora | None = added(None)
    """train low-rank adapters on the frozen model of the previous phase; null: train all weights"""

    @model_validator(mode="after")
    def _merges_weights(self) -> SftPhase:
        if self.lora and self.merge:
            raise ValueError(
                "merge averages weights, and averages of the two factors of an adapter do not give the average of its "
                "weights; leave out merge or lora"
            )
        return self

    @property
    def adapter(self) -> Lora | None:
        return self.lora


LongContext = Annotated[tuple[PhaseConfig, ...], Field(max_length=16)]
"""The `long_context` section: mid-training phases on longer and longer rows."""


class TrainerConfig(Config):
    """Config of a stage that trains: the resolved sections of the recipe. A subclass has the field `phase`."""

    model: Model
    """model section, with the rotary embedding of the phase"""
    padded_vocab_size: PositiveInt
    """rows of the embedding matrix"""
    seed: Seed
    """seed of the recipe"""

    if TYPE_CHECKING:
        phase: PhaseBase

    @model_validator(mode="after")
    def _possible_layout(self) -> TrainerConfig:
        phase = self.phase
        layout, counts = phase.parallelism, phase.micro_batch_counts
        wrong = problem(layout, self.model, self.padded_vocab_size, counts, phase.packed, phase.precision)
        if phase.adapter and not wrong:
            wrong = phase.adapter.problem(layout, phase.precision, self.model)
        if wrong:
            raise ValueError(wrong)
        return self


class TrainConfig(TrainerConfig):
    """Config of a stage that trains on text."""

    phase: PhaseConfig
    """section of the phase"""

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.phase.sequence_length > self.model.context_length:
            raise ValueError(
                f"sequence_length = {self.phase.sequence_length} is longer than model.context_length = "
                f"{self.model.context_length}; shorten the sequence or raise the context length"
            )
        yarn = self.model.yarn
        if yarn and yarn.factor * yarn.original_length < self.phase.sequence_length:
            raise ValueError(
                f"rope.yarn.factor = {yarn.factor:g} x original_length = {yarn.original_length} covers fewer tokens "
                f"than sequence_length = {self.phase.sequence_length}; raise the factor to at least "
                f"{self.phase.sequence_length / yarn.original_length:g}"
            )
        if yarn and yarn.factor * yarn.original_length != self.model.context_length:
            raise ValueError(
                f"rope.yarn.factor = {yarn.factor:g} x original_length = {yarn.original_length} is not the context of "
                f"{self.model.context_length} tokens, from which some readers of an exported config compute the factor"
                f"; use the factor {self.model.context_length / yarn.original_length:g}"
            )
        total = self.model.parameters(self.padded_vocab_size)["total"]
        if total > MOST_PARAMETERS:
            raise ValueError(
                f"model.layers = {self.model.layers} with hidden_size = {self.model.hidden_size} makes "
                f"{total:.1e} parameters; use at most {MOST_PARAMETERS:.0e} (Kimi K2: 1e12)"
            )
        return self


class SftConfig(TrainConfig):
    """Config of supervised fine-tuning."""

    phase: SftPhase
    """section of the phase"""
