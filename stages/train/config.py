"""The `pretrain` and `midtrain` sections of a recipe, and the config of the stages that run them."""

from __future__ import annotations

import re

from pydantic import Field, NonNegativeInt, model_validator

from pipeline.stage import Config, added, operational
from stages.model.config import ModelConfig, PositiveInt
from stages.model.layout import Layout, problem


class Batch(Config):
    """Sizes in token slots (rows times sequence_length), padding included."""

    global_tokens: PositiveInt = Field(description="token slots of one optimizer step, over all ranks")
    micro_tokens: PositiveInt = Field(description="token slots of one forward and backward on one rank")


class Optimizer(Config):
    """AdamW under linear warm-up from zero to `lr` and cosine decay to `final_lr` at the last step."""

    lr: float = Field(gt=0, description="peak learning rate")
    final_lr: float = Field(ge=0, description="learning rate of the last step")
    warmup_steps: NonNegativeInt = Field(description="steps of linear warm-up")
    weight_decay: float = Field(0.1, ge=0, description="decoupled; norms are never decayed")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")

    @model_validator(mode="after")
    def _possible(self) -> Optimizer:
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr = {self.final_lr} is above lr = {self.lr}; the rate only decays after warm-up")
        return self


class Heldout(Config):
    """How often the loss on held-out documents is measured, and on how many rows."""

    every: PositiveInt
    rows: PositiveInt


class PhaseConfig(Config):
    """One training phase: which text in which shares, how long, how fast."""

    mix: dict[str, float] = Field(min_length=1, description="share of rows by source")
    sequence_length: PositiveInt = Field(description="tokens predicted in one row")
    batch: Batch
    steps: PositiveInt
    optimizer: Optimizer
    heldout: Heldout
    continue_from: str | None = added(
        None, "a release checkpoint of an earlier run, such as pretrain@1200: only the steps after it are trained"
    )
    release_checkpoint_every: PositiveInt = Field(description="steps between checkpoints that are sealed")
    work_checkpoint_every: PositiveInt = operational(1000, "steps between checkpoints that a killed run resumes from")
    work_checkpoints_kept: PositiveInt = operational(2, "work checkpoints that are kept, the newest ones")
    hang_seconds: float = operational(1800.0, "a rank that finishes no step for this long is taken to hang", gt=0)
    cluster: Layout = operational(Layout(), "how the phase is spread over processes; never part of the key")

    @model_validator(mode="after")
    def _possible(self) -> PhaseConfig:
        length, batch = self.sequence_length, self.batch
        for name, value, unit, called in (
            ("global_tokens", batch.global_tokens, length, "sequence_length"),
            ("micro_tokens", batch.micro_tokens, length, "sequence_length"),
            ("global_tokens", batch.global_tokens, batch.micro_tokens, "batch.micro_tokens"),
        ):
            if value % unit:
                near = _multiples(value, unit)
                raise ValueError(f"batch.{name} = {value} is not a multiple of {called} {unit}; nearest: {near}")
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} leaves nothing of steps = {self.steps} to "
                f"train at the full rate; use at most {self.steps - 1}"
            )
        if self.continue_from and not re.fullmatch(r"[a-z][a-z0-9-]*@[1-9][0-9]{0,11}", self.continue_from):
            raise ValueError(f"continue_from = {self.continue_from} is no checkpoint; write it as in pretrain@1200")
        if self.first_step > self.steps:
            raise ValueError(
                f"steps = {self.steps} leaves nothing to train after {self.continue_from}; "
                f"use at least {self.first_step}, since steps are counted from the beginning of the phase"
            )
        for source, share in self.mix.items():
            if share <= 0:
                raise ValueError(f"mix.{source} = {share} is not a positive share; leave the source out instead")
        return self

    @property
    def first_step(self) -> int:
        """The first step that is trained; 1 unless the phase goes on from a checkpoint."""
        return int(self.continue_from.rsplit("@")[1]) + 1 if self.continue_from else 1

    @property
    def rows(self) -> int:
        """Rows of one optimizer step, over all ranks."""
        return self.batch.global_tokens // self.sequence_length

    @property
    def micro_rows(self) -> int:
        return self.batch.micro_tokens // self.sequence_length

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step, over all ranks."""
        return self.batch.global_tokens // self.batch.micro_tokens


class TrainConfig(Config):
    """What a pretrain or midtrain stage is given: the recipe's sections, resolved."""

    model: ModelConfig
    phase: PhaseConfig
    padded_vocab_size: PositiveInt
    seed: NonNegativeInt

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.phase.sequence_length > self.model.context_length:
            raise ValueError(
                f"sequence_length = {self.phase.sequence_length} is longer than model.context_length = "
                f"{self.model.context_length}; shorten the sequence or raise the context length"
            )
        wrong = problem(self.phase.cluster, self.model, self.padded_vocab_size, self.phase.micro_batches)
        if wrong:
            raise ValueError(wrong)
        return self


def _multiples(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, as words."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
