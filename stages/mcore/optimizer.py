"""The kinds of optimizers: their settings in a recipe, their states, and how Megatron builds them.

A kind is a class below `OptimizerSettings` and a line in `KINDS` (docs/extending.md). No torch at the top: `atom plan`
imports this file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Tag, model_validator

from pipeline.core.bounds import Flag, Range, Steps
from pipeline.core.extensions import extend
from pipeline.core.stage import Config, added
from stages.models.base import NEWTON_SCHULZ
from stages.models.param_names import BUFFERS, EMBEDDING

if TYPE_CHECKING:
    import torch

LearningRate = Annotated[float, Range(0, 1, "published runs of AdamW: 1e-5 to 0.01")]
"""A learning rate; the peak is above 0."""
PeakRate = Annotated[float, Range(0, 1, "published runs of AdamW: 1e-5 to 0.01", above=True)]
Beta = Annotated[float, Range(0, 1, "usual: 0.9 and 0.95", below=True)]
StateTensor = tuple[str, str, tuple[int, ...]]
"""The name of a state, the global name of the tensor that it belongs to, and the shape of both."""
STATE_BYTES = 4
"""Bytes of a number of a state: fp32, as that of the weights that the optimizer updates."""


@dataclass(frozen=True)
class Rule:
    """The way in which an optimizer updates some of the tensors.

    Attributes:
        states: Names of the tensors that it keeps for each of them, fp32 and of the same shape, as checkpoints name
            them. Data ranks share them by slices.
        iterations: Products of Newton and Schulz that orthogonalize the update of a matrix; 0 if nothing does.
    """

    states: tuple[str, ...]
    iterations: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the states of one parameter."""
        return STATE_BYTES * len(self.states)


ADAM = Rule(("exp_avg", "exp_avg_sq"))
"""Kingma and Ba, 2015 (arXiv:1412.6980): running means of the gradient and of its square."""


class OptimizerSettings(Config):
    """Settings of every optimizer: its schedule, and Adam's for the tensors that other kinds leave to Adam.

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
    decay_embeddings: Flag = added(True)
    """apply weight_decay to the embedding too; an output head that is not tied to it is decayed in any case"""
    beta1: Beta = 0.9
    """decay rate of the running mean of gradients"""
    beta2: Beta = 0.95
    """decay rate of the running mean of squared gradients"""
    clip: Annotated[float, Range(0, 1000, "usual: 1", above=True)] = 1.0
    """maximum global norm of the gradients; larger ones are scaled down to it"""

    matrices: ClassVar[Rule]
    """The rule for the weight matrices of layers, experts among them; routers are not."""
    others: ClassVar[Rule] = ADAM
    """The rule for embedding, output head, routers, norms and biases."""
    if TYPE_CHECKING:  # each kind declares the field with its name as the only value
        kind: str

    @model_validator(mode="after")
    def _rate_only_decays(self) -> OptimizerSettings:
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr = {self.final_lr} is above lr = {self.lr}; the rate only decays after warm-up")
        return self

    @model_validator(mode="after")
    def _wsd_has_decay_steps(self) -> OptimizerSettings:
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

    @classmethod
    def rule_of(cls, name: str, shape: tuple[int, ...]) -> Rule:
        """Returns the rule for a tensor, by its global name and its full shape."""
        return cls.matrices if is_matrix(name, shape) else cls.others

    @classmethod
    def state_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StateTensor]:
        """Returns the states of a model by their names in checkpoints, `<state>.<global name>`, in their order there.

        Args:
            shapes: Shape of each trained tensor by its global name. Buffers have no state.
        """
        tensors: dict[str, StateTensor] = {}
        for state in dict.fromkeys((*cls.matrices.states, *cls.others.states)):
            for name, shape in shapes.items():
                if state in cls.rule_of(name, shape).states and not name.endswith(BUFFERS):
                    tensors[f"{state}.{name}"] = (state, name, shape)
        return tensors

    @classmethod
    def state_bytes(cls, parameters: float, tables: float = 0) -> float:
        """Returns the bytes of all states of that many parameters, `tables` of which are of embedding and head.

        Routers and norms, which are less than a hundredth of a model, count as matrices.
        """
        return cls.matrices.bytes * (parameters - tables) + cls.others.bytes * tables

    def build(
        self,
        chunks: Collection[torch.nn.Module],
        parameters: Mapping[str, torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        **settings: Any,
    ) -> Any:
        """Builds Megatron's optimizer: here AdamW for all tensors, which another kind changes.

        Args:
            chunks: The rank's parts of the model, each in Megatron's DDP.
            parameters: Their parameters by global name, among them those that training leaves as they are.
            shapes: Full shape of each tensor that training changes.
            settings: Of Megatron's OptimizerConfig, on the layout and the precision of the phase.
        """
        from stages.mcore.megatron_imports import (
            OptimizerConfig,
            ParamKey,
            ParamPredicate,
            get_megatron_optimizer,
            get_standard_config_overrides,
        )

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
        overrides = get_standard_config_overrides(config)
        if not self.decay_embeddings:
            # By identity: the copy of a tied table on the last pipeline stage has the name of an output head.
            tables = {id(tensor) for name, tensor in parameters.items() if name == EMBEDDING}
            overrides[ParamKey(predicate=ParamPredicate("embedding", lambda x: id(x) in tables))] = {"wd_mult": 0.0}
        # Only Megatron's own checkpoints need groups of gloo, which connect every rank with every other one.
        return get_megatron_optimizer(config, list(chunks), overrides, use_gloo_process_groups=False)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Returns True for a weight matrix of a layer, by its global name and its full shape; routers are none."""
    # The table and the output head are matrices too, but no layer's.
    return name.startswith("decoder.layers.") and len(shape) == 2 and not name.endswith(".router.weight")


def parts_of(optimizer: Any) -> list[Any]:
    """Returns Megatron's distributed optimizers: one for dense tensors, another for experts if they are spread."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    # A rank without parameters of a kind has a stub, which owns no state.
    return [part for part in parts if not part.is_stub_optimizer]


class Adam(OptimizerSettings):
    """AdamW and its learning-rate schedule: linear warmup from zero to `lr`, then decay to `final_lr` at the last step.

    `cosine` decays from the end of warmup (Loshchilov and Hutter, 2017); `wsd` (warmup-stable-decay) holds `lr` and
    decays in the last `decay_steps` by 1 - sqrt (Hägele et al., 2024).
    """

    # Not written out: configs and keys of recipes without `kind` stay as they are. Another kind writes its name.
    kind: Literal["adam"] = added("adam", exclude=True)
    """kind of optimizer"""

    matrices = ADAM


class Muon(OptimizerSettings):
    """Muon for the weight matrices of layers, AdamW for all other tensors, at the same learning rate.

    An update is Nesterov's momentum with all singular values made about 1 (Jordan, 2024), scaled to the size of AdamW's
    (Liu et al., 2025, arXiv:2502.16982).
    """

    kind: Literal["muon"] = "muon"
    """kind of optimizer"""
    lr: Annotated[float, Range(0, 1, "published runs at this scale: 1e-4 to 1e-3; small models take more", above=True)]
    """peak learning rate, of Muon and of AdamW"""
    momentum: Annotated[float, Range(0, 1, "usual: 0.95", below=True)] = 0.95
    """decay rate of the running mean of gradients of matrices"""

    matrices = Rule(("momentum",), NEWTON_SCHULZ)

    def build(
        self,
        chunks: Collection[torch.nn.Module],
        parameters: Mapping[str, torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        **settings: Any,
    ) -> Any:
        from stages.mcore import muon

        optimizer = super().build(chunks, parameters, shapes, **settings)
        config: Any = next(iter(chunks)).config
        matrices = {name: x for name, x in parameters.items() if name in shapes and is_matrix(name, shapes[name])}
        for part in parts_of(optimizer):
            muon.install(part, matrices, shapes, (config.num_query_groups, config.kv_channels), self.momentum)
        return optimizer


KINDS: dict[str, type[OptimizerSettings]] = {"adam": Adam, "muon": Muon}
extend("optimizers", KINDS, load=True)
DEFAULT = "adam"
"""The kind of a section without `kind`."""


def kind_of(section: Any) -> Any:
    """Returns the kind that a section names, or the default, whose settings then report what is wrong with it."""
    if isinstance(section, Mapping):
        return section.get("kind", DEFAULT)
    return getattr(section, "kind", DEFAULT)


if TYPE_CHECKING:
    Optimizer = OptimizerSettings
else:
    Optimizer = Annotated[
        Union[tuple(Annotated[settings, Tag(name)] for name, settings in KINDS.items())],  # noqa: UP007 - computed
        Discriminator(
            kind_of,
            custom_error_type="unknown_optimizer",
            custom_error_message=f"kind is not known; known: {', '.join(KINDS)}",
        ),
    ]
    """The type of a section `optimizer`: the settings of the kind that it names."""
