"""Estimates the cost of a plan on a cluster: hours, money and energy of each stage, from its estimate and the
profile."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.graph.plan import StagePlan
from pipeline.launch.cluster_profile import Profile
from pipeline.tracking.budget import Hours

RECOMPUTED = 4 / 3
"""One further forward pass beside the three units of a step."""


@dataclass(frozen=True)
class Use:
    """The expected use of one stage or of all. hours: wall-clock hours."""

    name: str
    hours: float = 0.0
    gpu_hours: float = 0.0
    core_hours: float = 0.0
    cost: float = 0.0
    energy_wh: float = 0.0
    why: str | None = None
    """The reason for a missing estimate; None with an estimate."""

    def json(self) -> dict[str, Any]:
        return {"name": self.name, "why": self.why} if self.why else asdict(self)


@dataclass(frozen=True)
class Forecast:
    """The estimates of the stages to run. total: the sum of the estimated stages; its hours assume one stage after the
    other."""

    profile: Profile
    uses: tuple[Use, ...]
    total: Use
    assumed: tuple[str, ...]

    @property
    def hours(self) -> Hours:
        """The hours that the estimated stages add to the use of the recipe."""
        return {"gpu_hours": self.total.gpu_hours, "core_hours": self.total.core_hours}

    def json(self) -> dict[str, Any]:
        prices = self.profile.costs()
        return {
            "profile": self.profile.name,
            "currency": prices["currency"] if prices else None,
            "stages": [use.json() for use in self.uses],
            "total": asdict(self.total),
            "assumed": list(self.assumed),
        }


def forecast(rows: list[StagePlan], profile: Profile, small: bool) -> Forecast:
    """small: `planner.is_small` of the graph.

    Raises RecipeError if the ranks of a stage do not fill the profile's nodes equally.
    """
    uses = tuple(_priced(_use(row, profile, small), profile) for row in rows if row.state.text == "to run")
    total = Use("all", *(sum(values) for values in zip(*(_figures(use) for use in uses), strict=True)))
    return Forecast(profile, uses, total, tuple(_assumed(rows, uses, profile)))


def _figures(use: Use) -> tuple[float, ...]:
    return use.hours, use.gpu_hours, use.core_hours, use.cost, use.energy_wh


def _use(row: StagePlan, profile: Profile, small: bool) -> Use:
    name, estimate = row.state.name, row.estimate
    gpus = _gpus(row, profile)
    if gpus and estimate.training is None:
        return Use(name, why="on GPUs training phases alone are estimated")
    if gpus:
        assert estimate.training is not None and estimate.flops is not None
        precision = estimate.training.precision
        if profile.gpu is None:
            return Use(name, why=f"cluster profile {profile.name} has no section gpu, with peak and utilization")
        if (rate := profile.gpu.rate(precision)) is None:
            return Use(name, why=f"cluster profile {profile.name} has no rate for {precision} in its section gpu")
        flops = estimate.flops * (RECOMPUTED if _recomputes(row) else 1)
        used = flops / rate.flops / 3600
        return Use(name, used / gpus, gpu_hours=used)
    if estimate.cpu_seconds is None:
        return Use(name, why="no estimate")
    if estimate.fixed and not small:
        return Use(name, why="known of small corpora only")
    # each rank computes with one thread, for any number of cores of its job
    places = row.ranks if profile.slurm else min(row.ranks, profile.local.jobs)
    seconds, core_hours = estimate.cpu_seconds / places, estimate.cpu_seconds / 3600
    if profile.slurm and row.shards > 1 and estimate.serial_seconds is not None:
        tasks = min(row.shards, profile.slurm.array_size)
        seconds = estimate.serial_seconds + (estimate.cpu_seconds - estimate.serial_seconds) / tasks
    return Use(name, seconds / 3600, core_hours=core_hours)


def _gpus(row: StagePlan, profile: Profile) -> int:
    """The total number of GPUs of a stage's job."""
    if profile.slurm is None:
        return 0
    return profile.slurm.allocation(row.state.name, row.ranks, row.trains).gpus


def _recomputes(row: StagePlan) -> bool:
    return row.estimate.training is not None and row.estimate.training.recomputes


def _priced(use: Use, profile: Profile) -> Use:
    power, prices = profile.power, profile.prices
    return replace(
        use,
        cost=use.gpu_hours * prices.gpu_hour + use.core_hours * prices.core_hour if prices else 0.0,
        energy_wh=use.gpu_hours * power.watts_per_gpu + use.core_hours * power.watts_per_core,
    )


def _assumed(rows: list[StagePlan], uses: tuple[Use, ...], profile: Profile) -> list[str]:
    """Sentences on the rates and their sources, on omitted costs, and on stages without an estimate."""
    sentences, on_gpus = [], {use.name for use in uses if use.gpu_hours}
    used = [row for row in rows if row.state.name in on_gpus]
    if profile.gpu and used:
        precisions = dict.fromkeys(row.estimate.training.precision for row in used if row.estimate.training)
        rates = " and ".join(dict.fromkeys(profile.gpu.describe(precision) for precision in precisions))
        again = ", a third more FLOPs where layers are computed again" if any(map(_recomputes, used)) else ""
        sentences.append(f"assumed: {profile.gpu.name} at {rates}{again}; {profile.gpu.source}")
        sentences.append(
            "not counted: restarts, waiting for the queue, reading and writing of checkpoints, held-out loss, cores "
            "beside GPUs"
        )
    reasons: dict[str, list[str]] = {}
    for use in uses:
        if use.why:
            reasons.setdefault(use.why, []).append(use.name)
    return sentences + [f"no time is given for {', '.join(names)}: {why}" for why, names in reasons.items()]
