"""Checks that stages fit a cluster profile: nodes, memory, time limits, disk, files, and the Hub."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.core.errors import RecipeError
from pipeline.core.stage import family
from pipeline.core.store import Store
from pipeline.graph.dag import Graph, states
from pipeline.graph.plan import StagePlan, is_small, plan
from pipeline.hub.client import FILE_BYTES, FOLDER_FILES, REPOSITORY_FILES
from pipeline.launch.cluster_profile import Profile
from pipeline.operations.cost_estimate import Use, estimate_costs, servers_of

GIB, GB = 2**30, 10**9
# Of an artifact without an estimate: of each shard, and beside them. atom-smoke's have at most 3 and 6.
FILES_PER_SHARD, FILES = 4, 10


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
            reasons += _nodes(row, profile) + _format(row, profile)
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


def _nodes(row: StagePlan, profile: Profile) -> list[str]:
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
