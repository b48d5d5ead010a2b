"""Estimates what a plan costs on a cluster, and checks that its stages fit.

The hours, the money and the energy of each stage follow from its estimate and the cluster profile. The limits are those
of nodes, memory, time, disk, files, and the Hub.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pipeline.core.errors import RecipeError
from pipeline.core.stage import TrainingTime, family
from pipeline.core.store import Store
from pipeline.graph.budget import Hours
from pipeline.graph.dag import Graph, states
from pipeline.graph.plan import StagePlan, is_small, plan
from pipeline.hub.client import FILE_BYTES, FOLDER_FILES, REPOSITORY_FILES
from pipeline.launch.cluster_profile import Profile, Rate, Servers, Slurm

GIB, GB = 2**30, 10**9
# Of an artifact without an estimate: of each shard, and beside them. atom-smoke's have at most 3 and 6.
FILES_PER_SHARD, FILES = 4, 10


@dataclass(frozen=True)
class Use:
    """The expected use of one stage or of all."""

    name: str
    # Hours on the clock.
    hours: float = 0.0
    gpu_hours: float = 0.0
    core_hours: float = 0.0
    cost: float = 0.0
    energy_wh: float = 0.0
    # Of gpu_hours and core_hours, those of servers in jobs of their own.
    server_gpu_hours: float = 0.0
    server_core_hours: float = 0.0
    # The reason for a missing estimate; None with an estimate.
    why: str | None = None

    def json(self) -> dict[str, Any]:
        return {"name": self.name, "why": self.why} if self.why else asdict(self)


@dataclass(frozen=True)
class CostEstimate:
    """The estimates of the stages to run."""

    profile: Profile
    uses: tuple[Use, ...]
    # The sum of the estimated stages; its hours assume one stage after the other.
    total: Use
    # Sentences on what the estimate rests on.
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


def estimate_costs(rows: list[StagePlan], profile: Profile, small: bool) -> CostEstimate:
    """Estimates the cost of the stages to run.

    Args:
        rows: The plan.
        profile: The cluster.
        small: As `plan.is_small` says of the graph.

    Raises:
        RecipeError: The ranks of a stage do not fill the profile's nodes equally.
    """
    uses = tuple(priced(_use(row, profile, small), profile) for row in rows if row.state.text == "to run")
    figures = [field.name for field in fields(Use) if field.name not in ("name", "why")]
    total = Use("all", **{name: sum(getattr(use, name) for use in uses) for name in figures})
    return CostEstimate(profile, uses, total, tuple(_assumed(rows, uses, profile)))


def _use(row: StagePlan, profile: Profile, small: bool) -> Use:
    name, estimate = row.state.name, row.estimate
    gpus, slurm = gpus_of(row, profile), profile.slurm
    if gpus and row.gpus and estimate.gpu_seconds is not None:
        seconds = _in_shards(row, estimate.gpu_seconds / gpus, slurm)
        # The job pays for all of its GPUs, and the stage may use only some of them.
        held = gpus_of(row, profile, all_of_job=True) / gpus
        return Use(name, seconds / 3600, gpu_hours=held * estimate.gpu_seconds / 3600)
    if gpus:
        training = rate_of(row, profile)
        if isinstance(training, str):
            return Use(name, why=training)
        seconds = training.seconds if isinstance(training, TrainingTime) else _seconds(row, training) / gpus
        return _with_servers(Use(name, seconds / 3600), row, profile, gpus_of(row, profile, all_of_job=True))
    if estimate.cpu_seconds is None:
        return Use(name, why="no estimate")
    if estimate.fixed and not small:
        return Use(name, why="known of small corpora only")
    # Each rank computes with one thread, for any number of cores of its job.
    places = row.ranks if slurm else min(row.ranks, profile.local.jobs)
    served = estimate.served.flops / estimate.served.cpu_flops if estimate.served else 0.0
    seconds = _in_shards(row, (estimate.cpu_seconds - served) / places, slurm)
    return _with_servers(Use(name, seconds / 3600, core_hours=estimate.cpu_seconds / 3600), row, profile, 0)


def _with_servers(use: Use, row: StagePlan, profile: Profile, gpus: int) -> Use:
    """Returns the use of a stage with the work that its servers do, or rank 0 if it has no servers.

    Servers in jobs of their own hold their GPUs as long as the stage runs.

    Args:
        use: The use without that work. Its `hours` are those in which the ranks compute.
        row: The plan of the stage.
        profile: The cluster profile.
        gpus: The number of GPUs of the ranks.
    """
    work, servers = row.estimate.served, servers_of(row, profile)
    if work is None:
        return replace(use, gpu_hours=use.hours * gpus)
    # Without servers in jobs of their own, rank 0 does their work: on one GPU if it has any, else on a core.
    in_server = servers.gpus_per_node if servers else min(gpus, 1)
    rate = in_server * work.gpu_flops or (servers.cpus_per_task if servers else 1) * work.cpu_flops
    # Seconds of the servers' work, in parallel on all of them; it comes on top unless the ranks compute meanwhile.
    drawing = work.flops / rate / (max(1, servers.count - work.scorers) if servers else work.places) / 3600
    hours = max(use.hours, drawing) if work.overlaps else use.hours + drawing
    on_cores = 0.0 if in_server else work.flops / work.cpu_flops / 3600
    core_hours = on_cores if gpus else use.core_hours - work.flops / work.cpu_flops / 3600 + on_cores
    use = replace(use, hours=hours, gpu_hours=hours * gpus, core_hours=core_hours)
    if servers is None:
        return use
    server_gpu_hours = servers.count * servers.gpus_per_node * hours
    gpu_hours = use.gpu_hours + server_gpu_hours
    return replace(use, gpu_hours=gpu_hours, server_gpu_hours=server_gpu_hours, server_core_hours=on_cores)


def servers_of(row: StagePlan, profile: Profile) -> Servers | None:
    """Returns the servers in jobs of their own that are submitted with a stage; None without any."""
    return profile.slurm.servers if profile.slurm is not None and row.takes_servers else None


def _in_shards(row: StagePlan, seconds: float, slurm: Slurm | None) -> float:
    """Returns the time on the clock of a stage of so many seconds, whose shards an array may process."""
    serial = row.estimate.serial_seconds
    if slurm is None or row.shards == 1 or serial is None:
        return seconds
    return serial + (seconds - serial) / min(row.shards, slurm.array_size)


def rate_of(row: StagePlan, profile: Profile) -> Rate | TrainingTime | str:
    """Returns the source of the time of a training phase: a measured rate, or the model of training time.

    Without either, returns the reason.
    """
    if row.estimate.training is None:
        return "on GPUs training phases alone are estimated"
    return profile.training_rate(row.estimate.training.precision, row.time)


def _seconds(row: StagePlan, rate: Rate) -> float:
    """Returns the GPU seconds of a training phase at a measured rate."""
    assert rate.utilization is not None
    return _flops_of_ranks(row) * _recomputed(row) / (rate.peak * rate.utilization)


def _flops_of_ranks(row: StagePlan) -> float:
    """Returns the FLOPs of a stage without those that servers may take over."""
    assert row.estimate.flops is not None
    return row.estimate.flops - (row.estimate.served.flops if row.estimate.served else 0.0)


def _peak(row: StagePlan, rate: Rate) -> str:
    assert row.estimate.training is not None
    return f"{rate.peak_tflops:g} TFLOP/s in {family(row.estimate.training.precision)}"


def _reached(row: StagePlan, time: TrainingTime, profile: Profile) -> str:
    """Returns the share of the peak that the model gives a phase."""
    assert row.estimate.training is not None and profile.gpu is not None
    rate = profile.gpu.rate(row.estimate.training.precision)
    assert rate is not None
    return f"{_flops_of_ranks(row) / (time.seconds * gpus_of(row, profile)) / rate.peak:.2f} of {_peak(row, rate)}"


def gpus_of(row: StagePlan, profile: Profile, all_of_job: bool = False) -> int:
    """Returns the total number of GPUs of a stage's ranks.

    With `all_of_job`, unused GPUs of its nodes and those of spare nodes count as well.
    """
    if profile.slurm is None:
        return 0
    allocation = profile.slurm.allocation(row.state.name, row.needs)
    return allocation.all_gpus if all_of_job else allocation.gpus


def _recomputed(row: StagePlan) -> float:
    return row.estimate.training.recomputed if row.estimate.training else 1.0


def priced(use: Use, profile: Profile) -> Use:
    """Returns the use with its money and energy by the profile."""
    power, prices = profile.power, profile.prices
    return replace(
        use,
        cost=use.gpu_hours * prices.gpu_hour + use.core_hours * prices.core_hour if prices else 0.0,
        energy_wh=use.gpu_hours * power.watts_per_gpu + use.core_hours * power.watts_per_core,
    )


def _assumed(rows: list[StagePlan], uses: tuple[Use, ...], profile: Profile) -> list[str]:
    """Returns sentences on the rates and their sources, on omitted costs, and on stages without an estimate."""
    on_gpus = {use.name: use for use in uses if use.gpu_hours}
    assumptions = [row.estimate.assumed for row in rows if row.state.name in on_gpus and row.gpus]
    for row in rows:
        use = on_gpus.get(row.state.name)
        if use and row.estimate.served is not None and not use.server_core_hours:
            assumptions.append(row.estimate.served.assumed)
    return [
        *_rates(rows, on_gpus, profile),
        *(f"assumed: {sentence}" for sentence in dict.fromkeys(assumptions) if sentence),
        *_without_estimate(uses),
    ]


def _rates(rows: list[StagePlan], on_gpus: Collection[str], profile: Profile) -> list[str]:
    """Returns sentences on the speed of training phases: measured rates, or the model with its error."""
    training = [(row, rate_of(row, profile)) for row in rows if row.state.name in on_gpus and gpus_of(row, profile)]
    gpu, sentences = profile.gpu, list[str]()
    if gpu is None or not training:
        return []
    if measured := [(row, rate) for row, rate in training if isinstance(rate, Rate)]:
        rates = " and ".join(dict.fromkeys(f"{rate.utilization:g} of {_peak(row, rate)}" for row, rate in measured))
        most = max(_recomputed(row) for row, _ in measured)
        again = f", up to {most - 1:.0%} more FLOPs where the backward pass computes again" if most > 1 else ""
        sentences.append(f"assumed: {gpu.name} at {rates}{again}; {gpu.source}")
    if modeled := [(row, time) for row, time in training if isinstance(time, TrainingTime)]:
        phases: dict[str, list[str]] = {}
        for row, time in modeled:
            phases.setdefault(_reached(row, time, profile), []).append(row.state.name)
        shares = ", ".join(f"{share} for {' and '.join(names)}" for share, names in phases.items())
        time = modeled[0][1]
        sentences.append(
            f"assumed: {gpu.name} by a model of compute, memory and network, with even routing: {shares}; "
            f"{model_error(time)}; {gpu.source}"
        )
    sentences.append(
        "not counted: restarts, waiting for the queue, reading and writing of checkpoints, held-out loss, cores "
        "beside GPUs"
    )
    return sentences


def model_error(time: TrainingTime) -> str:
    """Returns the known error of a model of training time, in words."""
    errors = f"median {time.median_error:.0%}, largest {time.largest_error:.0%}"
    return f"error on published runs that it was not fitted to: {errors}"


def _without_estimate(uses: tuple[Use, ...]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for use in uses:
        if use.why:
            reasons.setdefault(use.why, []).append(use.name)
    return [f"no time is given for {', '.join(names)}: {why}" for why, names in reasons.items()]


@dataclass(frozen=True)
class Fit:
    """The fit of one stage. Limits that the profile does not state are not exceeded."""

    name: str
    # A clause for each limit that it exceeds; none if it fits.
    reasons: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return f"{self.name} does not fit: {'; '.join(self.reasons)}"


def fits(rows: list[StagePlan], uses: Mapping[str, Use], profile: Profile) -> list[Fit]:
    """Returns for each stage the reasons why it does not fit the cluster, if any.

    The data that earlier stages leave on the disk counts for later ones.

    Args:
        rows: The plans of the stages, in order.
        uses: The cost estimate of each stage, by its name.
        profile: The cluster profile.

    Raises:
        RecipeError: The ranks of a stage do not fill the profile's nodes equally.
    """
    disk = files = 0
    results, storage = [], profile.storage
    for row in rows:
        estimate, name = row.estimate, row.state.name
        reasons = []
        disk += estimate.disk_bytes or 0
        files += estimate.files or FILES + FILES_PER_SHARD * row.shards
        if row.state.text == "to run":
            reasons += missing_nodes(row, profile) + _format(row, profile)
            reasons += _memory(row, profile) + _server_memory(row, profile)
            if (use := uses.get(name)) is not None and use.why is None:
                reasons += _time(row, use, profile)
        # What earlier stages leave on the disk counts for this one, sealed or not.
        at_most = disk + estimate.work_bytes
        if storage.home_gb is not None and at_most > storage.home_gb * GB:
            reasons.append(f"$ATOM_HOME then has {at_most / GB:,.0f} GB, of {storage.home_gb:,.0f} (storage.home_gb)")
        if storage.home_files is not None and files > storage.home_files:
            reasons.append(f"$ATOM_HOME then has {files:,} files, of {storage.home_files:,} (storage.home_files)")
        results.append(Fit(name, tuple(reasons)))
    return results


def require(graph: Graph, store: Store, selected: list[str], profile: Profile) -> None:
    """Raises RecipeError if a selected stage does not fit the cluster.

    It is also raised if the Hub would not take what a stage publishes.
    """
    rows = plan(graph, states(graph, store), selected)
    require_publishable(rows)
    uses = {use.name: use for use in estimate_costs(rows, profile, is_small(graph)).uses}
    misfits = [result for result in fits(rows, uses, profile) if result.reasons]
    if misfits:
        count = len(misfits) - 1
        others = {0: "", 1: "; nor does one other stage"}.get(count, f"; nor do {count} other stages")
        raise RecipeError(
            f"cluster profile {profile.name}: {misfits[0].sentence}{others}; change the profile or the recipe's "
            "parallelism, or submit with --ignore-fit"
        )


def require_publishable(rows: list[StagePlan]) -> None:
    """Raises RecipeError if the Hub would not take what the stages of a plan publish."""
    if refused := unpublishable(rows):
        others = f"; and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise RecipeError(f"the release could not be published: {refused[0]}{others}")


def unpublishable(rows: list[StagePlan]) -> list[str]:
    """Returns a sentence for each limit of the Hub that the published files exceed.

    The limits are for the bytes of a file, the files of a folder and the files of a repository. Sizes are those of the
    estimates, with equal parts.
    """
    refused: list[str] = []
    shared: Counter[str] = Counter()
    for row in rows:
        for files in row.estimate.published:
            where = f"{files.folder} of {row.state.name}" if files.folder else row.state.name
            if files.bytes > FILE_BYTES * files.files:
                remedy = files.remedy.format(files=-(-files.bytes // FILE_BYTES))
                refused.append(
                    f"{where} has files of about {files.bytes / files.files / GB:,.0f} GB, and on the Hub a file has "
                    f"at most {FILE_BYTES / GB:.0f}; {remedy}"
                )
            if files.files > FOLDER_FILES:
                refused.append(
                    f"{where} has {files.files:,} files, and a folder on the Hub has at most {FOLDER_FILES:,}; divide "
                    "it into fewer parts, or into several sources"
                )
            if files.repository == "dataset":
                shared[where] += files.files
    if shared.total() > REPOSITORY_FILES:
        largest = ", ".join(f"{where} ({count:,})" for where, count in shared.most_common(3))
        refused.append(
            f"the data repository has {shared.total():,} files, and one on the Hub should have at most "
            f"{REPOSITORY_FILES:,}; lower the parts of the sources; the most are in {largest}"
        )
    return refused


def missing_nodes(row: StagePlan, profile: Profile) -> list[str]:
    """Checks the nodes of the job, and its GPUs together with those of its servers if they share a partition."""
    if profile.slurm is None:
        return []
    allocation = profile.slurm.allocation(row.state.name, row.needs)
    jobs, need, stated = allocation.jobs, allocation.all_nodes, f"slurm.{allocation.section}.nodes"
    if jobs.nodes is None:
        return []
    if need > jobs.nodes:
        return [f"it needs {need} nodes, and there are {jobs.nodes} ({stated})"]
    servers = servers_of(row, profile)
    if servers is None or not jobs.gpus_per_node or servers.partition != jobs.partition:
        return []
    have, of_servers = jobs.nodes * jobs.gpus_per_node, servers.count * servers.gpus_per_node
    of_ranks = need * jobs.gpus_per_node if jobs.exclusive else allocation.all_gpus
    if of_ranks + of_servers <= have:
        return []
    needs = f"it needs {of_ranks} GPUs and its servers {of_servers} at the same time"
    return [f"{needs}, and {jobs.nodes} nodes have {have} ({stated}, slurm.servers.count)"]


def _format(row: StagePlan, profile: Profile) -> list[str]:
    """Returns the problem of products in FP4, where the profile states its GPUs and no rate for them."""
    training, gpu, slurm = row.estimate.training, profile.gpu, profile.slurm
    on_gpus = slurm is not None and slurm.allocation(row.state.name, row.needs).gpus
    if training is None or gpu is None or not on_gpus or family(training.precision) != "fp4" or gpu.fp4 is not None:
        return []
    return [f"it trains in {training.precision}, and {gpu.name} has no FP4 (gpu.fp4)"]


def _memory(row: StagePlan, profile: Profile) -> list[str]:
    """Checks the memory of each GPU, and of the processes of a node together."""
    estimate, slurm = row.estimate, profile.slurm
    # Without GPUs, the memory of a rank's GPUs is memory of the host.
    need = (estimate.memory_bytes or 0) * (row.gpus or 1) + estimate.host_bytes
    if slurm is None:
        at_once, have, where = min(row.ranks, profile.local.jobs), _machine_bytes(profile), "this machine"
        return [_lack(need * at_once, have, where)] if need * at_once > have else []
    allocation, reasons = slurm.allocation(row.state.name, row.needs), []
    if allocation.gpus:
        limit, on_gpu = profile.gpu.memory_gb if profile.gpu else None, estimate.memory_bytes or 0
        if limit is not None and on_gpu > limit * GIB:
            reasons.append(_lack(on_gpu, limit * GIB, "a GPU", "gpu.memory_gb"))
        need = estimate.host_bytes
    of_node = need * allocation.ranks_per_node
    limit = allocation.jobs.memory_gb or None  # 0 stands for all of a node, whose size Slurm knows
    if limit is not None and of_node > limit * GIB:
        reasons.append(_lack(of_node, limit * GIB, "its job on a node", f"slurm.{allocation.section}.memory_gb"))
    return reasons


def _server_memory(row: StagePlan, profile: Profile) -> list[str]:
    """Checks the memory of each GPU and of the job of a server, for a stage with servers in jobs of their own."""
    servers, work, reasons = servers_of(row, profile), row.estimate.served, []
    if servers is None or work is None:
        return []
    if work.scorers >= servers.count:
        reasons.append(
            f"{work.scorers} of {servers.count} servers (slurm.servers.count) score its answers, and none is left that "
            "draws them"
        )
    on_gpu, on_host = work.memory(servers.gpus_per_node)
    limit = profile.gpu.memory_gb if profile.gpu else None
    if limit is not None and on_gpu > limit * GIB:
        reasons.append(_lack(on_gpu, limit * GIB, "a GPU", "gpu.memory_gb", "its server"))
    if servers.memory_gb and on_host > servers.memory_gb * GIB:
        reasons.append(_lack(on_host, servers.memory_gb * GIB, "its job", "slurm.servers.memory_gb", "its server"))
    return reasons


def _lack(need: float, have: float, where: str, setting: str = "", what: str = "it") -> str:
    stated = f" ({setting})" if setting else ""
    return f"{what} needs {need / GIB:,.1f} GiB of memory, and {where} has {have / GIB:,.1f}{stated}"


def _machine_bytes(profile: Profile) -> float:
    if profile.local.memory_gb is not None:
        return profile.local.memory_gb * GIB
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _time(row: StagePlan, use: Use, profile: Profile) -> list[str]:
    """Returns the reason why a job is too short for a stage, as a list that is empty if it is not.

    One start must last for training to the next work checkpoint, for a shard and for the joining of all shards, or else
    for the whole stage.
    """
    slurm, estimate, hours, what = profile.slurm, row.estimate, use.hours, "it"
    if slurm is None:
        return []
    allocation = slurm.allocation(row.state.name, row.needs)
    minutes, whole, serial = allocation.jobs.minutes, estimate.cpu_seconds, estimate.serial_seconds
    if row.gpus and allocation.gpus and estimate.gpu_seconds is not None:
        whole = estimate.gpu_seconds / row.gpus
    if (training := estimate.training) is not None:
        hours, what = use.hours * min(1.0, training.checkpoint_interval / training.steps), "to its next checkpoint it"
    elif row.shards > 1 and whole is not None and serial is not None:
        hours, what = max((whole - serial) / row.shards, serial) / 3600, "a shard or the joining of all"
    if hours * 60 <= minutes:
        return []
    stated = f"slurm.{allocation.section}.minutes"
    return [f"{what} needs {hours:,.1f} hours in one start, and a job has {minutes / 60:,.1f} ({stated})"]
