"""The optimizer: its settings in a recipe, its states, and how Megatron builds it.

No torch at the top: `atom plan` imports this file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import model_validator

from pipeline.core.bounds import Range, Steps
from pipeline.core.stage import Config, added
from stages.models.param_names import BUFFERS

if TYPE_CHECKING:
    import torch

LearningRate = Annotated[float, Range(0, 1, "published runs of AdamW: 1e-5 to 0.01")]
"""A learning rate; the peak is above 0."""
PeakRate = Annotated[float, Range(0, 1, "published runs of AdamW: 1e-5 to 0.01", above=True)]
Beta = Annotated[float, Range(0, 1, "usual: 0.9 and 0.95", below=True)]
StateTensor = tuple[str, str, tuple[int, ...]]
"""The name of a state, the global name of the tensor that it belongs to, and the shape of both."""
STATES = ("exp_avg", "exp_avg_sq")
"""The states of each tensor, fp32 and of its shape: running means of the gradient and of its square."""
STATE_BYTES = 4 * len(STATES)
"""Bytes of the states of a parameter."""


class Adam(Config):
    """AdamW (arXiv:1412.6980) and its schedule: linear warmup from zero to `lr`, then decay to `final_lr` at the end.

    `cosine` decays from the end of warmup (Loshchilov and Hutter, 2017); `wsd` (warmup-stable-decay) holds `lr` and
    decays in the last `decay_steps` by 1 - sqrt (Hägele et al., 2024).
    """

    schedule: Literal["cosine", "wsd"] = added("cosine")
    """learning-rate schedule: cosine, or warmup-stable-decay"""
    decay_steps: Steps | None = added(None)
    """steps of the final decay; only for wsd, which requires it"""
    lr: PeakRate
    """peak learning rate"""
    final_lr: LearningRate
    """learning rate at the last step"""
    warmup_steps: Annotated[int, Range(0, 1e8)]
    """steps of linear warmup"""
    weight_decay: Annotated[float, Range(0, 10, "usual: 0 to 0.1")] = 0.1
    """decoupled weight decay; norms are not decayed"""
    beta1: Beta = 0.9
    """decay rate of the running mean of gradients"""
    beta2: Beta = 0.95
    """decay rate of the running mean of squared gradients"""
    clip: Annotated[float, Range(0, 1000, "usual: 1", above=True)] = 1.0
    """maximum global norm of the gradients; larger ones are scaled down to it"""

    @model_validator(mode="after")
    def _rate_only_decays(self) -> Adam:
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr = {self.final_lr} is above lr = {self.lr}; the rate only decays after warm-up")
        return self

    @model_validator(mode="after")
    def _wsd_has_decay_steps(self) -> Adam:
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError(
                f"decay_steps = {self.decay_steps} with schedule = {self.schedule}: a wsd schedule needs it, and no "
                "other has it"
            )
        return self

    def learning_rate(self, step: int, steps: int) -> float:
        """Returns the learning rate of a step, 1 to `steps`: the peak at the end of warmup, `final_lr` at the end."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps

        span = self.lr - self.final_lr
        if self.decay_steps is not None:
            progress = max(0, step - (steps - self.decay_steps)) / self.decay_steps
            return self.final_lr + span * (1 - math.sqrt(progress))
        progress = (step - self.warmup_steps) / (steps - self.warmup_steps)
        return self.final_lr + 0.5 * span * (1 + math.cos(math.pi * progress))

    def build(self, chunks: Collection[torch.nn.Module], **settings: Any) -> Any:
        """Builds Megatron's optimizer.

        Args:
            chunks: The rank's parts of the model, each in Megatron's DDP.
            settings: Of Megatron's OptimizerConfig, on the layout and the precision of the phase.
        """
        from stages.mcore.megatron_imports import OptimizerConfig, get_megatron_optimizer

        config = OptimizerConfig(
            optimizer="adam",
            lr=self.lr,
            weight_decay=self.weight_decay,
            adam_beta1=self.beta1,
            adam_beta2=self.beta2,
            clip_grad=self.clip,
            use_distributed_optimizer=True,
            **settings,
        )
        # Only Megatron's own checkpoints need groups of gloo, which connect every rank with every other one.
        return get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)


def state_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StateTensor]:
    """Returns the states of a model by their names in checkpoints, `<state>.<global name>`, in their order there.

    Args:
        shapes: Shape of each trained tensor by its global name. Buffers have no state.
    """
    trained = {name: shape for name, shape in shapes.items() if not name.endswith(BUFFERS)}
    return {f"{state}.{name}": (state, name, shape) for state in STATES for name, shape in trained.items()}
