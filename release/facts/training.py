"""Reads the training logs: token shares of experts, and skipped steps.

A model repository carries the log of each phase that made it as `training/<phase>.jsonl`, byte for byte the
`training.jsonl` of the phase's artifact. Card, plot and checks read these logs and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from release.layout import when
from stages.confidence import Mean, clustered

Facts = dict[str, Any]
FIGURES = ("step", "tokens", "experts", "spike", "rewards", "excluded", "truncated", "looping", "alarms", "filtered")
"""The fields of a line that a card uses."""


def logs(model: Path) -> dict[str, Path]:
    """Lists the logs of a model repository, {phase: its log}, in the order of training."""
    paths = sorted((model / "training").glob("*.jsonl"), key=lambda path: when(path.stem))
    return {path.stem: path for path in paths}


def read(log: Path, fields: Collection[str] | None = None) -> list[Facts]:
    """Reads the lines of a log. Only `fields` are kept, or all if it is None; a log can be long."""
    return [line if fields is None else {name: line[name] for name in fields if name in line} for line in stream(log)]


def stream(log: Path) -> Iterator[Facts]:
    """Reads the lines of a log one after the other."""
    with log.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


class FirstAndLast(TypedDict):
    """Mean rewards over the first and the last quarter of the steps."""

    first: Mean
    last: Mean


class Termination(TypedDict):
    """The share of a phase's answers that ended in one way, over its steps."""

    first: float
    """mean over the first quarter of the steps"""
    last: float
    """mean over the last quarter"""
    highest: float
    """largest share of a step"""
    step: int
    """that step"""
    above: int
    """steps with more than the recipe's limit"""
    limit: float | None
    """the limit, if a step exceeded it"""


@dataclass
class PhaseLog:
    """The facts of one phase for a card.

    Attributes:
        first: The first step that the log covers.
        last: The last one.
        experts: The last measurement of the routers with its `step`; None without one.
        spikes: Each with its `step`.
        rewards: {kind of task: mean reward of the first and the last quarter of the steps, with standard errors over
            steps}; none for fewer than four steps.
        excluded: Steps that the recipe excludes, without a spike.
        termination: Of answers that were cut off (`truncated`) and of those in a loop (`looping`); none of a phase that
            draws no answers.
        filtered: The tasks of each bin before and after the filter by pass rates; none of a phase without one.
    """

    first: int
    last: int
    experts: Facts | None
    spikes: list[Facts]
    rewards: dict[str, FirstAndLast]
    excluded: list[int]
    termination: dict[str, Termination] = field(default_factory=dict)
    filtered: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def log_facts(lines: list[Facts]) -> PhaseLog:
    """Computes the facts of a log, whose lines have FIGURES at least."""
    steps = [line["step"] for line in lines if "tokens" in line]
    measured = [{"step": line["step"], **line["experts"]} for line in lines if "experts" in line]
    spikes = [{"step": line["step"], **line["spike"]} for line in lines if "spike" in line]
    # Steps that a spike excluded are told with it.
    spike_steps = {step for spike in spikes for step in spike["excluded"]}
    rewards = [line["rewards"] for line in lines if "rewards" in line]
    drawn = [line for line in lines if "looping" in line]
    return PhaseLog(
        first=min(steps),
        last=max(steps),
        experts=measured[-1] if measured else None,
        spikes=spikes,
        rewards=_first_and_last(rewards),
        excluded=[line["step"] for line in lines if "excluded" in line and line["step"] not in spike_steps],
        termination={name: _termination(drawn, name) for name in ("truncated", "looping")} if drawn else {},
        filtered=next((line["filtered"] for line in lines if "filtered" in line), {}),
    )


def _termination(lines: Sequence[Facts], name: str) -> Termination:
    shares = [line[name] for line in lines]
    quarter, worst = max(1, len(lines) // 4), max(lines, key=lambda line: line[name])
    limits = [line["alarms"][name] for line in lines if name in line.get("alarms", {})]
    return {
        "first": fmean(shares[:quarter]),
        "last": fmean(shares[-quarter:]),
        "highest": worst[name],
        "step": worst["step"],
        "above": len(limits),
        "limit": limits[0] if limits else None,
    }


def _first_and_last(rows: Sequence[Mapping[str, float]]) -> dict[str, FirstAndLast]:
    """Returns the means of every name that at least four rows have."""
    means = {name: [row[name] for row in rows if name in row] for row in rows for name in row}
    return {name: _first_and_last_means(values) for name, values in sorted(means.items()) if len(values) >= 4}


def _first_and_last_means(means: list[float]) -> FirstAndLast:
    # Two at least, since one value has no standard error.
    size = max(2, len(means) // 4)
    return {"first": clustered(means[:size]), "last": clustered(means[-size:])}
