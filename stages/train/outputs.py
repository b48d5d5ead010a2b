"""The fields of `state.json` and `summary.json`, which later phases, cards and checks read.

docs/formats.md explains them. A name in these files is published and never changes its meaning.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class State(TypedDict):
    """The content of `state.json`: the state of training at a checkpoint."""

    phase: str
    """name of the phase"""
    step: int
    """step of the checkpoint"""
    tokens: int
    """targets seen"""
    seed: int
    """seed of the phase"""
    optimizer_step: int
    """steps that updated the weights, with those of earlier phases if the optimizer was carried over"""
    lr: float
    """learning rate of the step"""
    rng: str
    """a statement that no random state is used"""
    config: dict[str, Any]
    """config of the stage without its operational fields"""
    data_position: NotRequired[dict[str, Any]]
    """of phases that read text: the position in the data, below"""
    tokenizer: NotRequired[str]
    """of phases that read text: `tokenizer` in the `meta.json` of the tokens"""
    rl: NotRequired[dict[str, Any]]
    """of the other phases: the state of the curriculum"""
    expert_load: NotRequired[list[list[float]]]
    """with `balance: global`: shares of the experts in the last update, `[layer with experts][expert]`"""


class Summary(TypedDict):
    """The fields that `summary.json` of every phase has."""

    phase: str
    """name of the phase"""
    parameters: dict[str, int]
    """`total`, `active` (used by one token) and `embedding` (the input table)"""
    steps: int
    """steps of the phase"""
    tokens: int
    """targets seen"""
    precision: str
    """precision of the training"""


class TextSummary(TypedDict):
    """The further fields of a phase that reads text."""

    loss: dict[str, float] | None
    """`first` and `last`; null if no step updated weights"""
    heldout_loss: dict[str, float]
    """`first`, `last`, and `rows`, the number of rows that were measured"""
    spikes: list[dict[str, Any]]
    """`step`, `reason`, `action`, `excluded` and `documents` of each"""
    excluded_steps: list[int]
    """steps whose batch was left out"""
    dead_experts: list[list[int]]
    """`[layer, expert]` of each in the last measurement; empty for a dense model, which has no experts"""
    dropped_tokens: int
    """assignments that no expert took, in all measurements; 0 for a dense model"""
    lora: NotRequired[dict[str, Any]]
    """of adapters: `rank`, `alpha`, `targets` and `parameters`"""
    base: NotRequired[dict[str, str]]
    """of adapters: `artifact` and `digest` of the frozen phase"""
